/* +search: the scale of least squared error among a few, in integers, as BFPFormat defines it. */

enum { SEARCH_FRACTION = 16, SEARCH_LIMIT = 2047 };

/* The level of each code, as `encode` left it: in sixteenths of a step or, with a codebook, on the grid. */
static void decoded_levels(const Format *format, const uint8_t *codes, int16_t *restrict levels, int n) {
    const int offset = format->is_unsigned ? 0 : 1 << format->magnitude_bits;
    if (format->coding == CODEBOOK) {
        levels_of_codes(format, codes, levels, n);
        for (int i = 0; i < n && !format->signed_levels; i++) levels[i] = levels[i] < 0 ? -levels[i] : levels[i];
        return;
    }
    for (int i = 0; i < n; i++) {
        int steps = codes[i] < offset ? offset - codes[i] : codes[i] - offset;
        levels[i] = (int16_t)(steps * SEARCH_FRACTION - (format->is_unsigned ? SEARCH_FRACTION / 2 : 0));
    }
}

/* Squared errors, summed over each block. `left_out` says which values do not count. */
static void sum_errors(const Format *format, const uint32_t *values, const float *restrict factors,
                       const int16_t *restrict levels, const uint8_t *restrict left_out, uint32_t *restrict sums,
                       int n_blocks) {
    const uint32_t kept = format->signed_levels ? ~0u : ~SIGN;
    const int32_t limit = format->coding != CODEBOOK ? 1 << 14 : format->signed_levels ? 255 : 511;
    const int block = format->block, run = block < RUN ? 1 : RUN, is_unsigned = format->is_unsigned;
    for (int b = 0; b < n_blocks; b++) {
        uint32_t sum = 0;
        for (int j = 0; j < block; j++) {
            const int i = b * block + j;
            float n = multiply_add(float_of(values[i] & kept), factors[i / run], ROUND);
            int32_t place = greatest(least((int32_t)bits_of(n) - ROUND_BITS, limit), -limit);
            int32_t error = place - levels[i];
            error = least(error < 0 ? -error : error, SEARCH_LIMIT);
            if (left_out[i] || (is_unsigned && (int32_t)values[i] <= 0)) error = 0;
            sum += (uint32_t)(error * error);
        }
        sums[b] = sum;
    }
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
    int16_t levels[TILE];
    for (int o = 0; o < format->n_offsets; o++) lowest = least(lowest, format->offsets[o]);
    for (int b = 0; b < n_blocks; b++) {
        first[b] = scales[b];
        unit[b] = candidate(format, first[b], lowest, least_codes[b]);
    }
    for (int o = 0; o < format->n_offsets; o++) {
        for (int b = 0; b < n_blocks; b++) tried[b] = candidate(format, first[b], format->offsets[o], least_codes[b]);
        reciprocal_factors(format, tried, units_of(format), factors, n_blocks);
        encode(format, values, FLOAT32, factors, 0, tried_codes, n);
        decoded_levels(format, tried_codes, levels, n);
        reciprocal_factors(format, tried, units, factors, n_blocks);
        sum_errors(format, (const uint32_t *)values, factors, levels, left_out, sums, n_blocks);
        for (int b = 0; b < n_blocks; b++) {
            uint64_t error = sums[b] * squared_scale(format, tried[b], unit[b]);
            if (o > 0 && error >= best[b]) continue;
            best[b] = error;
            scales[b] = tried[b];
            memcpy(codes + b * block, tried_codes + b * block, block);
        }
    }
}
