/* The largest values of each block, kept apart: as outliers.py defines them. */

enum { OUTLIER_BIAS = 2, MAX_FIELD = 15, KEY_BITS = 7, MAX_BLOCK = 128 };

/* Of all blocks of a tile, `outliers` each, largest first. */
typedef struct {
    int32_t rounded[TILE]; /* the exponent above M + X bits of mantissa; 0 where not chosen */
    uint8_t index[TILE], negative[TILE];
} Outliers;

INLINE int index_bits_of(const Format *format) { return __builtin_ctz((unsigned)format->block); }

INLINE int extra_bits_of(const Format *format) { return 12 - index_bits_of(format); }

/* The bits of a magnitude without the lowest `drop`, to nearest even, finite ones below infinity. */
INLINE int32_t rounded_bits(uint32_t bits, int drop) {
    uint32_t rounded = (bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
    return least((int32_t)rounded, (INFINITY_BITS >> drop) - 1);
}

/* The indices of the largest values of a block. Leaves 0 in place of their magnitudes. */
static void take_largest(const Format *format, int32_t *restrict magnitudes, uint8_t *restrict index) {
    const int32_t low = (1 << KEY_BITS) - 1;
    int32_t keys[MAX_BLOCK];
    for (int i = 0; i < format->block; i++) keys[i] = (magnitudes[i] & ~low) | (low - i);
    for (int k = 0; k < format->outliers; k++) {
        int32_t largest = -1;
        for (int i = 0; i < format->block; i++) largest = greatest(largest, keys[i]);
        index[k] = (uint8_t)(low - (largest & low));
        keys[index[k]] = -1;
        magnitudes[index[k]] = 0;
    }
}

/* One block. Zeros take the places of the chosen values in `counted`, ones in `chosen`. Returns what the exponent of S
   must be at least. */
static int32_t choose_of_block(const Format *format, const uint32_t *values, uint32_t *restrict counted,
                               uint8_t *restrict chosen, int32_t *restrict rounded, uint8_t *restrict index,
                               uint8_t *restrict negative) {
    const int mantissa_bits = format->magnitude_bits + extra_bits_of(format);
    int32_t magnitudes[MAX_BLOCK], rest = 0, largest = 0;
    for (int i = 0; i < format->block; i++) {
        magnitudes[i] = format->is_unsigned && (int32_t)values[i] <= 0 ? 0 : values[i] & ~SIGN;
        counted[i] = values[i];
        chosen[i] = 0;
    }
    take_largest(format, magnitudes, index);
    for (int i = 0; i < format->block; i++) rest = greatest(rest, magnitudes[i]);
    for (int k = 0; k < format->outliers; k++) {
        uint32_t bits = values[index[k]];
        int32_t magnitude = format->is_unsigned && (int32_t)bits <= 0 ? 0 : bits & ~SIGN;
        int is_chosen = !format->outlier_threshold || magnitude - (format->outlier_threshold << 23) >= rest;
        rounded[k] = is_chosen ? rounded_bits(magnitude, 23 - mantissa_bits) : 0;
        negative[k] = bits > SIGN;
        chosen[index[k]] = (uint8_t)is_chosen;
        if (is_chosen) counted[index[k]] = 0;
        largest = greatest(largest, rounded[k]);
    }
    return (largest >> mantissa_bits) + OUTLIER_BIAS - MAX_FIELD;
}

static void choose_outliers(const Format *format, const uint32_t *values, Outliers *found, uint32_t *counted,
                            uint8_t *chosen, int32_t *restrict least_codes, int n_blocks) {
    const int k = format->outliers, block = format->block, fraction_bits = 23 - format->scale_shift;
    for (int b = 0; b < n_blocks; b++) {
        int32_t exponent = choose_of_block(format, values + b * block, counted + b * block, chosen + b * block,
                                           found->rounded + b * k, found->index + b * k, found->negative + b * k);
        least_codes[b] = greatest(least_codes[b], exponent * (1 << fraction_bits) - format->scale_base);
    }
}

/* Entries, and the outliers' codes, as stored, put among `codes`. */
static void encode_outliers(const Format *format, const Outliers *found, const int32_t *scales,
                            int16_t *restrict entries, uint8_t *restrict codes, int n_blocks) {
    const int index_bits = index_bits_of(format), extra_bits = extra_bits_of(format);
    const int mantissa_bits = format->magnitude_bits + extra_bits;
    for (int b = 0; b < n_blocks; b++)
        for (int k = b * format->outliers; k < (b + 1) * format->outliers; k++) {
            int32_t rounded = found->rounded[k], mantissa = rounded & ((1 << mantissa_bits) - 1);
            int32_t field = (rounded >> mantissa_bits) - exponent_of(format, scales[b]) + OUTLIER_BIAS;
            int is_used = field >= 1 && rounded > 0 && scales[b] != format->scale_nan;
            int32_t entry = (field << extra_bits | (mantissa & ((1 << extra_bits) - 1))) << index_bits;
            entries[k] = is_used ? (int16_t)(entry | found->index[k]) : 0;
            int32_t sign = format->is_unsigned ? 0 : found->negative[k] << format->magnitude_bits;
            if (is_used) codes[b * format->block + found->index[k]] = (uint8_t)(mantissa >> extra_bits | sign);
        }
}

/* Put the outliers among the decoded `values`. `codes` are as stored. */
static void decode_outliers(const Format *format, const int16_t *entries, const int32_t *scales, const uint8_t *codes,
                            float *restrict values, int n_blocks) {
    const int index_bits = index_bits_of(format), extra_bits = extra_bits_of(format);
    const int magnitude_bits = format->magnitude_bits;
    for (int b = 0; b < n_blocks; b++)
        for (int k = b * format->outliers; k < (b + 1) * format->outliers; k++) {
            uint32_t entry = (uint16_t)entries[k], field = entry >> (extra_bits + index_bits);
            int place = b * format->block + (entry & (format->block - 1));
            uint32_t code = codes[place], top = code & ((1u << magnitude_bits) - 1);
            uint32_t mantissa = top << extra_bits | (entry >> index_bits & ((1u << extra_bits) - 1));
            uint32_t bits = (exponent_of(format, scales[b]) + field - OUTLIER_BIAS) << 23;
            bits |= mantissa << (23 - magnitude_bits - extra_bits);
            if (!format->is_unsigned && code >> magnitude_bits & 1) bits ^= SIGN;
            if (field > 0) values[place] = float_of(bits);
        }
}
