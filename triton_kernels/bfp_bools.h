/* Booleans, one a byte that is 0 or 1 <-> eight a byte: value j of eight is bit j. */

INLINE uint8_t packed_bools(const uint8_t *values) {
    uint64_t word;
    memcpy(&word, values, sizeof word);
    return (uint8_t)(word * 0x0102040810204080u >> 56); /* the product's top byte gathers the eight low bits */
}

/* `start` is a multiple of 8; the last byte is filled up with zeros. */
static void pack_bools(const uint8_t *values, uint8_t *restrict packed, size_t start, int n) {
    uint8_t last[GROUP] = {0};
    const uint8_t *tile = values + start;
    for (int g = 0; g < n / GROUP; g++) packed[start / GROUP + g] = packed_bools(tile + g * GROUP);
    if (n % GROUP == 0) return;
    memcpy(last, tile + n / GROUP * GROUP, n % GROUP);
    packed[start / GROUP + n / GROUP] = packed_bools(last);
}

static void unpack_bools(uint8_t *restrict values, const uint8_t *packed, size_t start, int n) {
    uint64_t words[GROUPS];
    for (int g = 0; g < (n + GROUP - 1) / GROUP; g++) {
        uint64_t bits = packed[start / GROUP + g] * EACH_BYTE & 0x8040201008040201u; /* bit j of byte j */
        words[g] = (bits + 0x7F7F7F7F7F7F7F7Fu) >> 7 & EACH_BYTE;
    }
    memcpy(values + start, words, n);
}
