/* Block floating-point storage on CPUs, bit for bit as reference.py defines it. native.py compiles and calls this.
 *
 * Plain C, little-endian, for the compiler's vectoriser: values pass in tiles that stay in the first-level cache, and
 * every step is a loop without branches. Between the steps codes lie one a byte; eight of them, a group, are a word.
 * No result depends on whether denormals are flushed to zero or multiplies and adds are fused.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* dtypes */
enum { GROUP = 8, TILE = 1024, GROUPS = TILE / GROUP }; /* values; a tile is a whole number of blocks of any size */
enum { RUN = 32 };          /* values that are handled with one factor, if blocks are so large */
enum { CHUNK = 32 * TILE }; /* values that a thread takes at a time */
enum { NOT_FINITE = 255 };  /* a shared exponent */

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
#define ROUND_BITS 0x4B400000

typedef struct {
    char *values;
    uint32_t *code32; /* the planes; null where the width has none */
    uint16_t *code16;
    uint8_t *code8, *exponents;
    size_t numel;
    int dtype, width, block, is_unsigned, exponent_min;
    size_t next; /* the first value that no thread has taken */
} Job;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

/* Inlined where called, so that `dtype`, `block`, `run` and `is_unsigned` are constants in its loops. */
#define INLINE static inline __attribute__((always_inline))

#define FOR_BLOCK(block, call)                                                                                         \
    switch (block) {                                                                                                   \
    case 8: call(8); break;                                                                                            \
    case 16: call(16); break;                                                                                          \
    case 32: call(32); break;                                                                                          \
    case 64: call(64); break;                                                                                          \
    default: call(128);                                                                                                \
    }

#define FOR_DTYPE_AND_RUN(dtype, run, call)                                                                            \
    switch ((dtype) * 2 + ((run) == 1)) {                                                                              \
    case FLOAT32 * 2: call(FLOAT32, RUN); break;                                                                       \
    case FLOAT32 * 2 + 1: call(FLOAT32, 1); break;                                                                     \
    case BFLOAT16 * 2: call(BFLOAT16, RUN); break;                                                                     \
    case BFLOAT16 * 2 + 1: call(BFLOAT16, 1); break;                                                                   \
    case FLOAT16 * 2: call(FLOAT16, RUN); break;                                                                       \
    default: call(FLOAT16, 1);                                                                                         \
    }

/* ---- numbers ---- */

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

INLINE uint32_t bits_of_half(uint32_t half) {
    uint32_t magnitude = half & 0x7FFF;
    uint32_t normal = (magnitude << 13) + (magnitude < 0x7C00 ? 112u << 23 : 224u << 23);
    uint32_t denormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return (magnitude < 0x400 ? denormal : normal) | (half & 0x8000) << 16;
}

INLINE uint32_t half_of_bits(uint32_t bits) {
    uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* rounds to multiples of 2^-24 */
    uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
    uint32_t half = magnitude > 0x7F800000 ? 0x7E00 : magnitude >= 0x477FF000 ? 0x7C00 : finite;
    return half | (bits >> 16 & 0x8000);
}

/* The only NaN that is decoded, 0x7FC00000, stays one. Up to 8 bits of magnitude there is nothing to round. */
INLINE uint32_t bfloat16_of_bits(uint32_t bits, int rounds) {
    return (rounds ? bits + 0x7FFF + (bits >> 16 & 1) : bits) >> 16;
}

/* The bits of value i as a float32. */
INLINE uint32_t get(const void *values, int i, int dtype) {
    if (dtype == FLOAT32) return ((const uint32_t *)values)[i];
    uint32_t bits = ((const uint16_t *)values)[i];
    return dtype == BFLOAT16 ? bits << 16 : bits_of_half(bits);
}

INLINE void put(void *values, int i, float value, int dtype, int rounds) {
    if (dtype == FLOAT32)
        ((float *)values)[i] = value;
    else if (dtype == BFLOAT16)
        ((uint16_t *)values)[i] = (uint16_t)bfloat16_of_bits(bits_of(value), rounds);
    else
        ((uint16_t *)values)[i] = (uint16_t)half_of_bits(bits_of(value));
}

/* ---- shared exponents ---- */

INLINE void exponents32(const uint32_t *values, uint8_t *restrict exponents, int n_blocks, int least_exponent,
                        int block) {
    for (int b = 0; b < n_blocks; b++) {
        int32_t largest = 0;
        for (int i = 0; i < block; i++) largest = greatest(largest, values[b * block + i] & 0x7FFFFFFF);
        exponents[b] = (uint8_t)greatest(largest >> 23, least_exponent);
    }
}

/* Of 16-bit values, the largest are the same before and after they become float32. */
INLINE void largest16(const uint16_t *values, uint16_t *restrict largests, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        uint16_t largest = 0;
        for (int i = 0; i < block; i++) {
            uint16_t magnitude = values[b * block + i] & 0x7FFF;
            largest = magnitude > largest ? magnitude : largest;
        }
        largests[b] = largest;
    }
}

static void find_exponents(const Job *job, const void *values, uint8_t *restrict exponents, int n_blocks) {
    if (job->dtype == FLOAT32) {
#define CALL(block) exponents32(values, exponents, n_blocks, job->exponent_min, block)
        FOR_BLOCK(job->block, CALL)
#undef CALL
        return;
    }
    uint16_t largests[GROUPS];
#define CALL(block) largest16(values, largests, n_blocks, block)
    FOR_BLOCK(job->block, CALL)
#undef CALL
    const int dtype = job->dtype, least_exponent = job->exponent_min;
    for (int b = 0; b < n_blocks; b++) {
        uint32_t bits = dtype == BFLOAT16 ? (uint32_t)largests[b] << 16 : bits_of_half(largests[b]);
        exponents[b] = (uint8_t)greatest((int32_t)bits >> 23, least_exponent);
    }
}

/* Powers of two whose exponents are bias + sign * E, NaN where E is 255: one a run, or one a value in small blocks. */
INLINE void powers(const uint8_t *exponents, int bias, int sign, float *restrict factors, int n_blocks, int block) {
    const int copies = block < RUN ? block : block / RUN;
    for (int b = 0; b < n_blocks; b++) {
        uint32_t bits = (uint32_t)(bias + sign * exponents[b]) << 23;
        float factor = float_of(exponents[b] == NOT_FINITE ? 0x7FC00000 : bits);
        for (int i = 0; i < copies; i++) factors[b * copies + i] = factor;
    }
}

/* ---- values <-> codes ---- */

/* Codes plus 2^M. One bit of magnitude doubles all: 1/step may be no normal float. */
INLINE void encode_signed(const void *values, const float *restrict reciprocals, uint8_t *restrict codes, int n,
                          int width, int dtype, int run) {
    const int32_t offset = 1 << (width - 1), twice = width == 2;
    const float added = (ROUND + (float)offset) * (float)(1 + twice);
    const int32_t zero = ROUND_BITS + (twice << 23), top = zero + 2 * offset - 1;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            float sum = float_of(get(values, r * run + i, dtype)) * reciprocals[r] + added;
            codes[r * run + i] = (uint8_t)greatest(least((int32_t)bits_of(sum), top), zero + 1);
        }
}

INLINE void encode_unsigned(const void *values, const float *restrict reciprocals, uint8_t *restrict codes, int n,
                            int width, int dtype, int run) {
    const int32_t top = (1 << width) - 1;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            uint32_t bits = get(values, r * run + i, dtype);
            float cell = float_of(bits) * reciprocals[r] - 0.5f;
            int32_t code = (int32_t)bits_of(cell + ROUND) - (ROUND_BITS - 1);
            code = least(code, (int32_t)bits); /* as an integer, a positive float is at least any code */
            codes[r * run + i] = (uint8_t)least(greatest(code, 0), top);
        }
}

INLINE void decode_signed(const uint8_t *codes, const float *restrict steps, void *values, int n, int width, int dtype,
                          int run) {
    const int32_t offset = 1 << (width - 1);
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++)
            put(values, r * run + i, (float)((int32_t)codes[r * run + i] - offset) * steps[r], dtype, 0);
}

INLINE void decode_unsigned(const uint8_t *codes, const float *restrict steps, void *values, int n, int dtype,
                            int run) {
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            float level = (float)(int32_t)codes[r * run + i] - 0.5f;
            put(values, r * run + i, (level < 0.0f ? 0.0f : level) * steps[r], dtype, 1);
        }
}

static void encode(const Job *job, const void *values, const float *reciprocals, uint8_t *codes, int n) {
    const int width = job->width, run = job->block < RUN ? 1 : RUN;
    if (job->is_unsigned) {
#define CALL(dtype, run) encode_unsigned(values, reciprocals, codes, n, width, dtype, run)
        FOR_DTYPE_AND_RUN(job->dtype, run, CALL)
#undef CALL
    } else {
#define CALL(dtype, run) encode_signed(values, reciprocals, codes, n, width, dtype, run)
        FOR_DTYPE_AND_RUN(job->dtype, run, CALL)
#undef CALL
    }
}

static void decode(const Job *job, const uint8_t *codes, const float *steps, void *values, int n) {
    const int width = job->width, run = job->block < RUN ? 1 : RUN;
    if (job->is_unsigned) {
#define CALL(dtype, run) decode_unsigned(codes, steps, values, n, dtype, run)
        FOR_DTYPE_AND_RUN(job->dtype, run, CALL)
#undef CALL
    } else {
#define CALL(dtype, run) decode_signed(codes, steps, values, n, width, dtype, run)
        FOR_DTYPE_AND_RUN(job->dtype, run, CALL)
#undef CALL
    }
}

static void clear_not_finite(const uint8_t *exponents, uint8_t *restrict codes, int n_blocks, int block, int zero) {
    int found = 0;
    for (int b = 0; b < n_blocks; b++) found |= exponents[b] == NOT_FINITE;
    for (int b = 0; found && b < n_blocks; b++)
        if (exponents[b] == NOT_FINITE) memset(codes + b * block, zero, block);
}

/* ---- codes, eight in a word <-> the bits of a group ---- */

#define EACH_BYTE 0x0101010101010101u

/* Offset codes to sign and magnitude; then fields of one code, two and four move down to their neighbours below. */
INLINE void narrow(uint64_t *restrict words, int n, int width, int is_unsigned) {
    const int gap = 8 - width;
    const uint64_t signs = EACH_BYTE << (width - 1);
    const uint64_t one = 0x0001000100010001u * ((1u << width) - 1);
    const uint64_t two = 0x0000000100000001u * ((1u << 2 * width) - 1);
    const uint64_t four = ((uint64_t)1 << 4 * width) - 1;
    for (int g = 0; g < n; g++) {
        uint64_t word = words[g];
        if (!is_unsigned) {
            uint64_t negative = (word & signs) ^ signs, ones = negative >> (width - 1);
            word = (((word ^ (negative - ones)) & ~signs) + ones) | negative;
        }
        word = (word & one) | (word >> gap & one << width);
        word = (word & two) | (word >> 2 * gap & two << 2 * width);
        words[g] = (word & four) | (word >> 4 * gap & four << 4 * width);
    }
}

/* The inverse. Minus zero becomes zero. */
INLINE void widen(uint64_t *restrict words, int n, int width, int is_unsigned) {
    const int gap = 8 - width;
    const uint64_t signs = EACH_BYTE << (width - 1);
    const uint64_t one = 0x0001000100010001u * ((1u << width) - 1);
    const uint64_t two = 0x0000000100000001u * ((1u << 2 * width) - 1);
    const uint64_t four = ((uint64_t)1 << 4 * width) - 1;
    for (int g = 0; g < n; g++) {
        uint64_t word = words[g];
        word = (word & four) | (word & four << 4 * width) << 4 * gap;
        word = (word & two) | (word & two << 2 * width) << 2 * gap;
        word = (word & one) | (word & one << width) << gap;
        if (!is_unsigned) {
            uint64_t negative = word & signs, ones = negative >> (width - 1);
            word = ((word & ~signs) ^ (negative - ones)) + ones + (negative ^ signs);
        }
        words[g] = word;
    }
}

/* The low bytes of each word go to the planes of 4, 2 and 1 bytes. */
static void deal(const Job *job, size_t first, const uint64_t *restrict words, int n) {
    const int below16 = job->width & 4 ? 32 : 0, below8 = below16 + (job->width & 2 ? 16 : 0);
    if (job->width == 8) memcpy(job->code32 + 2 * first, words, n * sizeof *words);
    if (job->width & 4) {
        uint32_t *restrict plane = job->code32 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint32_t)words[g];
    }
    if (job->width & 2) {
        uint16_t *restrict plane = job->code16 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint16_t)(words[g] >> below16);
    }
    if (job->width & 1) {
        uint8_t *restrict plane = job->code8 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint8_t)(words[g] >> below8);
    }
}

static void collect(const Job *job, size_t first, uint64_t *restrict words, int n) {
    const int below16 = job->width & 4 ? 32 : 0, below8 = below16 + (job->width & 2 ? 16 : 0);
    if (job->width == 8) memcpy(words, job->code32 + 2 * first, n * sizeof *words);
    if (job->width < 4) memset(words, 0, n * sizeof *words);
    if (job->width & 4) {
        const uint32_t *restrict plane = job->code32 + first;
        for (int g = 0; g < n; g++) words[g] = plane[g];
    }
    if (job->width & 2) {
        const uint16_t *restrict plane = job->code16 + first;
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)plane[g] << below16;
    }
    if (job->width & 1) {
        const uint8_t *restrict plane = job->code8 + first;
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)plane[g] << below8;
    }
}

/* ---- jobs ---- */

typedef union {
    uint8_t codes[TILE];
    uint64_t words[GROUPS];
} Codes;

static void compress_tile(const Job *job, size_t start, int n) {
    float filled[TILE], reciprocals[TILE];
    Codes codes;
    const int width = job->width, block = job->block, itemsize = job->dtype == FLOAT32 ? 4 : 2;
    const int n_blocks = (n + block - 1) / block, n_groups = n_blocks * block / GROUP;
    uint8_t *exponents = job->exponents + start / block;
    const void *values = job->values + start * itemsize;
    if (n % block) {
        memset(filled, 0, sizeof filled);
        values = memcpy(filled, values, (size_t)n * itemsize);
    }
    find_exponents(job, values, exponents, n_blocks);
    const int bias = job->is_unsigned ? 253 + width : 252 + width + (width == 2);
#define CALL(block) powers(exponents, bias, -1, reciprocals, n_blocks, block)
    FOR_BLOCK(block, CALL)
#undef CALL
    encode(job, values, reciprocals, codes.codes, n_groups * GROUP);
    clear_not_finite(exponents, codes.codes, n_blocks, block, job->is_unsigned ? 0 : 1 << (width - 1));
    if (job->is_unsigned)
        narrow(codes.words, n_groups, width, 1);
    else
        narrow(codes.words, n_groups, width, 0);
    deal(job, start / GROUP, codes.words, n_groups);
}

static void decompress_tile(const Job *job, size_t start, int n) {
    float filled[TILE], steps[TILE];
    Codes codes;
    const int width = job->width, block = job->block, itemsize = job->dtype == FLOAT32 ? 4 : 2;
    const int n_blocks = (n + block - 1) / block, n_groups = n_blocks * block / GROUP;
    const uint8_t *exponents = job->exponents + start / block;
    char *values = job->values + start * itemsize;
    collect(job, start / GROUP, codes.words, n_groups);
    if (job->is_unsigned)
        widen(codes.words, n_groups, width, 1);
    else
        widen(codes.words, n_groups, width, 0);
    const int bias = job->is_unsigned ? 1 - width : 2 - width;
#define CALL(block) powers(exponents, bias, 1, steps, n_blocks, block)
    FOR_BLOCK(block, CALL)
#undef CALL
    decode(job, codes.codes, steps, n % block ? (void *)filled : values, n_groups * GROUP);
    if (n % block) memcpy(values, filled, (size_t)n * itemsize);
}

/* Each thread runs this: takes chunks until none are left. */
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

/* One thread does all if `parallel` is null. */
void fxpipe_bfp(int decompress, void *values, void *code32, void *code16, void *code8, void *exponents, size_t numel,
                int dtype, int width, int block, int is_unsigned, int exponent_min, Parallel parallel,
                unsigned n_threads) {
    Job job = {values, code32, code16, code8, exponents, numel, dtype, width, block, is_unsigned, exponent_min, 0};
    void (*run)(void *) = decompress ? decompress_chunks : compress_chunks;
    size_t n_chunks = numel / CHUNK + 1;
    if (n_chunks < n_threads) n_threads = (unsigned)n_chunks;
    if (parallel && n_threads > 1)
        parallel(run, &job, n_threads, 0);
    else
        run(&job);
}
