/* Block floating-point storage on CPUs, bit for bit as reference.py defines it. native.py compiles and calls this.
 *
 * Plain C, little-endian, for the compiler's vectoriser: values pass in tiles that stay in the first-level cache, and
 * every step is a loop without branches. Between the steps codes lie one a byte; eight of them, a group, are a word.
 * No result depends on whether denormals are flushed to zero or multiplies and adds are fused.
 */

#include "bfp_numbers.h"

#include "bfp_packing.h"

#include "bfp_scales.h"

#include "bfp_random.h"

#include "bfp_coding.h"

#include "bfp_search.h"

#include "bfp_outliers.h"

#include "bfp_dither.h"

#include "bfp_bools.h"

enum { CHUNK = 32 * TILE }; /* values that a thread takes at a time */

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct Job {
    const Format *format;
    char *values;
    Planes codes, scales;
    int16_t *outliers;
    uint8_t *bools; /* packed */
    size_t numel;
    int64_t seed;
    void (*tile)(const struct Job *, size_t start, int n);
    size_t next; /* the first value that no thread has taken */
} Job;

static const uint8_t none[TILE]; /* zeros */

/* The bytes that FRACTION adds. */
static const uint8_t *noise_of(const Job *job, const void *values, int dtype, size_t start, Codes *bytes, int n) {
    if (job->format->noise == NO_NOISE) return none;
    if (job->format->noise == HASHED)
        hashed_bytes(values, bytes->codes, n, dtype);
    else
        seeded_bytes(job->seed, start / GROUP, bytes->words, n / GROUP, 0);
    return bytes->codes;
}

static void clear_not_finite(const Format *format, const int32_t *scales, uint8_t *restrict codes, int n_blocks,
                             int zero) {
    int found = 0;
    for (int b = 0; b < n_blocks; b++) found |= scales[b] == format->scale_nan;
    for (int b = 0; found && b < n_blocks; b++)
        if (scales[b] == format->scale_nan) memset(codes + b * format->block, zero, format->block);
}

/* A tile of a format without outliers. */
static void compress_values(const Job *job, const void *values, int dtype, size_t start, int n_blocks) {
    const Format *format = job->format;
    const int block = format->block, n = n_blocks * block, mode = mode_of(format);
    int32_t largests[GROUPS], least_codes[GROUPS], scales[GROUPS];
    Codes codes, bytes;
    find_largest(values, largests, n_blocks, block, dtype);
    for (int b = 0; b < n_blocks; b++) least_codes[b] = format->least_scale;
    first_scales(format, largests, largests, least_codes, scales, n_blocks);
    if (format->signed_levels) sign_scales(format, values, scales, n_blocks);
    if (format->n_offsets > 1) {
        search(format, values, none, least_codes, scales, codes.codes, n_blocks);
    } else {
        float factors[TILE];
        reciprocal_factors(format, scales, units_of(format), factors, n_blocks);
        const uint8_t *noise = noise_of(job, values, dtype, start, &bytes, n);
        encode(format, values, dtype, factors, noise, codes.codes, n);
    }
    clear_not_finite(format, scales, codes.codes, n_blocks, mode == AS_STORED ? 0 : 1 << format->magnitude_bits);
    pack(&job->codes, start / GROUP, &codes, n / GROUP, mode);
    store_scales(&job->scales, start / block, scales, n_blocks);
}

/* A tile of a format with outliers: `counted` are the values without them. */
static void compress_with_outliers(const Job *job, const float *values, size_t start, int n_blocks) {
    const Format *format = job->format;
    const int block = format->block, n = n_blocks * block;
    int32_t largests[GROUPS], all[GROUPS], least_codes[GROUPS], scales[GROUPS];
    uint32_t counted[TILE];
    uint8_t chosen[TILE];
    Codes codes, bytes;
    Outliers found;
    for (int b = 0; b < n_blocks; b++) least_codes[b] = format->least_scale;
    choose_outliers(format, (const uint32_t *)values, &found, counted, chosen, least_codes, n_blocks);
    find_largest(counted, largests, n_blocks, block, FLOAT32);
    find_largest(values, all, n_blocks, block, FLOAT32);
    first_scales(format, largests, all, least_codes, scales, n_blocks);
    if (format->signed_levels) sign_scales(format, counted, scales, n_blocks);
    if (format->n_offsets > 1) {
        search(format, values, chosen, least_codes, scales, codes.codes, n_blocks);
    } else {
        float factors[TILE];
        reciprocal_factors(format, scales, units_of(format), factors, n_blocks);
        const uint8_t *noise = noise_of(job, values, FLOAT32, start, &bytes, n);
        encode(format, values, FLOAT32, factors, noise, codes.codes, n);
    }
    all_to_stored(codes.words, n / GROUP, format->width, mode_of(format));
    int16_t *entries = job->outliers + start / block * format->outliers;
    encode_outliers(format, &found, scales, entries, codes.codes, n_blocks);
    clear_not_finite(format, scales, codes.codes, n_blocks, 0);
    pack(&job->codes, start / GROUP, &codes, n / GROUP, AS_STORED);
    store_scales(&job->scales, start / block, scales, n_blocks);
}

/* The last block is filled up with zeros. What needs float32 has its values made so. */
static void compress_tile(const Job *job, size_t start, int n) {
    const Format *format = job->format;
    const int n_blocks = (n + format->block - 1) / format->block, itemsize = itemsize_of(format->dtype);
    const int in_float32 = format->outliers || format->n_offsets > 1 || format->signed_levels;
    const void *values = job->values + start * itemsize;
    float filled[TILE], converted[TILE];
    int dtype = format->dtype;
    if (n % format->block) {
        memset((char *)filled + n * itemsize, 0, (n_blocks * format->block - n) * itemsize);
        values = memcpy(filled, values, (size_t)n * itemsize);
    }
    if (in_float32 && dtype != FLOAT32) {
        to_float32(values, converted, n_blocks * format->block, dtype);
        values = converted;
        dtype = FLOAT32;
    }
    if (format->outliers)
        compress_with_outliers(job, values, start, n_blocks);
    else
        compress_values(job, values, dtype, start, n_blocks);
}

/* A tile of a format with outliers or dither, in float32. */
static void decompress_in_float32(const Job *job, Codes *codes, const int32_t *scales, const float *factors,
                                  float *values, size_t start, int n_blocks) {
    const Format *format = job->format;
    const int n = n_blocks * format->block;
    Codes as_decoded = *codes;
    if (format->dither) {
        decode_dithered(format, job->seed, start / GROUP, codes->codes, factors, values, n);
    } else {
        all_from_stored(as_decoded.words, n / GROUP, format->width, mode_of(format));
        decode(format, as_decoded.codes, factors, values, FLOAT32, n);
    }
    const int16_t *entries = job->outliers + start / format->block * format->outliers;
    if (format->outliers) decode_outliers(format, entries, scales, codes->codes, values, n_blocks);
}

static void decompress_tile(const Job *job, size_t start, int n) {
    const Format *format = job->format;
    const int block = format->block, n_blocks = (n + block - 1) / block, n_values = n_blocks * block;
    const int dtype = format->dtype, itemsize = itemsize_of(dtype), in_float32 = format->outliers || format->dither;
    char *out = job->values + start * itemsize;
    float filled[TILE], factors[TILE], values[TILE];
    void *decoded = n == n_values ? (void *)out : filled;
    int32_t scales[GROUPS];
    Codes codes;
    load_scales(&job->scales, start / block, scales, n_blocks);
    step_factors(format, scales, factors, n_blocks);
    unpack(&job->codes, start / GROUP, &codes, n_values / GROUP, in_float32 ? AS_STORED : mode_of(format));
    if (in_float32) {
        decompress_in_float32(job, &codes, scales, factors, values, start, n_blocks);
        from_float32(values, decoded, n_values, dtype, format->clamps);
    } else {
        decode(format, codes.codes, factors, decoded, dtype, n_values);
    }
    if (decoded == filled) memcpy(out, filled, (size_t)n * itemsize);
}

static void pack_bools_tile(const Job *job, size_t start, int n) {
    pack_bools((const uint8_t *)job->values, job->bools, start, n);
}

static void unpack_bools_tile(const Job *job, size_t start, int n) {
    unpack_bools((uint8_t *)job->values, job->bools, start, n);
}

/* Each thread runs this: takes chunks until none are left. */
static void take_chunks(void *shared) {
    Job *job = shared;
    for (;;) {
        size_t start = __atomic_fetch_add(&job->next, CHUNK, __ATOMIC_RELAXED);
        if (start >= job->numel) return;
        size_t end = job->numel - start < CHUNK ? job->numel : start + CHUNK;
        for (; start < end; start += TILE) job->tile(job, start, end - start < TILE ? (int)(end - start) : TILE);
    }
}

/* One thread does all if `parallel` is null. */
static void run(Job *job, Parallel parallel, unsigned n_threads) {
    size_t n_chunks = job->numel / CHUNK + 1;
    if (n_chunks < n_threads) n_threads = (unsigned)n_chunks;
    if (parallel && n_threads > 1)
        parallel(take_chunks, job, n_threads, 0);
    else
        take_chunks(job);
}

/* The planes of codes of that width, taken from the front of `*planes`. */
static Planes take_planes(int width, void *const **planes) {
    Planes taken = {0, 0, 0, width};
    if (width & 12) taken.code32 = *(*planes)++;
    if (width & 2) taken.code16 = *(*planes)++;
    if (width & 1) taken.code8 = *(*planes)++;
    return taken;
}

/* `planes` in the order of BFPFormat.planes. */
void fxpipe_bfp(int decompress, const Format *format, void *values, void *const *planes, size_t numel, int64_t seed,
                Parallel parallel, unsigned n_threads) {
    Job job = {.format = format, .values = values, .numel = numel, .seed = seed};
    job.tile = decompress ? decompress_tile : compress_tile;
    job.codes = take_planes(format->width, &planes);
    if (format->scale_bits == 8)
        job.scales = (Planes){0, 0, *planes++, 8};
    else
        job.scales = take_planes(format->scale_bits, &planes);
    if (format->outliers) job.outliers = *planes;
    run(&job, parallel, n_threads);
}

/* `values` one boolean a byte, `packed` eight a byte. */
void fxpipe_bools(int unpack, void *values, void *packed, size_t numel, Parallel parallel, unsigned n_threads) {
    Job job = {.values = values, .bools = packed, .numel = numel};
    job.tile = unpack ? unpack_bools_tile : pack_bools_tile;
    run(&job, parallel, n_threads);
}

size_t fxpipe_format_bytes(void) { return sizeof(Format); }
