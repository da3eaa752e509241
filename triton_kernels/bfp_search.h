/* +search: the scale of least squared error among a few, in integers, as BFPFormat defines it. */

enum { SEARCH_FRACTION = 16, SEARCH_LIMIT = 2047 };

/* The level of each code, as `encode` left it: in sixteenths of a step or, with a codebook, on the grid. */
static void decoded_levels(const Format *format, const uint8_t *codes, int16_t *restrict levels, int n) {
    const int16_t offset = format->is_unsigned ? 0 : (int16_t)(1 << format->magnitude_bits);
    const int16_t half = format->is_unsigned ? SEARCH_FRACTION / 2 : 0;
    if (format->coding == CODEBOOK)
        levels_of_codes(format, codes, levels, n);
    else
        for (int i = 0; i < n; i++) levels[i] = (int16_t)((codes[i] - offset) * SEARCH_FRACTION - half);
    if (format->is_unsigned || format->signed_levels) return;
    for (int i = 0; i < n; i++) levels[i] = (int16_t)(levels[i] < 0 ? -levels[i] : levels[i]);
}

/* `left_out` has the values that do not count. */
INLINE void squared_errors(const Format *format, const uint32_t *values, const float *restrict factors,
                           const int16_t *restrict levels, const uint8_t *restrict left_out, uint32_t *restrict errors,
                           int n, int run) {
    const uint32_t kept = format->signed_levels ? ~0u : ~SIGN;
    const int32_t limit = format->coding != CODEBOOK ? 1 << 14 : format->signed_levels ? 255 : 511;
    const int32_t low = ROUND_BITS - limit, high = ROUND_BITS + limit, is_unsigned = format->is_unsigned;
    for (int r = 0; r < n / run; r++)
        for (int i = 0; i < run; i++) {
            const uint32_t bits = values[r * run + i];
            int32_t place = (int32_t)bits_of(multiply_add(float_of(bits & kept), factors[r], ROUND));
            int32_t error = greatest(least(place, high), low) - ROUND_BITS - levels[r * run + i];
            error = least(error < 0 ? -error : error, SEARCH_LIMIT);
            error = left_out[r * run + i] | (is_unsigned & ((int32_t)bits <= 0)) ? 0 : error;
            errors[r * run + i] = (uint32_t)(error * error);
        }
}

INLINE void sums_of_blocks(const uint32_t *restrict errors, uint32_t *restrict sums, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        uint32_t sum = 0;
        for (int i = 0; i < block; i++) sum += errors[b * block + i];
        sums[b] = sum;
    }
}

static void sum_errors(const Format *format, const uint32_t *values, const float *factors, const uint8_t *codes,
                       const uint8_t *left_out, uint32_t *sums, int n_blocks) {
    const int n = n_blocks * format->block;
    int16_t levels[TILE];
    uint32_t errors[TILE];
    decoded_levels(format, codes, levels, n);
    if (format->block < RUN)
        squared_errors(format, values, factors, levels, left_out, errors, n, 1);
    else
        squared_errors(format, values, factors, levels, left_out, errors, n, RUN);
#define CALL(block) sums_of_blocks(errors, sums, n_blocks, block)
    FOR_BLOCK(format->block, CALL)
#undef CALL
}

/* The best codes and scales; `scales` has the first ones. */
static void search(const Format *format, const float *values, const uint8_t *left_out, const int32_t *least_codes,
                   int32_t *restrict scales, uint8_t *restrict codes, int n_blocks) {
    const int block = format->block, n = n_blocks * block;
    const float units = power_of_two(format->grid_bits - 1) * (format->coding == CODEBOOK ? 1 : SEARCH_FRACTION);
    int32_t first[GROUPS], tried[GROUPS], unit[GROUPS], lowest = 0;
    uint64_t best[GROUPS];
    uint32_t sums[GROUPS];
    float factors[TILE];
    uint8_t tried_codes[TILE];
    for (int o = 0; o < format->n_offsets; o++) lowest = least(lowest, format->offsets[o]);
    for (int b = 0; b < n_blocks; b++) {
        first[b] = scales[b];
        unit[b] = candidate(format, first[b], lowest, least_codes[b]);
    }
    for (int o = 0; o < format->n_offsets; o++) {
        for (int b = 0; b < n_blocks; b++) tried[b] = candidate(format, first[b], format->offsets[o], least_codes[b]);
        reciprocal_factors(format, tried, units_of(format), factors, n_blocks);
        encode(format, values, FLOAT32, factors, 0, tried_codes, n);
        reciprocal_factors(format, tried, units, factors, n_blocks);
        sum_errors(format, (const uint32_t *)values, factors, tried_codes, left_out, sums, n_blocks);
        for (int b = 0; b < n_blocks; b++) {
            uint64_t error = sums[b] * squared_scale(format, tried[b], unit[b]);
            if (o > 0 && error >= best[b]) continue;
            best[b] = error;
            scales[b] = tried[b];
            memcpy(codes + b * block, tried_codes + b * block, block);
        }
    }
}
