/* Random bytes, one for each value: as rounding.py defines them. */

#define WEYL 0x9E3779B9u

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
#define PRODUCT(a, b) ((Lanes)_mm512_mul_epu32((__m512i)(a), (__m512i)(b))) /* of the low halves of each lane */
#else
typedef uint64_t Lanes __attribute__((vector_size(32)));
#if defined(__AVX2__)
#define PRODUCT(a, b) ((Lanes)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#else
#define PRODUCT(a, b) (((a) & 0xFFFFFFFFu) * (b))
#endif
#endif

enum { LANES = sizeof(Lanes) / sizeof(uint64_t), STATES = 2 }; /* two vectors at a time hide how long a product takes */

/* Philox2x32 with 7 rounds: eight bytes a group, of which value j has byte j. Of `words` all that a tile has may be written.
 * Only the low halves of lanes count until the end. */
static void seeded_bytes(int64_t seed, size_t first_group, uint64_t *words, int n_groups, int purpose) {
    const Lanes multiplier = (Lanes){0} + 0xD256D193u;
    const Lanes first_high = (Lanes){0} + ((uint32_t)(seed >> 32) + (uint32_t)purpose);
    Lanes count;
    for (int lane = 0; lane < LANES; lane++) count[lane] = first_group + (size_t)lane;
    for (int g = 0; g < n_groups; g += STATES * LANES, count += STATES * LANES) {
        Lanes low[STATES] = {count, count + LANES}, high[STATES] = {first_high, first_high};
        uint32_t key = (uint32_t)seed;
        for (int round = 0; round < 7; round++, key += WEYL)
            for (int i = 0; i < STATES; i++) {
                Lanes product = PRODUCT(low[i], multiplier);
                low[i] = product >> 32 ^ key ^ high[i];
                high[i] = product;
            }
        for (int i = 0; i < STATES; i++) low[i] = high[i] << 32 | (low[i] & 0xFFFFFFFFu);
        memcpy(words + g, low, sizeof low);
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
