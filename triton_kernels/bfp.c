/* Block floating-point storage for CPUs, bit for bit as reference.py defines it. native.py compiles and calls this.
 *
 * Plain C for the compiler's vectoriser: values pass in tiles that stay in the first-level cache, and each step is a
 * loop without branches over a tile. Codes lie one a byte between the steps; eight of them, a group, are one 64-bit
 * word. Nothing depends on whether denormals are flushed to zero or multiplies and adds are fused: every step is exact,
 * or rounds to the same result. Little-endian.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 1024, GROUP = 8, GROUPS = TILE / GROUP }; /* values; a whole number of blocks of any size */
enum { CHUNK = 64 * TILE };                             /* values that a thread takes at a time */
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NOT_FINITE = 255 };

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
#define ROUND_BITS 0x4B400000

typedef struct {
    void *values;
    uint32_t *code32; /* the planes; null where the width has none */
    uint16_t *code16;
    uint8_t *code8;
    uint8_t *exponents;
    size_t numel;
    int dtype, width, block, is_unsigned, exponent_min;
    size_t next; /* first value that no thread has taken yet */
} Job;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE int32_t greatest(int32_t a, int32_t b) { return a > b ? a : b; }

INLINE float select_float(int32_t condition, float yes, float no) {
    uint32_t mask = -(uint32_t)condition;
    return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

/* CASES(f, arguments): f(arguments, block) with the block known to the compiler. */
#define CASES(f, ...)                                                                                                  \
    switch (job->block) {                                                                                              \
    case 8: f(__VA_ARGS__, 8); break;                                                                                  \
    case 16: f(__VA_ARGS__, 16); break;                                                                                \
    case 32: f(__VA_ARGS__, 32); break;                                                                                \
    case 64: f(__VA_ARGS__, 64); break;                                                                                \
    default: f(__VA_ARGS__, 128); break;                                                                               \
    }

/* ---- values <-> float32 ---- */

INLINE float float_of_half(uint32_t half) {
    uint32_t magnitude = half & 0x7FFF;
    uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 224u << 23 : 112u << 23);
    float denormal = (float)(int32_t)magnitude * 0x1p-24f;
    return float_of(bits_of(select_float(magnitude < 0x400, denormal, float_of(normal))) | (half & 0x8000) << 16);
}

INLINE uint16_t half_of_float(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
    uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* rounds at 2^-24 */
    uint32_t half = magnitude < 113u << 23 ? denormal : magnitude > 0x477FEFFF ? 0x7C00 : normal;
    return (uint16_t)((magnitude > 0x7F800000 ? 0x7E00 : half) | (bits >> 16 & 0x8000));
}

INLINE uint16_t bfloat16_of_float(float value) { /* a NaN stays one: decoding makes only 0x7FC00000 */
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* The values [start, start + n) as whole blocks of float32; in `tile` if they do not lie so in memory. */
static const float *load(const Job *job, size_t start, int n, int n_filled, float *restrict tile) {
    if (job->dtype == FLOAT32) {
        const float *values = (const float *)job->values + start;
        if (n == n_filled) return values;
        memcpy(tile, values, n * sizeof *tile);
    } else {
        const uint16_t *values = (const uint16_t *)job->values + start;
        if (job->dtype == BFLOAT16)
            for (int i = 0; i < n; i++) tile[i] = float_of((uint32_t)values[i] << 16);
        else
            for (int i = 0; i < n; i++) tile[i] = float_of_half(values[i]);
    }
    memset(tile + n, 0, (n_filled - n) * sizeof *tile);
    return tile;
}

static void store(const Job *job, size_t start, int n, const float *restrict tile) {
    uint16_t *values = (uint16_t *)job->values + start;
    if (job->dtype == BFLOAT16)
        for (int i = 0; i < n; i++) values[i] = bfloat16_of_float(tile[i]);
    else
        for (int i = 0; i < n; i++) values[i] = half_of_float(tile[i]);
}

/* ---- compress ---- */

INLINE void find_exponents(const Job *job, const float *x, uint8_t *restrict exponents, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        int32_t largest = 0;
        for (int i = 0; i < block; i++) largest = greatest(largest, bits_of(x[b * block + i]) & 0x7FFFFFFF);
        exponents[b] = (uint8_t)greatest(largest >> 23, job->exponent_min);
    }
}

/* A power of two for each value from its block's exponent: up - E with `sign` -1, E - down with 1. NaN where E is 255. */
INLINE void spread(const uint8_t *exponents, int bias, int sign, float *restrict factors, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        uint32_t bits = (uint32_t)(bias + sign * exponents[b]) << 23;
        float factor = float_of(exponents[b] == NOT_FINITE ? 0x7FC00000 : bits);
        for (int i = 0; i < block; i++) factors[b * block + i] = factor;
    }
}

/* Codes plus 2^M. One bit of magnitude doubles all: 1/step may be no normal float. */
static void encode_signed(const float *x, const float *restrict reciprocals, uint8_t *restrict codes, int n, int width) {
    const int32_t offset = 1 << (width - 1), twice = width == 2;
    const float added = (ROUND + (float)offset) * (float)(1 + twice);
    const int32_t base = ROUND_BITS + (twice << 23), top = 2 * offset - 1;
    for (int i = 0; i < n; i++) {
        int32_t code = (int32_t)bits_of(x[i] * reciprocals[i] + added) - base;
        codes[i] = (uint8_t)greatest(least(code, top), 1);
    }
}

static void encode_unsigned(const float *x, const float *restrict reciprocals, uint8_t *restrict codes, int n, int width) {
    const int32_t top = (1 << width) - 1;
    for (int i = 0; i < n; i++) {
        float cell = x[i] * reciprocals[i] - 0.5f;
        int32_t code = (int32_t)bits_of(cell + ROUND) - (ROUND_BITS - 1);
        code = least(code, (int32_t)bits_of(x[i])); /* as integers, a positive float is no less than any code */
        codes[i] = (uint8_t)least(greatest(code, 0), top);
    }
}

static void clear_not_finite(const uint8_t *exponents, uint8_t *restrict codes, int n_blocks, int block, int zero) {
    int any = 0;
    for (int b = 0; b < n_blocks; b++) any |= exponents[b] == NOT_FINITE;
    for (int b = 0; any && b < n_blocks; b++)
        if (exponents[b] == NOT_FINITE) memset(codes + b * block, zero, block);
}

/* ---- eight codes, one a byte of a word <-> a group's bits ---- */

#define EACH_BYTE 0x0101010101010101u

static void offset_to_sign_and_magnitude(uint64_t *restrict words, int n, int width) {
    const uint64_t signs = EACH_BYTE << (width - 1);
    for (int g = 0; g < n; g++) {
        uint64_t negative = (words[g] & signs) ^ signs, ones = negative >> (width - 1) & EACH_BYTE;
        words[g] = (((words[g] ^ (negative - ones)) & ~signs) + ones) | negative;
    }
}

static void sign_and_magnitude_to_offset(uint64_t *restrict words, int n, int width) {
    const uint64_t signs = EACH_BYTE << (width - 1);
    for (int g = 0; g < n; g++) {
        uint64_t negative = words[g] & signs, ones = negative >> (width - 1) & EACH_BYTE;
        words[g] = ((words[g] & ~signs) ^ (negative - ones)) + ones + (negative ^ signs);
    }
}

/* Fields of one code, then two, then four, move down to their neighbours below; `widen` goes the other way. */
static void narrow(uint64_t *restrict words, int n, int width) {
    const int gap = 8 - width;
    const uint64_t one = 0x0001000100010001u * ((1u << width) - 1);
    const uint64_t two = 0x0000000100000001u * ((1u << 2 * width) - 1);
    const uint64_t four = ((uint64_t)1 << 4 * width) - 1;
    for (int g = 0; g < n; g++) {
        uint64_t word = words[g];
        word = (word & one) | (word >> gap & one << width);
        word = (word & two) | (word >> 2 * gap & two << 2 * width);
        words[g] = (word & four) | (word >> 4 * gap & four << 4 * width);
    }
}

static void widen(uint64_t *restrict words, int n, int width) {
    const int gap = 8 - width;
    const uint64_t one = 0x0001000100010001u * ((1u << width) - 1);
    const uint64_t two = 0x0000000100000001u * ((1u << 2 * width) - 1);
    const uint64_t four = ((uint64_t)1 << 4 * width) - 1;
    for (int g = 0; g < n; g++) {
        uint64_t word = words[g];
        word = (word & four) | (word & four << 4 * width) << 4 * gap;
        word = (word & two) | (word & two << 2 * width) << 2 * gap;
        words[g] = (word & one) | (word & one << width) << gap;
    }
}

/* Write the low bytes of each word to the planes of 4, 2 and 1 bytes. */
static void deal(const Job *job, size_t first, const uint64_t *restrict words, int n) {
    uint32_t *restrict code32 = job->code32 + first;
    uint16_t *restrict code16 = job->code16 + first;
    uint8_t *restrict code8 = job->code8 + first;
    const int below16 = job->width & 4 ? 32 : 0, below8 = below16 + (job->width & 2 ? 16 : 0);
    if (job->width == 8) memcpy(job->code32 + 2 * first, words, n * sizeof *words);
    if (job->width & 4)
        for (int g = 0; g < n; g++) code32[g] = (uint32_t)words[g];
    if (job->width & 2)
        for (int g = 0; g < n; g++) code16[g] = (uint16_t)(words[g] >> below16);
    if (job->width & 1)
        for (int g = 0; g < n; g++) code8[g] = (uint8_t)(words[g] >> below8);
}

static void collect(const Job *job, size_t first, uint64_t *restrict words, int n) {
    const uint32_t *restrict code32 = job->code32 + first;
    const uint16_t *restrict code16 = job->code16 + first;
    const uint8_t *restrict code8 = job->code8 + first;
    const int below16 = job->width & 4 ? 32 : 0, below8 = below16 + (job->width & 2 ? 16 : 0);
    memset(words, 0, n * sizeof *words);
    if (job->width == 8) memcpy(words, job->code32 + 2 * first, n * sizeof *words);
    if (job->width & 4)
        for (int g = 0; g < n; g++) words[g] = code32[g];
    if (job->width & 2)
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)code16[g] << below16;
    if (job->width & 1)
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)code8[g] << below8;
}

/* ---- decompress ---- */

static void decode_signed(const uint8_t *codes, const float *restrict steps, float *restrict out, int n, int width) {
    const int32_t offset = 1 << (width - 1);
    for (int i = 0; i < n; i++) out[i] = (float)((int32_t)codes[i] - offset) * steps[i];
}

static void decode_unsigned(const uint8_t *codes, const float *restrict steps, float *restrict out, int n) {
    for (int i = 0; i < n; i++) {
        float level = (float)(int32_t)codes[i] - 0.5f;
        out[i] = (level < 0.0f ? 0.0f : level) * steps[i];
    }
}

/* ---- jobs ---- */

static void compress_tile(const Job *job, size_t start, int n) {
    float tile[TILE], factors[TILE];
    union {
        uint8_t codes[TILE];
        uint64_t words[GROUPS];
    } u;
    int n_blocks = (n + job->block - 1) / job->block, n_groups = n_blocks * (job->block / GROUP);
    uint8_t *exponents = job->exponents + start / job->block;
    const float *x = load(job, start, n, n_blocks * job->block, tile);
    CASES(find_exponents, job, x, exponents, n_blocks)
    CASES(spread, exponents, 252 + job->is_unsigned + job->width + (!job->is_unsigned && job->width == 2), -1, factors, n_blocks)
    if (job->is_unsigned) {
        encode_unsigned(x, factors, u.codes, n_blocks*job->block, job->width);
        clear_not_finite(exponents, u.codes, n_blocks, job->block, 0);
    } else {
        encode_signed(x, factors, u.codes, n_blocks*job->block, job->width);
        clear_not_finite(exponents, u.codes, n_blocks, job->block, 1 << (job->width - 1));
        offset_to_sign_and_magnitude(u.words, n_groups, job->width);
    }
    narrow(u.words, n_groups, job->width);
    deal(job, start / GROUP, u.words, n_groups);
}

static void decompress_tile(const Job *job, size_t start, int n) {
    float tile[TILE], factors[TILE];
    union {
        uint8_t codes[TILE];
        uint64_t words[GROUPS];
    } u;
    int n_blocks = (n + job->block - 1) / job->block, n_groups = n_blocks * (job->block / GROUP);
    const uint8_t *exponents = job->exponents + start / job->block;
    int in_place = job->dtype == FLOAT32 && n == n_blocks * job->block;
    float *out = in_place ? (float *)job->values + start : tile;
    collect(job, start / GROUP, u.words, n_groups);
    widen(u.words, n_groups, job->width);
    CASES(spread, exponents, 2 -job->is_unsigned - job->width, 1, factors, n_blocks)
    if (job->is_unsigned) {
        decode_unsigned(u.codes, factors, out, n_blocks*job->block);
    } else {
        sign_and_magnitude_to_offset(u.words, n_groups, job->width);
        decode_signed(u.codes, factors, out, n_blocks*job->block, job->width);
    }
    if (job->dtype != FLOAT32)
        store(job, start, n, tile);
    else if (!in_place)
        memcpy((float *)job->values + start, tile, n * sizeof *tile);
}

/* Runs in every thread: take chunks until none are left. */
INLINE void take_chunks(Job *job, void (*tile)(const Job *, size_t, int)) {
    for (;;) {
        size_t start = __atomic_fetch_add(&job->next, CHUNK, __ATOMIC_RELAXED);
        if (start >= job->numel) return;
        size_t end = job->numel - start < CHUNK ? job->numel : start + CHUNK;
        for (; start < end; start += TILE) tile(job, start, end - start < TILE ? (int)(end - start) : TILE);
    }
}

static void compress_chunks(void *job) { take_chunks(job, compress_tile); }

static void decompress_chunks(void *job) { take_chunks(job, decompress_tile); }

/* `parallel` may be null: then one thread does all. */
void fxpipe_bfp(int decompress, void *values, void *code32, void *code16, void *code8, void *exponents, size_t numel,
                int dtype, int width, int block, int is_unsigned, int exponent_min, Parallel parallel,
                unsigned n_threads) {
    Job job = {values, code32, code16, code8, exponents, numel, dtype, width, block, is_unsigned, exponent_min, 0};
    void (*chunks)(void *) = decompress ? decompress_chunks : compress_chunks;
    size_t n_chunks = (numel + CHUNK - 1) / CHUNK;
    if (n_threads > n_chunks) n_threads = (unsigned)n_chunks;
    if (parallel && n_threads > 1)
        parallel(chunks, &job, n_threads, 0);
    else
        chunks(&job);
}
