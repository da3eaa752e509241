"""The codec on tiles in registers: float bits in, packed words out, and back. The kernels add the memory around it.

A tile of N groups of 8 values is two tensors [N, 4] of float32 bits (int32), ``a`` and ``b``:

    float32          a holds values 0 1 2 3 of each group, b holds 4 5 6 7     (as 128-bit loads deliver them)
    16-bit dtypes    a holds values 0 2 4 6 of each group, b holds 1 3 5 7     (the halves of 32-bit words)

Its codes are two words [N] (uint32), ``low`` and ``high``: 8 fields in ``low`` for widths to 4, else 4 fields in each.
What a function has to know of a format is its ``Codec`` C, a compile-time argument; see ``codec``.

* Scaling and rounding are one multiply-add: adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves
  it in the low bits of the sum. The offset 2^M that keeps signed codes positive is in the same constant.
* Other roundings add a byte to 256 times as much, two values in a word at a time, and shift it out; below zero the byte
  is turned around, which rounds as if the value were positive.
* Codes are packed by shifts and adds without masks: what the constants add up to is subtracted once a word.
* Sign and magnitude are made, and taken apart again, for all the fields of a word at once.
* Decoding leaves a field where it lies in its word: in the mantissa of 2^23 it is a float, a power of two too large.

Every step is exact or rounds once, as in ``reference``, whether or not the compiler fuses multiplies and adds.
Storage scheme: US20200210839A1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005
# (Triton knows no Python types, and no stars in tuples)

import triton
import triton.language as tl

from .block_tiles import one_by_one, run, together
from .codebook_tiles import by_polynomial, codes_on_grid, levels_of, on_grid, signs_on_grid, squeeze, values_by_table
from .field_tiles import codes_of_learned, values_by_field
from .noise_tiles import bytes_of, hashed, philox
from .outlier_tiles import in_place
from .pair_tiles import signs_of_pairs
from .scale_tiles import reciprocal, step

_SR_PURPOSE = tl.constexpr(0)
_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)
_PLACE = tl.constexpr(8388608)  # 2^23


@triton.constexpr_function
def _each_field(value: int, width: int) -> int:
    """The word that holds ``value`` in each of its fields, modulo 2^32."""
    return sum(value << (i * width) for i in range(8 if width <= 4 else 4)) % 2**32


@triton.jit
def encode_in_turn(a, b, code, seed, group, level_ptr, C: tl.constexpr):
    """As ``encode``, a group of each thread's after another, for fewer registers."""
    N: tl.constexpr = a.shape[0]
    RUN: tl.constexpr = run(N, C)
    a, b = one_by_one(tl.reshape(a, [RUN, N // RUN * 4])), one_by_one(tl.reshape(b, [RUN, N // RUN * 4]))
    code = one_by_one(tl.reshape(code, [RUN, N // RUN]))
    number = code
    if C.rounding == "sr":
        number = one_by_one(tl.reshape(group, [RUN, N // RUN]))
    lows, highs = (), ()
    for i in tl.static_range(RUN):
        x, y = tl.reshape(a[i], [N // RUN, 4]), tl.reshape(b[i], [N // RUN, 4])
        low, high = encode(x, y, _beside(code[i], x), seed, _beside(number[i], x), level_ptr, C)
        lows, highs = lows + (low,), highs + (high,)
    return tl.reshape(tl.trans(together(lows)), [N]), tl.reshape(tl.trans(together(highs)), [N])


@triton.jit
def _beside(values, bits):
    """``values`` [N], in the threads that have ``bits`` [N, 4]: else words may move to where the values are.

    Without their signs these have no sign, so that this adds nothing, as the compiler will find.
    """
    zero = ((bits & 0x7FFFFFFF) >> 31).to(values.dtype)
    return tl.max(values.expand_dims(1) + zero, axis=1)


@triton.jit
def encode(a, b, code, seed, group, level_ptr, C: tl.constexpr):
    """Words (low, high) that hold the codes of a tile, under the scale's ``code`` [N] of each group's block.

    ``high`` repeats ``low`` for widths to 4. ``seed`` (int64) and the number ``group`` [N] (uint32) are for ``sr``,
    the levels (uint8) at ``level_ptr`` for learned codebooks.
    """
    PAIRED: tl.constexpr = C.dtype != 0
    if C.learned:
        inverse = reciprocal(code, 0, C).expand_dims(1)
        u = codes_of_learned(a, inverse, level_ptr, C)
        low, high = _pack(u, codes_of_learned(b, inverse, level_ptr, C), C.width, PAIRED)
    elif C.codebook:
        low, high = _encode_codebook(a, b, code, C)
    elif C.rounding == "nearest":
        # One bit of magnitude at the greatest e8 has a reciprocal that is no normal float: all is doubled.
        DOUBLE: tl.constexpr = 1 if C.magnitude_bits == 1 else 0
        inverse = reciprocal(code, DOUBLE, C).expand_dims(1)
        low, high = _pack(_nearest(a, inverse, C), _nearest(b, inverse, C), C.width, PAIRED)
    elif C.unsigned:
        inverse = reciprocal(code, 8, C).expand_dims(1)
        u, v = _noise(a, b, seed, group, C)
        low, high = _pack(_unsigned_by_noise(a, u, inverse, C), _unsigned_by_noise(b, v, inverse, C), C.width, PAIRED)
    else:
        low, high = _encode_by_noise(a, b, code, seed, group, C)
    finite = code.expand_dims(1) != C.scale_nan
    return _finish(low, finite, C), _finish(high, finite, C)


@triton.jit
def _nearest(bits, inverse, C: tl.constexpr):
    """Codes [N, 4] (uint32) of the floats whose bits are given; signed ones plus 2^M and ``_excess``."""
    x = bits.to(tl.float32, bitcast=True)
    if C.unsigned:
        code = (tl.fma(x, inverse, -0.5) + _ROUND).to(tl.int32, bitcast=True) + (1 - _ROUND_BITS)
        code = tl.maximum(tl.minimum(code, bits), 0)  # as integers, the bits of a positive float are more than any code
        return tl.minimum(code, (1 << C.width) - 1).to(tl.uint32, bitcast=True)
    else:
        DOUBLE: tl.constexpr = 1 if C.magnitude_bits == 1 else 0
        OFFSET: tl.constexpr = (_ROUND + (1 << C.magnitude_bits)) * (1 + DOUBLE)
        code = tl.fma(x, inverse, OFFSET).to(tl.uint32, bitcast=True)
        code = tl.minimum(code - (DOUBLE << 23), _ROUND_BITS + (1 << C.width) - 1)
        return tl.maximum(code, _ROUND_BITS + 1) if _clips_below(C) else code


@triton.jit
def _unsigned_by_noise(bits, noise, inverse, C: tl.constexpr):
    """The same by way of 1/256 of a step and ``noise`` (uint32), of which the lowest byte counts."""
    n = tl.fma(bits.to(tl.float32, bitcast=True), inverse, _ROUND + 128).to(tl.int32, bitcast=True) - _ROUND_BITS
    code = (n + (noise & 255).to(tl.int32, bitcast=True)) >> 8
    code = tl.maximum(tl.minimum(tl.maximum(code, 1), bits), 0)
    if C.rounding == "trunc":  # elsewhere S is large enough
        code = tl.minimum(code, (1 << C.width) - 1)
    return code.to(tl.uint32, bitcast=True)


@triton.jit
def _noise(a, b, seed, group, C: tl.constexpr):
    """Words for each value [N, 4], of which the lowest byte counts."""
    if C.rounding == "sr":
        low, high = philox(seed, group, _SR_PURPOSE)
        return bytes_of(low, high, C.dtype != 0)
    elif C.rounding == "hash":
        return hashed(a, C.dtype == 1), hashed(b, C.dtype == 1)
    else:
        return tl.zeros(a.shape, tl.uint32), tl.zeros(b.shape, tl.uint32)


@triton.jit
def _encode_by_noise(a, b, code, seed, group, C: tl.constexpr):
    """Words of signed codes plus 2^M, by way of 1/256 of a step: 16 bits are enough for one, so that two go at a time."""
    PAIRED: tl.constexpr = C.dtype != 0
    inverse = reciprocal(code, 8, C).expand_dims(1)
    s, t = _offset_256ths(a, inverse, C), _offset_256ths(b, inverse, C)
    a_low, a_high, b_low, b_high = _halves_of_words(s, t, PAIRED)
    if C.rounding == "sr":
        u_low, u_high = philox(seed, group, _SR_PURPOSE)
        v_low, v_high = u_low >> 8, u_high >> 8
    elif C.rounding == "hash":
        u_low, u_high, v_low, v_high = _halves_of_words(hashed(a, C.dtype == 1), hashed(b, C.dtype == 1), PAIRED)
    else:
        u_low, u_high, v_low, v_high = a_low ^ a_low, a_high ^ a_high, b_low ^ b_low, b_high ^ b_high
    low = _join(_rounded_at_random(a_low, u_low, C), _rounded_at_random(b_low, v_low, C), C.width)
    high = _join(_rounded_at_random(a_high, u_high, C), _rounded_at_random(b_high, v_high, C), C.width)
    if C.width <= 4:
        low = low | (high << (4 * C.width))
        high = low
    return low, high


@triton.jit
def _offset_256ths(bits, inverse, C: tl.constexpr):
    """Values in 1/256 of a step [N, 4] (uint32), plus 256 * 2^M and what comes to nothing in the words of ``_halves``."""
    four = tl.arange(0, 4).expand_dims(0)
    upper = (four >> 1) if C.dtype == 0 else (four & 1)
    OFFSET: tl.constexpr = 1 << (C.magnitude_bits + 8)
    rest = upper * -(_ROUND_BITS >> 16)  # the upper half of _ROUND_BITS, which those of the lower half bring along
    n = tl.fma(bits.to(tl.float32, bitcast=True), inverse, (rest + (OFFSET + _ROUND)).to(tl.float32))
    n = n.to(tl.uint32, bitcast=True)
    if C.rounding == "trunc":  # elsewhere S is large enough
        n = tl.minimum(n, (rest + (_ROUND_BITS + (((1 << C.width) - 1) << 8))).to(tl.uint32))
    return n


@triton.jit
def _halves_of_words(a, b, PAIRED: tl.constexpr):
    """Words with two values each, added up: 0 and 2, 4 and 6, 1 and 3, 5 and 7."""
    four = tl.arange(0, 4).expand_dims(0)
    N: tl.constexpr = a.shape[0]
    if PAIRED:
        a_low, a_high = tl.split(tl.sum(tl.reshape(a << ((four & 1) * 16), [N, 2, 2]), axis=2))
        b_low, b_high = tl.split(tl.sum(tl.reshape(b << ((four & 1) * 16), [N, 2, 2]), axis=2))
    else:
        a_low, b_low = tl.split(tl.sum(tl.reshape(a << ((four >> 1) * 16), [N, 2, 2]), axis=1))
        a_high, b_high = tl.split(tl.sum(tl.reshape(b << ((four >> 1) * 16), [N, 2, 2]), axis=1))
    return a_low, a_high, b_low, b_high


@triton.jit
def _rounded_at_random(word, noise, C: tl.constexpr):
    """The codes from bit 8 on in each half of a word; below zero, noise is turned around."""
    negative = ((word >> (C.width + 7)) & 0x00010001) ^ 0x00010001
    return word + ((noise & 0x00FF00FF) ^ (negative * 255))


@triton.jit
def _join(even, odd, WIDTH: tl.constexpr):
    """Four codes side by side, of which 0 and 2, 1 and 3 come from bit 8 on in the halves of a word."""
    FIELDS: tl.constexpr = ((1 << WIDTH) - 1) * 0x00010001
    pairs = ((even >> 8) & FIELDS) | ((odd >> (8 - WIDTH)) & (FIELDS << WIDTH))
    return pairs if WIDTH == 8 else (pairs & 0xFFFF) | ((pairs >> 16) << (2 * WIDTH))


@triton.constexpr_function
def _excess(C) -> int:
    """What the constants in the codes of a word add up to."""
    if C.codebook:
        return _each_field(0x4B400000, C.width) if C.polynomial and not C.unsigned else 0
    return 0 if C.unsigned or C.rounding != "nearest" else _each_field(0x4B400000, C.width)


@triton.constexpr_function
def _may_clip(C) -> bool:
    """Whether a value may come to -2^M steps."""
    return C.rounding in ("nearest", "trunc") and not _clips_below(C)


@triton.constexpr_function
def _clips_below(C) -> bool:
    """Whether a value may come to less than that, and is clipped one by one."""
    return in_place(C) or len(C.search) > 0


@triton.jit
def _encode_codebook(a, b, code, C: tl.constexpr):
    inverse = reciprocal(code, 0, C).expand_dims(1)
    if len(C.polynomial) > 0:
        SIGNED: tl.constexpr = not C.unsigned and not C.scale_signed
        PAIRS: tl.constexpr = SIGNED and C.packs and C.dtype == 1
        u, v = by_polynomial(a, inverse, C), by_polynomial(b, inverse, C)
        if PAIRS:
            low_signs, high_signs = signs_of_pairs(((a >> 16) & 0xFFFF) | b, C)
            low, high = _pack(u, v, C.width, True)
            low, high = low + low_signs, high + high_signs
        else:
            if SIGNED:
                u, v = _with_sign_bit(u, a, C), _with_sign_bit(v, b, C)
            low, high = _pack(u, v, C.width, C.dtype != 0)
    else:
        low, high = on_grid(a, b, inverse, C)
        low_signs, high_signs = low, high
        if not C.unsigned and not C.scale_signed:
            low_signs, high_signs = signs_on_grid(a, b, C)
        low = squeeze(codes_on_grid(low, low_signs, C), C.width)
        high = squeeze(codes_on_grid(high, high_signs, C), C.width)
        if C.width <= 4:
            low = low | (high << (4 * C.width))
            high = low
    return low, high


@triton.jit
def _with_sign_bit(code, bits, C: tl.constexpr):
    """The codes with the signs of floats above them; zeros have none."""
    bits = (bits.to(tl.float32, bitcast=True) + 0.0).to(tl.uint32, bitcast=True)
    return code + ((bits >> 31) << C.magnitude_bits)


@triton.jit
def _pack(a, b, WIDTH: tl.constexpr, PAIRED: tl.constexpr):
    N: tl.constexpr = a.shape[0]
    four = tl.arange(0, 4).expand_dims(0)
    if PAIRED:
        pairs = a + (b << WIDTH)
        if WIDTH <= 4:
            low = tl.sum(pairs << (four * (2 * WIDTH)), axis=1)
            high = low
        else:
            halves = tl.reshape(pairs << ((four & 1) * (2 * WIDTH)), [N, 2, 2])
            low, high = tl.split(tl.sum(halves, axis=2))
    else:
        low = tl.sum(a << (four * WIDTH), axis=1)
        high = tl.sum(b << (four * WIDTH), axis=1)
        if WIDTH <= 4:
            low += high << (4 * WIDTH)
    return low, high


@triton.jit
def _finish(word, finite, C: tl.constexpr):
    """Offset codes to sign and magnitude or two's complement, in each field; 0 where the block is not finite."""
    EXCESS: tl.constexpr = _excess(C)
    word = word - EXCESS
    if not C.unsigned and not C.codebook:
        SIGNS: tl.constexpr = _each_field(1 << (C.width - 1), C.width)
        REST: tl.constexpr = SIGNS ^ (_each_field(1, C.width) * ((1 << C.width) - 1))
        if C.twos:
            if _may_clip(C):
                clipped = ((((word & REST) + REST) | word) & SIGNS) ^ SIGNS  # 0 stands for -2^M, one below the least
                word += clipped >> (C.width - 1)
            word ^= SIGNS
        else:
            negative = (word & SIGNS) ^ SIGNS
            ones = negative >> (C.width - 1)
            magnitude = ((word ^ (negative - ones)) & (SIGNS ^ 0xFFFFFFFF)) + ones
            if _may_clip(C):
                magnitude -= (magnitude & SIGNS) >> (C.width - 1)  # -2^M, one below the least code
            word = magnitude | negative
    return tl.reshape(tl.where(finite, word.expand_dims(1), 0), word.shape)


@triton.jit
def decode(low, high, code, place_bits, seed, group, level_ptr, C: tl.constexpr):
    """A tile of floats (a, b), each [N, 4], from its words and the scale's ``code`` [N] (int32) of each group's block.

    ``place_bits`` is 0x4B000000, the bits of 2^23: where the compiler does not know them, it masks and sets a field in
    one instruction. ``seed``, ``group`` and ``level_ptr`` are those of ``field_tiles``.
    """
    if C.dither != "":
        return values_by_field(low, high, step(code, C).expand_dims(1), seed, group, level_ptr, C)
    elif C.codebook and C.packs:
        return values_by_table(low, high, step(code, C).expand_dims(1), level_ptr, C)
    else:
        return _decode_fields(low, high, step(code, C).expand_dims(1), place_bits, level_ptr, C)


@triton.jit
def _decode_fields(low, high, value, place_bits, level_ptr, C: tl.constexpr):
    WIDTH: tl.constexpr = C.width
    if not C.unsigned and not C.codebook:
        low = _offset_codes(low, C)
        high = _offset_codes(high, C)
    low = low.expand_dims(1)
    high = high.expand_dims(1)
    four = tl.arange(0, 4).expand_dims(0)
    if C.dtype != 0:
        word = low if WIDTH <= 4 else tl.where(four < 2, low, high)
        index = four * 2 if WIDTH <= 4 else (four & 1) * 2
        return _floats(word, index, value, place_bits, level_ptr, C), _floats(
            word, index + 1, value, place_bits, level_ptr, C
        )
    else:
        FURTHER: tl.constexpr = 4 if WIDTH <= 4 else 0
        return _floats(low, four, value, place_bits, level_ptr, C), _floats(
            high, four + FURTHER, value, place_bits, level_ptr, C
        )


@triton.jit
def _offset_codes(word, C: tl.constexpr):
    """Sign and magnitude, or two's complement, to codes plus 2^M, in each field; minus zero becomes zero."""
    SIGNS: tl.constexpr = _each_field(1 << (C.width - 1), C.width)
    if C.twos:
        return word ^ SIGNS
    else:
        negative = word & SIGNS
        ones = negative >> (C.width - 1)
        return ((word & (SIGNS ^ 0xFFFFFFFF)) ^ (negative - ones)) + ones + (SIGNS ^ negative)


@triton.jit
def _floats(word, index, value, place_bits, level_ptr, C: tl.constexpr):
    """The floats [N, 4] of the fields ``index`` [1, 4] of ``word``; ``value`` [N, 1] is what a step is worth."""
    if C.codebook:
        return levels_of(word, index, place_bits, level_ptr, C) * value
    else:
        return _even_levels(word, index, value, place_bits, C.width, C.unsigned)


@triton.jit
def _even_levels(word, index, value, place_bits, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr):
    """Half of a word's fields are read in one place."""
    HALF: tl.constexpr = 4 if WIDTH <= 4 else 2
    UP: tl.constexpr = 1 if UNSIGNED else 0  # room for half a step below the field
    place = (index % HALF) * WIDTH + UP
    word = tl.where(index < HALF, word << UP, word >> (HALF * WIDTH - UP))
    field = (word & (((1 << WIDTH) - 1) << place).to(tl.uint32)) | place_bits
    OFFSET: tl.constexpr = 1 if UNSIGNED else 1 << WIDTH
    offset = (((OFFSET << place) >> 1) + _PLACE).to(tl.float32)
    steps = field.to(tl.float32, bitcast=True) - offset
    if UNSIGNED:
        steps = tl.maximum(steps, 0.0)
    return steps * (value * ((127 - place) << 23).to(tl.float32, bitcast=True))
