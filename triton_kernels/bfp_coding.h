/* Values <-> codes under given scales. `factors` are those of bfp_scales.h, one for each `run` of values. */

/* How `format` has its codes in bytes. */
INLINE int mode_of(const Format *format) {
    if (format->is_unsigned || format->coding == CODEBOOK) return AS_STORED;
    return format->twos ? COMPLEMENT : SIGN_MAGNITUDE;
}

/* What `reciprocal_factors` takes. One bit of magnitude doubles all: 1/step may be no normal float. */
INLINE float units_of(const Format *format) {
    const int doubles = format->coding == EVEN && format->magnitude_bits == 1;
    return power_of_two(format->grid_bits - 1 + doubles + (format->coding == FRACTION ? 8 : 0));
}

/* ---- even codes, to nearest ---- */

/* Codes plus 2^M. */
INLINE void encode_signed(const void *values, const float *restrict factors, uint8_t *restrict codes, int n,
                          int magnitude_bits, int dtype, int run) {
    const int32_t offset = 1 << magnitude_bits, twice = magnitude_bits == 1;
    const float added = (ROUND + (float)offset) * (float)(1 + twice);
    const int32_t zero = ROUND_BITS + (twice << 23), top = zero + 2 * offset - 1;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            float sum = multiply_add(float_of(get(values, r * run + i, dtype)), factors[r], added);
            codes[r * run + i] = (uint8_t)greatest(least((int32_t)bits_of(sum), top), zero + 1);
        }
}

INLINE void encode_unsigned(const void *values, const float *restrict factors, uint8_t *restrict codes, int n,
                            int magnitude_bits, int dtype, int run) {
    const int32_t top = (1 << magnitude_bits) - 1;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            uint32_t bits = get(values, r * run + i, dtype);
            float cell = multiply_add(float_of(bits), factors[r], -0.5f);
            int32_t code = (int32_t)bits_of(cell + ROUND) - (ROUND_BITS - 1);
            code = least(code, (int32_t)bits); /* as an integer, a positive float is at least any code */
            codes[r * run + i] = (uint8_t)least(greatest(code, 0), top);
        }
}

/* ---- even codes, by way of 1/256 steps and the noise ---- */

/* Sums of 16 bits, of which codes are the high bytes once noise is added. They are held to what needs no check then: the
 * greatest and the least code have no fraction, and a value that is not positive has code 0. */
INLINE void sums_unsigned(const void *values, const float *restrict factors, uint16_t *restrict sums, int n,
                          int magnitude_bits, int dtype, int run) {
    const int32_t one = ROUND_BITS + 256, top = ROUND_BITS + 256 * ((1 << magnitude_bits) - 1);
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            int32_t bits = (int32_t)get(values, r * run + i, dtype);
            int32_t sum = (int32_t)bits_of(multiply_add(float_of((uint32_t)bits & ~SIGN), factors[r], ROUND + 128.0f));
            sum = greatest(least(sum, top), one);
            sums[r * run + i] = (uint16_t)(bits > 0 ? sum : 0);
        }
}

/* Of codes plus 2^M. */
INLINE void sums_signed(const void *values, const float *restrict factors, uint16_t *restrict sums, int n,
                        int magnitude_bits, int dtype, int run) {
    const int32_t offset = 1 << magnitude_bits, zero = ROUND_BITS;
    const float added = ROUND + (float)(256 * offset);
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            float sum = multiply_add(float_of(get(values, r * run + i, dtype)), factors[r], added);
            int32_t held = greatest(least((int32_t)bits_of(sum), zero + 256 * (2 * offset - 1)), zero + 256);
            sums[r * run + i] = (uint16_t)held;
        }
}

/* Below `middle` values are negative. Of -x the code is -((n + u) >> 8) = (-n + 255 - u) >> 8, and 255 - u is u with its
 * bits flipped. */
static void add_noise(const uint16_t *restrict sums, const uint8_t *restrict noise, uint8_t *restrict codes, int n,
                      uint16_t middle) {
    for (int i = 0; i < n; i++) {
        const uint16_t flip = sums[i] < middle ? 255 : 0;
        codes[i] = (uint8_t)((uint16_t)(sums[i] + (noise[i] ^ flip)) >> 8);
    }
}

static void encode_with_noise(const Format *format, const void *values, int dtype, const float *factors,
                              const uint8_t *noise, uint8_t *codes, int n) {
    const int magnitude_bits = format->magnitude_bits, run = format->block < RUN ? 1 : RUN;
    uint16_t sums[TILE];
    if (format->is_unsigned) {
#define CALL(dtype, run) sums_unsigned(values, factors, sums, n, magnitude_bits, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    } else {
#define CALL(dtype, run) sums_signed(values, factors, sums, n, magnitude_bits, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    }
    add_noise(sums, noise, codes, n, format->is_unsigned ? 0 : (uint16_t)(256 << magnitude_bits));
}

/* ---- codebooks ---- */

/* n on the grid, from its least value; and all ones where the value is positive (unsigned) or negative (signed). */
INLINE void to_grid(const void *values, const float *restrict factors, uint8_t *restrict grid, uint8_t *restrict flags,
                    int n, int signed_levels, int is_unsigned, int dtype, int run) {
    const uint32_t kept = signed_levels ? ~0u : ~SIGN, flip = is_unsigned ? 0 : SIGN;
    const int32_t lowest = signed_levels ? ROUND_BITS - 127 : ROUND_BITS;
    const int32_t top = lowest + (signed_levels ? 254 : 255);
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            uint32_t bits = get(values, r * run + i, dtype);
            float sum = multiply_add(float_of(bits & kept), factors[r], ROUND);
            grid[r * run + i] = (uint8_t)(greatest(least((int32_t)bits_of(sum), top), lowest) - lowest);
            flags[r * run + i] = (uint8_t)((int32_t)(bits ^ flip) > 0 ? 255 : 0);
        }
}

#define FOR_LEVELS(n_levels, call)                                                                                     \
    switch (n_levels) {                                                                                                \
    case 2: call(2); break;                                                                                            \
    case 4: call(4); break;                                                                                            \
    case 8: call(8); break;                                                                                            \
    default: call(16);                                                                                                 \
    }

INLINE void codes_of_grid(uint8_t *restrict grid, int n, const uint8_t *edges, int n_levels) {
    uint8_t edge[MAX_LEVELS];
    memcpy(edge, edges, sizeof edge);
    for (int i = 0; i < n; i++) {
        uint8_t code = 0;
        for (int k = 0; k < n_levels - 1; k++) code += grid[i] > edge[k];
        grid[i] = code;
    }
}

/* Places of levels -> stored codes. */
static void flag_codes(const Format *format, uint8_t *restrict codes, const uint8_t *restrict flags, int n) {
    const uint8_t sign = (uint8_t)(1 << format->magnitude_bits), least_signed = format->first_level > 0 ? 0 : 1;
    if (format->signed_levels) return;
    if (format->is_unsigned)
        for (int i = 0; i < n; i++) codes[i] = flags[i] & (codes[i] > 0 ? codes[i] : 1);
    else
        for (int i = 0; i < n; i++) codes[i] |= codes[i] >= least_signed ? flags[i] & sign : 0;
}

static void encode_codebook(const Format *format, const void *values, int dtype, const float *factors,
                            uint8_t *restrict codes, int n) {
    const int run = format->block < RUN ? 1 : RUN, signed_levels = format->signed_levels;
    const int is_unsigned = format->is_unsigned;
    uint8_t flags[TILE];
#define CALL(dtype, run) to_grid(values, factors, codes, flags, n, signed_levels, is_unsigned, dtype, run)
    FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
#define CALL(n_levels) codes_of_grid(codes, n, format->edges, n_levels)
    FOR_LEVELS(format->n_levels, CALL)
#undef CALL
    flag_codes(format, codes, flags, n);
}

INLINE void levels_of_places(uint8_t *restrict places, int n, uint8_t first, const uint8_t *rises, int n_levels) {
    uint8_t rise[MAX_LEVELS]; /* by themselves, so that they stay in registers */
    memcpy(rise, rises, sizeof rise);
    for (int i = 0; i < n; i++) {
        uint8_t place = places[i] & (n_levels - 1), level = first;
        for (int k = 0; k < n_levels - 1; k++) level += (uint8_t)(-(place > k) & rise[k]);
        places[i] = level;
    }
}

/* The level of each stored code, with its sign. */
static void levels_of_codes(const Format *format, const uint8_t *codes, int16_t *restrict levels, int n) {
    const uint8_t top = (uint8_t)((1 << format->magnitude_bits) - 1); /* of codes without a sign, if they have one */
    uint8_t bytes[TILE];
    memcpy(bytes, codes, n);
#define CALL(n_levels) levels_of_places(bytes, n, (uint8_t)format->first_level, format->rises, n_levels)
    FOR_LEVELS(format->n_levels, CALL)
#undef CALL
    if (format->signed_levels)
        for (int i = 0; i < n; i++) levels[i] = (int8_t)bytes[i];
    else
        for (int i = 0; i < n; i++) {
            const int16_t sign = codes[i] > top ? -1 : 0;
            levels[i] = (int16_t)((bytes[i] ^ sign) - sign);
        }
}

/* ---- all codes ---- */

/* `noise`: a byte a value, for FRACTION. */
static void encode(const Format *format, const void *values, int dtype, const float *factors, const uint8_t *noise,
                   uint8_t *codes, int n) {
    const int magnitude_bits = format->magnitude_bits, run = format->block < RUN ? 1 : RUN;
    if (format->coding == CODEBOOK) {
        encode_codebook(format, values, dtype, factors, codes, n);
    } else if (format->coding == FRACTION) {
        encode_with_noise(format, values, dtype, factors, noise, codes, n);
    } else if (format->is_unsigned) {
#define CALL(dtype, run) encode_unsigned(values, factors, codes, n, magnitude_bits, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    } else {
#define CALL(dtype, run) encode_signed(values, factors, codes, n, magnitude_bits, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    }
}

INLINE void decode_signed(const uint8_t *codes, const float *restrict factors, void *values, int n, int magnitude_bits,
                          int clamps, int dtype, int run) {
    const int32_t offset = 1 << magnitude_bits;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++)
            put(values, r * run + i, (float)((int32_t)codes[r * run + i] - offset) * factors[r], dtype, clamps);
}

INLINE void decode_unsigned(const uint8_t *codes, const float *restrict factors, void *values, int n, int clamps,
                            int dtype, int run) {
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            float level = (float)(int32_t)codes[r * run + i] - 0.5f;
            put(values, r * run + i, (level < 0.0f ? 0.0f : level) * factors[r], dtype, clamps);
        }
}

INLINE void decode_levels(const int16_t *levels, const float *restrict factors, void *values, int n, int clamps,
                          int dtype, int run) {
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++)
            put(values, r * run + i, (float)(int32_t)levels[r * run + i] * factors[r], dtype, clamps);
}

/* Of codes as `mode_of` has them, to the middle of their cells. */
static void decode(const Format *format, const uint8_t *codes, const float *factors, void *values, int dtype, int n) {
    const int magnitude_bits = format->magnitude_bits, clamps = format->clamps, run = format->block < RUN ? 1 : RUN;
    if (format->coding == CODEBOOK) {
        int16_t levels[TILE];
        levels_of_codes(format, codes, levels, n);
#define CALL(dtype, run) decode_levels(levels, factors, values, n, clamps, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    } else if (format->is_unsigned) {
#define CALL(dtype, run) decode_unsigned(codes, factors, values, n, clamps, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    } else {
#define CALL(dtype, run) decode_signed(codes, factors, values, n, magnitude_bits, clamps, dtype, run)
        FOR_DTYPE_AND_RUN(dtype, run, CALL)
#undef CALL
    }
}
