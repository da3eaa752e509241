/* The scales of blocks: from largest magnitudes to codes, to floats, to factors of values, and back. */

INLINE void largest32(const uint32_t *values, int32_t *restrict largests, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        int32_t largest = 0;
        for (int i = 0; i < block; i++) largest = greatest(largest, values[b * block + i] & ~SIGN);
        largests[b] = largest;
    }
}

/* Of 16-bit values, the largest are the same before and after they become float32. */
INLINE void largest16(const uint16_t *values, uint16_t *restrict largests, int n_blocks, int block) {
    for (int b = 0; b < n_blocks; b++) {
        uint16_t largest = 0;
        for (int i = 0; i < block; i++) {
            uint16_t magnitude = values[b * block + i] & 0x7FFF;
            largest = magnitude > largest ? magnitude : largest;
        }
        largests[b] = largest;
    }
}

/* The bits of the largest magnitude of each block, as a float32; a NaN's are larger than infinity's. */
static void find_largest(const void *values, int32_t *restrict largests, int n_blocks, int block, int dtype) {
    if (dtype == FLOAT32) {
#define CALL(block) largest32(values, largests, n_blocks, block)
        FOR_BLOCK(block, CALL)
#undef CALL
        return;
    }
    uint16_t halves[GROUPS];
#define CALL(block) largest16(values, halves, n_blocks, block)
    FOR_BLOCK(block, CALL)
#undef CALL
    for (int b = 0; b < n_blocks; b++)
        largests[b] = dtype == BFLOAT16 ? (uint32_t)halves[b] << 16 : bits_of_half(halves[b]);
}

/* Scale codes, by the largest magnitude of the values that count, that of all values, and the least codes there may be. */
static void first_scales(const Format *format, const int32_t *counted, const int32_t *all, const int32_t *least_codes,
                         int32_t *restrict codes, int n_blocks) {
    const int32_t shift = format->scale_shift, addend = format->scale_addend;
    const int32_t base = format->scale_base, nan = format->scale_nan, zero_scale = format->zero_scale;
    const float peak_factor = format->peak_factor;
    for (int b = 0; b < n_blocks; b++) {
        uint32_t bits = bits_of(float_of(counted[b]) * peak_factor) + addend;
        int32_t code = least(greatest((int32_t)(bits >> shift) - base, least_codes[b]), nan);
        code = all[b] >= INFINITY_BITS ? nan : code;
        codes[b] = zero_scale && all[b] == 0 ? 0 : code;
    }
}

/* Give the scale the sign of the block's largest value: minus if -x is larger than any x. */
INLINE void sign_of_blocks(const uint32_t *values, int32_t *restrict codes, int n_blocks, int32_t nan, int block) {
    for (int b = 0; b < n_blocks; b++) {
        int32_t positive = 0;
        uint32_t negative = SIGN;
        for (int i = 0; i < block; i++) positive = greatest(positive, (int32_t)values[b * block + i]);
        for (int i = 0; i < block; i++) negative = values[b * block + i] > negative ? values[b * block + i] : negative;
        codes[b] |= codes[b] != nan && (uint32_t)positive < negative - SIGN ? nan + 1 : 0;
    }
}

static void sign_scales(const Format *format, const uint32_t *values, int32_t *codes, int n_blocks) {
#define CALL(block) sign_of_blocks(values, codes, n_blocks, format->scale_nan, block)
    FOR_BLOCK(format->block, CALL)
#undef CALL
}

/* The code `offset` from `first`, within the range, of the same sign; NaN and the scale of zeros stay. */
INLINE int32_t candidate(const Format *format, int32_t first, int32_t offset, int32_t least_code) {
    const int32_t nan = format->scale_nan, magnitude = first & nan;
    int32_t code = greatest(greatest(least(magnitude + offset, nan - 1), format->least_scale), least_code);
    return magnitude == nan || magnitude == 0 ? first : code + (first - magnitude);
}

/* S as a float32, of a code's sign. */
INLINE float scale_of(const Format *format, int32_t code) {
    const int32_t magnitude = code & format->scale_nan;
    uint32_t bits = (uint32_t)(magnitude + format->scale_base) << format->scale_shift;
    bits = format->zero_scale && magnitude == 0 ? 0 : bits;
    bits |= code > magnitude ? SIGN : 0;
    return float_of(magnitude == format->scale_nan ? NAN_BITS : bits);
}

INLINE int32_t exponent_of(const Format *format, int32_t code) {
    return ((code & format->scale_nan) + format->scale_base) >> (23 - format->scale_shift);
}

/* S squared, in units that depend on the code `unit` alone, the least of those to be compared. */
INLINE uint64_t squared_scale(const Format *format, int32_t code, int32_t unit) {
    const int32_t one = 1 << (23 - format->scale_shift);
    const uint64_t mantissa = one + (((code & format->scale_nan) + format->scale_base) & (one - 1));
    return mantissa * mantissa << 2 * (exponent_of(format, code) - exponent_of(format, unit));
}

/* One factor a block -> one a run, or one a value in small blocks. */
INLINE void spread(const float *of_blocks, float *restrict factors, int n_blocks, int block) {
    const int copies = block < RUN ? block : block / RUN;
    for (int b = 0; b < n_blocks; b++)
        for (int i = 0; i < copies; i++) factors[b * copies + i] = of_blocks[b];
}

/* fl(1/S) * units, which a power of two keeps a normal number: values times it are in steps, for steps S / units. */
static void reciprocal_factors(const Format *format, const int32_t *codes, float units, float *restrict factors,
                               int n_blocks) {
    float of_blocks[GROUPS];
    for (int b = 0; b < n_blocks; b++) {
        float scale = scale_of(format, codes[b]);
        of_blocks[b] = units / (scale == 0.0f ? 1.0f : scale); /* a block of zeros has any */
    }
#define CALL(block) spread(of_blocks, factors, n_blocks, block)
    FOR_BLOCK(format->block, CALL)
#undef CALL
}

/* Steps: what decoded integers are multiplied by. */
static void step_factors(const Format *format, const int32_t *codes, float *restrict factors, int n_blocks) {
    const float step = power_of_two(1 - format->grid_bits);
    float of_blocks[GROUPS];
    for (int b = 0; b < n_blocks; b++) of_blocks[b] = scale_of(format, codes[b]) * step;
#define CALL(block) spread(of_blocks, factors, n_blocks, block)
    FOR_BLOCK(format->block, CALL)
#undef CALL
}

/* `first` is a block. Scales of fewer than 8 bits are packed like codes, the last group filled up with zeros. */
static void store_scales(const Planes *planes, size_t first, const int32_t *codes, int n_blocks) {
    if (planes->width == 8) {
        uint8_t *restrict plane = planes->code8 + first;
        for (int b = 0; b < n_blocks; b++) plane[b] = (uint8_t)codes[b];
        return;
    }
    Codes bytes = {{0}};
    for (int b = 0; b < n_blocks; b++) bytes.codes[b] = (uint8_t)codes[b];
    pack(planes, first / GROUP, &bytes, (n_blocks + GROUP - 1) / GROUP, AS_STORED);
}

static void load_scales(const Planes *planes, size_t first, int32_t *restrict codes, int n_blocks) {
    if (planes->width == 8) {
        const uint8_t *restrict plane = planes->code8 + first;
        for (int b = 0; b < n_blocks; b++) codes[b] = plane[b];
        return;
    }
    Codes bytes;
    unpack(planes, first / GROUP, &bytes, (n_blocks + GROUP - 1) / GROUP, AS_STORED);
    for (int b = 0; b < n_blocks; b++) codes[b] = bytes.codes[b];
}
