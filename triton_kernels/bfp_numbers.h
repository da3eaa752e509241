/* Constants of the format, small functions of numbers, and values of each dtype. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* dtypes */
enum { GROUP = 8, TILE = 1024, GROUPS = TILE / GROUP }; /* values; a tile is a whole number of blocks of any size */
enum { RUN = 32 };                                      /* values that are handled with one factor, if blocks are so large */
enum { EVEN, FRACTION, CODEBOOK };                      /* how values become codes: see `encode` */
enum { NO_NOISE, SEEDED, HASHED };                      /* what FRACTION adds */
enum { MIDDLE, UNIFORM, DENSITY };                      /* where in a code's cell values are decoded */
enum { MAX_LEVELS = 16, MAX_OFFSETS = 8 };

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
#define ROUND_BITS 0x4B400000
#define INFINITY_BITS 0x7F800000
#define NAN_BITS 0x7FC00000
#define SIGN 0x80000000u

/* A format for values of one dtype. The fields are those of BFPFormat and Scale; native.py fills them in. */
typedef struct {
    int32_t dtype, width, block, is_unsigned, twos, magnitude_bits, grid_bits;
    int32_t coding, noise, dither;
    int32_t scale_bits, scale_base, scale_shift, scale_nan, least_scale, scale_addend, zero_scale;
    float peak_factor;
    int32_t outliers, outlier_threshold;
    int32_t clamps; /* float16 to its finite range, rather than to infinity */
    int32_t n_offsets, offsets[MAX_OFFSETS];
    int32_t n_levels, signed_levels, first_level;
    uint8_t edges[MAX_LEVELS]; /* n on the grid, from its least value, has the code of as many edges as lie below it */
    uint8_t rises[MAX_LEVELS]; /* from each level to the next */
    int16_t cells[2][2 * MAX_LEVELS]; /* the least and the greatest n of each code */
} Format;

/* Inlined where called, so that `dtype`, `block`, `run` and the like are constants in its loops. */
#define INLINE static inline __attribute__((always_inline))

#define FOR_BLOCK(block, call)                                                                                         \
    switch (block) {                                                                                                   \
    case 8: call(8); break;                                                                                            \
    case 16: call(16); break;                                                                                          \
    case 32: call(32); break;                                                                                          \
    case 64: call(64); break;                                                                                          \
    default: call(128);                                                                                                \
    }

#define FOR_DTYPE(dtype, call)                                                                                         \
    switch (dtype) {                                                                                                   \
    case FLOAT32: call(FLOAT32); break;                                                                                \
    case BFLOAT16: call(BFLOAT16); break;                                                                              \
    default: call(FLOAT16);                                                                                            \
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

INLINE float power_of_two(int exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); } /* rounded once */

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE int32_t greatest(int32_t a, int32_t b) { return a > b ? a : b; }

INLINE uint32_t bits_of_half(uint32_t half) {
    uint32_t magnitude = half & 0x7FFF;
    uint32_t normal = (magnitude << 13) + (magnitude < 0x7C00 ? 112u << 23 : 224u << 23);
    uint32_t denormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    return (magnitude < 0x400 ? denormal : normal) | (half & 0x8000) << 16;
}

INLINE uint32_t half_of_bits(uint32_t bits, int clamps) {
    uint32_t magnitude = bits & ~SIGN;
    uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* rounds to multiples of 2^-24 */
    uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
    uint32_t beyond = clamps ? 0x7BFF : 0x7C00;
    uint32_t half = magnitude > INFINITY_BITS ? 0x7E00 : magnitude >= 0x477FF000 ? beyond : finite;
    return half | (bits >> 16 & 0x8000);
}

/* The only NaN that is decoded, 0x7FC00000 of either sign, stays one. */
INLINE uint32_t bfloat16_of_bits(uint32_t bits) { return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; }

/* The bits of value i as a float32. */
INLINE uint32_t get(const void *values, int i, int dtype) {
    if (dtype == FLOAT32) return ((const uint32_t *)values)[i];
    uint32_t bits = ((const uint16_t *)values)[i];
    return dtype == BFLOAT16 ? bits << 16 : bits_of_half(bits);
}

INLINE void put(void *values, int i, float value, int dtype, int clamps) {
    if (dtype == FLOAT32)
        ((float *)values)[i] = value;
    else if (dtype == BFLOAT16)
        ((uint16_t *)values)[i] = (uint16_t)bfloat16_of_bits(bits_of(value));
    else
        ((uint16_t *)values)[i] = (uint16_t)half_of_bits(bits_of(value), clamps);
}

INLINE int itemsize_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static void to_float32(const void *values, float *restrict converted, int n, int dtype) {
#define CALL(dtype)                                                                                                    \
    for (int i = 0; i < n; i++) converted[i] = float_of(get(values, i, dtype))
    FOR_DTYPE(dtype, CALL)
#undef CALL
}

static void from_float32(const float *values, void *restrict converted, int n, int dtype, int clamps) {
#define CALL(dtype)                                                                                                    \
    for (int i = 0; i < n; i++) put(converted, i, values[i], dtype, clamps)
    FOR_DTYPE(dtype, CALL)
#undef CALL
}
