/* +dither: decoding at random in a code's cell. */

/* How far a value lies in its cell, from the end nearer to zero, in 256 parts. */
INLINE int32_t away_from_zero(uint8_t first, uint8_t second, int density) {
    return density && second & 1 && second < first ? second : first;
}

/* In steps, of a stored code. */
INLINE float dithered_even(const Format *format, int32_t code, uint8_t first, uint8_t second) {
    const int32_t sign = format->is_unsigned ? 0 : code >> format->magnitude_bits;
    int32_t magnitude = code & ((1 << format->magnitude_bits) - 1);
    if (format->is_unsigned && code == 0) return 0.0f;
    if (sign && format->twos) magnitude = (1 << format->width) - code;
    const int32_t away = magnitude > 0 ? away_from_zero(first, second, format->dither == DENSITY) : first;
    const float end = (float)magnitude - (format->is_unsigned ? 1.0f : 0.5f);
    const float steps = end + ((float)away + 0.5f) / 256.0f;
    return sign ? -steps : steps;
}

INLINE float dithered_level(const Format *format, int32_t code, int32_t level, uint8_t first, uint8_t second) {
    const int32_t place = code & (format->n_levels - 1), away = away_from_zero(first, second, format->dither == DENSITY);
    const int32_t nearer = format->cells[0][place], farther = format->cells[1][place];
    const int32_t part = away * (farther - nearer + 1) >> 8;
    if (level == 0) return 0.0f;
    if (format->signed_levels) return (float)(level > 0 ? nearer + part : farther - part);
    return (float)(level > 0 ? nearer + part : -(nearer + part));
}

/* Of codes as stored, of the groups from `first_group` on. */
static void decode_dithered(const Format *format, int64_t seed, size_t first_group, const uint8_t *codes,
                            const float *factors, float *restrict values, int n) {
    const int run = format->block < RUN ? 1 : RUN;
    Codes first, second;
    int16_t levels[TILE];
    seeded_bytes(seed, first_group, first.words, n / GROUP, 1);
    if (format->dither == DENSITY) seeded_bytes(seed, first_group, second.words, n / GROUP, 2);
    if (format->coding == CODEBOOK) levels_of_codes(format, codes, levels, n);
    for (int i = 0; i < n; i++) {
        uint8_t other = format->dither == DENSITY ? second.codes[i] : 0;
        float steps = format->coding == CODEBOOK ? dithered_level(format, codes[i], levels[i], first.codes[i], other)
                                                 : dithered_even(format, codes[i], first.codes[i], other);
        values[i] = steps * factors[i / run];
    }
}
