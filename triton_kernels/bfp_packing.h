/* Codes, one a byte and eight in a word, <-> the bits of a group in planes of 4, 2 and 1 bytes. */

/* What the codes in bytes are: as stored; q + 2^M, stored as sign and magnitude; or the same, stored modulo 2^W. */
enum { AS_STORED, SIGN_MAGNITUDE, COMPLEMENT };

#define FOR_MODE(mode, call)                                                                                           \
    switch (mode) {                                                                                                    \
    case AS_STORED: call(AS_STORED); break;                                                                            \
    case SIGN_MAGNITUDE: call(SIGN_MAGNITUDE); break;                                                                  \
    default: call(COMPLEMENT);                                                                                         \
    }

#define EACH_BYTE 0x0101010101010101u

typedef struct {
    uint32_t *code32; /* null where the width has none */
    uint16_t *code16;
    uint8_t *code8;
    int width;
} Planes;

typedef union {
    _Alignas(64) uint8_t codes[TILE];
    uint64_t words[GROUPS];
} Codes;

/* `signs`: a code's top bit, wherever there is a code. */
INLINE uint64_t to_stored(uint64_t word, uint64_t signs, int width, int mode) {
    if (mode == AS_STORED) return word;
    if (mode == COMPLEMENT) return word ^ signs;
    uint64_t negative = (word & signs) ^ signs, ones = negative >> (width - 1);
    return (((word ^ (negative - ones)) & ~signs) + ones) | negative;
}

/* The inverse. Minus zero becomes zero. */
INLINE uint64_t from_stored(uint64_t word, uint64_t signs, int width, int mode) {
    if (mode == AS_STORED) return word;
    if (mode == COMPLEMENT) return word ^ signs;
    uint64_t negative = word & signs, ones = negative >> (width - 1);
    return ((word & ~signs) ^ (negative - ones)) + ones + (negative ^ signs);
}

static void all_to_stored(uint64_t *restrict words, int n, int width, int mode) {
    const uint64_t signs = EACH_BYTE << (width - 1);
#define CALL(mode)                                                                                                     \
    for (int g = 0; g < n; g++) words[g] = to_stored(words[g], signs, width, mode)
    FOR_MODE(mode, CALL)
#undef CALL
}

static void all_from_stored(uint64_t *restrict words, int n, int width, int mode) {
    const uint64_t signs = EACH_BYTE << (width - 1);
#define CALL(mode)                                                                                                     \
    for (int g = 0; g < n; g++) words[g] = from_stored(words[g], signs, width, mode)
    FOR_MODE(mode, CALL)
#undef CALL
}

/* Fields of one code, two and four move down to their neighbours below. */
INLINE void narrow(uint64_t *restrict words, int n, int width, int mode) {
    const int gap = 8 - width;
    const uint64_t signs = EACH_BYTE << (width - 1);
    const uint64_t one = 0x0001000100010001u * ((1u << width) - 1);
    const uint64_t two = 0x0000000100000001u * ((1u << 2 * width) - 1);
    const uint64_t four = ((uint64_t)1 << 4 * width) - 1;
    for (int g = 0; g < n; g++) {
        uint64_t word = to_stored(words[g], signs, width, mode);
        word = (word & one) | (word >> gap & one << width);
        word = (word & two) | (word >> 2 * gap & two << 2 * width);
        words[g] = (word & four) | (word >> 4 * gap & four << 4 * width);
    }
}

INLINE void widen(uint64_t *restrict words, int n, int width, int mode) {
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
        words[g] = from_stored(word, signs, width, mode);
    }
}

/* The low bytes of each word go to the planes. */
static void deal(const Planes *planes, size_t first, const uint64_t *restrict words, int n) {
    const int below16 = planes->width & 4 ? 32 : 0, below8 = below16 + (planes->width & 2 ? 16 : 0);
    if (planes->width == 8) memcpy(planes->code32 + 2 * first, words, n * sizeof *words);
    if (planes->width & 4) {
        uint32_t *restrict plane = planes->code32 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint32_t)words[g];
    }
    if (planes->width & 2) {
        uint16_t *restrict plane = planes->code16 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint16_t)(words[g] >> below16);
    }
    if (planes->width & 1) {
        uint8_t *restrict plane = planes->code8 + first;
        for (int g = 0; g < n; g++) plane[g] = (uint8_t)(words[g] >> below8);
    }
}

static void collect(const Planes *planes, size_t first, uint64_t *restrict words, int n) {
    const int below16 = planes->width & 4 ? 32 : 0, below8 = below16 + (planes->width & 2 ? 16 : 0);
    if (planes->width == 8) memcpy(words, planes->code32 + 2 * first, n * sizeof *words);
    if (planes->width < 4) memset(words, 0, n * sizeof *words);
    if (planes->width & 4) {
        const uint32_t *restrict plane = planes->code32 + first;
        for (int g = 0; g < n; g++) words[g] = plane[g];
    }
    if (planes->width & 2) {
        const uint16_t *restrict plane = planes->code16 + first;
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)plane[g] << below16;
    }
    if (planes->width & 1) {
        const uint8_t *restrict plane = planes->code8 + first;
        for (int g = 0; g < n; g++) words[g] |= (uint64_t)plane[g] << below8;
    }
}

/* ---- codes of 4 bits: two in a byte, and the rest in fewer words ---- */

#define EACH_NIBBLE 0x11111111u

INLINE void pack_nibbles(uint32_t *restrict plane, const uint8_t *codes, int n, int mode) {
    const uint16_t *pairs = (const uint16_t *)codes;
    uint32_t words[GROUPS];
    uint8_t *restrict bytes = (uint8_t *)words;
    for (int i = 0; i < 4 * n; i++) bytes[i] = (uint8_t)(pairs[i] | pairs[i] >> 4);
    for (int g = 0; g < n; g++) plane[g] = (uint32_t)to_stored(words[g], EACH_NIBBLE << 3, 4, mode);
}

INLINE void unpack_nibbles(const uint32_t *plane, uint8_t *restrict codes, int n, int mode) {
    uint16_t *restrict pairs = (uint16_t *)codes;
    uint32_t words[GROUPS];
    const uint8_t *bytes = (const uint8_t *)words;
    for (int g = 0; g < n; g++) words[g] = (uint32_t)from_stored(plane[g], EACH_NIBBLE << 3, 4, mode);
    for (int i = 0; i < 4 * n; i++) pairs[i] = (uint16_t)((bytes[i] | bytes[i] << 4) & 0x0F0F);
}

/* ---- all codes ---- */

static void pack(const Planes *planes, size_t first, Codes *codes, int n, int mode) {
    const int width = planes->width;
    if (width == 4) {
#define CALL(mode) pack_nibbles(planes->code32 + first, codes->codes, n, mode)
        FOR_MODE(mode, CALL)
#undef CALL
        return;
    }
#define CALL(mode) narrow(codes->words, n, width, mode)
    FOR_MODE(mode, CALL)
#undef CALL
    deal(planes, first, codes->words, n);
}

static void unpack(const Planes *planes, size_t first, Codes *codes, int n, int mode) {
    const int width = planes->width;
    if (width == 4) {
#define CALL(mode) unpack_nibbles(planes->code32 + first, codes->codes, n, mode)
        FOR_MODE(mode, CALL)
#undef CALL
        return;
    }
    collect(planes, first, codes->words, n);
#define CALL(mode) widen(codes->words, n, width, mode)
    FOR_MODE(mode, CALL)
#undef CALL
}
