/* Random bytes, one for each value: as rounding.py defines them. */

#define WEYL 0x9E3779B9u

/* Philox2x32 with 7 rounds: eight bytes a group, of which value j has byte j. */
static void seeded_bytes(int64_t seed, size_t first_group, uint64_t *restrict words, int n_groups, int purpose) {
    const uint32_t first_high = (uint32_t)(seed >> 32) + (uint32_t)purpose;
    for (int g = 0; g < n_groups; g++) {
        uint64_t low = (uint32_t)(first_group + g), high = first_high; /* the low 32 bits of each count */
        uint32_t key = (uint32_t)seed;
        for (int round = 0; round < 7; round++) {
            uint64_t product = (low & 0xFFFFFFFFu) * 0xD256D193u;
            low = product >> 32 ^ key ^ high;
            high = product;
            key += WEYL;
        }
        words[g] = high << 32 | (low & 0xFFFFFFFFu);
    }
}

/* Of each value's bits but for its sign: the top byte of a product. */
static void hashed_bytes(const void *values, uint8_t *restrict bytes, int n, int dtype) {
#define CALL(dtype)                                                                                                    \
    for (int i = 0; i < n; i++) {                                                                                      \
        uint32_t bits = get(values, i, dtype) & ~SIGN;                                                                 \
        bytes[i] = (uint8_t)((bits ^ bits >> 15) * WEYL >> 24);                                                        \
    }
    FOR_DTYPE(dtype, CALL)
#undef CALL
}
