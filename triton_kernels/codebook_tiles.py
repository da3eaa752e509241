"""Codes with a codebook, on tiles in registers: nearest levels and back.

Where a curve rounds to the index of the nearest level (``codebook_polynomials``), that is some multiply-adds a value.
Elsewhere four values are compared at a time, a byte each: a byte is compared to all the levels' edges by addition, and of
the bytes that are greater, the top bit becomes one. As the edges rise, bit p of the index of the nearest level is the
exclusive or of every 2^p-th of these. Back from indices, NVIDIA's byte permutation looks up four levels at a time.
Source: US12277502B2 (codes whose levels are not evenly spaced).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .pair_tiles import magnitude, permuted

_PLACE = tl.constexpr(8388608)  # 2^23
_PLACE_BITS = tl.constexpr(0x4B000000)
_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)
_TOPS = tl.constexpr(0x80808080)


@triton.constexpr_function
def _four_bytes(value: int) -> int:
    return value * 0x01010101


@triton.constexpr_function
def _table(C, place: int) -> int:
    """Four levels, a byte each, as an int32; those with their signs plus 128."""
    levels = [level + 128 * C.scale_signed for level in C.levels[4 * place : 4 * place + 4]]
    word = int.from_bytes(bytes(levels).ljust(4, b"\0"), "little")
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def on_grid(a, b, reciprocal, C: tl.constexpr):
    """Two words [N] (uint32) of the n of values 0 2 1 3, and of 4 6 5 7, a byte each; under a signed scale n + 128."""
    low, high = _four(_grid(a, reciprocal, C), _grid(b, reciprocal, C), C.dtype != 0)
    EXCESS: tl.constexpr = _grid_excess(C)
    return low - EXCESS, high - EXCESS


@triton.jit
def _grid(bits, reciprocal, C: tl.constexpr):
    """The n [N, 4] (uint32) of float32 bits, plus what the constants leave above the lowest byte."""
    x = bits.to(tl.float32, bitcast=True)
    if C.scale_signed:
        n = tl.fma(x, reciprocal, _ROUND + 128).to(tl.int32, bitcast=True)
        return tl.minimum(tl.maximum(n, _ROUND_BITS + 1), _ROUND_BITS + 255).to(tl.uint32, bitcast=True)
    elif C.unsigned:
        n = tl.fma(x, reciprocal, _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
        n = tl.maximum(tl.minimum(tl.maximum(n, 1), bits), 0)  # as in ``tiles``: zero for zeros alone
        return tl.minimum(n, 255).to(tl.uint32, bitcast=True)
    else:
        n = tl.fma(magnitude(bits) if C.packs else tl.abs(x), reciprocal, _PLACE).to(tl.uint32, bitcast=True)
        return tl.minimum(n, _PLACE_BITS + 255)


@triton.constexpr_function
def _grid_excess(C) -> int:
    """What four such n add up to too much, each at its byte of a word."""
    each = 0 if C.unsigned else 0x4B400000 if C.scale_signed else 0x4B000000
    return each * 0x01010101 % 2**32


@triton.jit
def _four(a, b, PAIRED: tl.constexpr):
    """The words whose bytes are those of values 0 2 1 3, and of 4 6 5 7."""
    four = tl.arange(0, 4).expand_dims(0)
    if PAIRED:
        pairs = (a + (b << 16)) << ((four & 1) * 8)
        return tl.split(tl.sum(tl.reshape(pairs, [a.shape[0], 2, 2]), axis=2))
    else:
        shift = (four & 1) * 16 + (four >> 1) * 8
        return tl.sum(a << shift, axis=1), tl.sum(b << shift, axis=1)


@triton.jit
def by_polynomial(bits, reciprocal, C: tl.constexpr):
    """Codes [N, 4] (uint32) of float32 bits, without signs, plus what ``tiles`` subtracts from words."""
    x = bits.to(tl.float32, bitcast=True)
    if not C.unsigned and not C.scale_signed:
        x = magnitude(bits) if C.packs and C.width < 5 else tl.abs(x)  # wider ones would not fit into the registers
    u = _ramp(_multiply_add(x, reciprocal, _ROUND, C), C.ramp[0], C.ramp[1], C)
    v = _ramp(u, C.knee[0], C.knee[1], C) if len(C.knee) > 0 else u
    index = tl.full(u.shape, C.polynomial[-1], tl.float32)
    for i in tl.static_range(len(C.polynomial) - 1):
        index = _multiply_add(index, v, C.polynomial[len(C.polynomial) - 2 - i], C)
    code = _multiply_add(index, u, _ROUND, C).to(tl.int32, bitcast=True)
    if C.unsigned:  # 0 for zeros alone
        code = tl.maximum(tl.minimum(code + (1 - _ROUND_BITS), bits), 0)
    return code.to(tl.uint32, bitcast=True)


@triton.jit
def _ramp(x, SLOPE: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr):
    """One instruction, which clips its result; on NVIDIA by name, as those for pairs since sm_100 cannot."""
    if C.packs:
        slope, offset = tl.full([1, 1], SLOPE, tl.float32), tl.full([1, 1], OFFSET, tl.float32)
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=r,r,r,r", [x, slope, offset], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.minimum(tl.maximum(tl.fma(x, SLOPE, OFFSET), 0.0), 1.0)


@triton.jit
def _multiply_add(x, y, SUMMAND: tl.constexpr, C: tl.constexpr):
    """Behind a search one by one: pairs of registers, since sm_100, would not fit."""
    if C.packs and len(C.search) > 0:
        summand = tl.full([1, 1], SUMMAND, tl.float32)
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, summand], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.fma(x, y, SUMMAND)


@triton.jit
def signs_on_grid(a, b, C: tl.constexpr):
    """Words that have the top bit of the bytes of ``grid`` where a value is below zero."""
    a = a.to(tl.uint32, bitcast=True)
    b = b.to(tl.uint32, bitcast=True)
    if C.dtype == 0:
        if C.levels[0] > 0:  # of minus zero, too, the level has no sign
            a = (a.to(tl.float32, bitcast=True) + 0.0).to(tl.uint32, bitcast=True)
            b = (b.to(tl.float32, bitcast=True) + 0.0).to(tl.uint32, bitcast=True)
        low, high = _four(a >> 31, b >> 31, False)
        return low << 7, high << 7
    else:
        pair = (a >> 16) | (b & 0xFFFF0000)  # a float16 or bfloat16 that is not zero is not zero here
        if C.levels[0] > 0:
            pair = ((pair & 0x7FFF7FFF) + 0x7FFF7FFF) & pair
        pair = (pair & 0x80008000) >> (8 - (tl.arange(0, 4).expand_dims(0) & 1) * 8)
        return tl.split(tl.sum(tl.reshape(pair, [a.shape[0], 2, 2]), axis=2))


@triton.jit
def codes_on_grid(n, signs, C: tl.constexpr):
    """Codes of the four bytes of each word ``n``, in the high bits of each byte; the others are zero."""
    INDEX_BITS: tl.constexpr = C.width if C.scale_signed else C.magnitude_bits
    index = _tops(n, 0, C) & _TOPS
    if INDEX_BITS > 1:
        index = (index >> 1) | (_tops(n, 1, C) & _TOPS)
    if INDEX_BITS > 2:
        index = (index >> 1) | (_tops(n, 2, C) & _TOPS)
    if INDEX_BITS > 3:
        index = (index >> 1) | (_tops(n, 3, C) & _TOPS)
    if C.unsigned or C.scale_signed:
        return index
    else:
        index = index >> 1
        if C.levels[0] == 0:
            signs &= index + _four_bytes(127)  # carries for all but 0
        return index | (signs & _TOPS)


@triton.jit
def _tops(n, P: tl.constexpr, C: tl.constexpr):
    """Words whose bytes' top bits are bit P of the index of the nearest level; 0 if there are so few levels."""
    rest = n & 0x7F7F7F7F
    if len(C.thresholds) < (1 << P):
        return n & 0
    else:
        tops = _above(n, rest, C.thresholds[(1 << P) - 1])
        for i in tl.static_range((2 << P) - 1, len(C.thresholds), 1 << P):
            tops ^= _above(n, rest, C.thresholds[i])
        return tops


@triton.jit
def _above(n, rest, THRESHOLD: tl.constexpr):
    """Words whose bytes' top bits say whether those of ``n`` are more than a number; ``rest`` is ``n`` without top bits."""
    sums = rest + _four_bytes(127 - THRESHOLD % 128)
    return sums | n if THRESHOLD < 128 else sums & n


@triton.jit
def squeeze(word, WIDTH: tl.constexpr):
    """The high WIDTH bits of a word's bytes, which are those of values 0 2 1 3, side by side in their order."""
    word = word >> (8 - WIDTH)
    if WIDTH <= 4:
        TWO: tl.constexpr = (1 << (2 * WIDTH)) - 1
        word = word | (word >> (16 - WIDTH))
        return (word & TWO) | ((word >> (8 - 2 * WIDTH)) & (TWO << (2 * WIDTH)))
    else:
        even = (word & 0xFF) | ((word & 0xFF00) << (2 * WIDTH - 8))
        odd = ((word >> 16) & 0xFF) | ((word >> 24) << (2 * WIDTH))
        return even | (odd << WIDTH)


@triton.jit
def levels_of(word, index, place_bits, level_ptr, C: tl.constexpr):
    """The levels [N, 4] (float32), with their signs, of the fields ``index`` [1, 4] of ``word``."""
    up = 3 - index * C.width  # a field from bit 3 on counts eights, the bits of a byte
    field = tl.where(up > 0, word << tl.maximum(up, 0), word >> tl.maximum(-up, 0))
    table = tl.broadcast_to(_levels(0, level_ptr, C), field.shape)
    if len(C.levels) == 8:
        table = tl.where(field & 32 != 0, _levels(1, level_ptr, C), table)
    elif len(C.levels) == 16:
        upper = tl.where(field & 32 != 0, _levels(3, level_ptr, C), _levels(2, level_ptr, C))
        lower = tl.where(field & 32 != 0, _levels(1, level_ptr, C), table)
        table = tl.where(field & 64 != 0, upper, lower)
    level = table.to(tl.uint32, bitcast=True) >> (field & (8 * min(len(C.levels) - 1, 3)))
    if C.scale_signed:
        return ((level & 255) | place_bits).to(tl.float32, bitcast=True) - (_PLACE + 128)
    value = ((level & 255) | place_bits).to(tl.float32, bitcast=True) - _PLACE
    if not C.unsigned:
        sign = (field << (28 - C.magnitude_bits)) & 0x80000000
        value = (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        if C.levels[0] == 0 or C.learned:
            value = value + 0.0  # no minus zero
    return value


@triton.jit
def _levels(place, level_ptr, C: tl.constexpr):
    """Four levels, a byte each, those with their signs plus 128: of the format, or (int8) from memory."""
    if not C.learned:
        return tl.full([1, 1], _table(C, place), tl.int32)
    if len(C.levels) == 2:
        word = tl.load(level_ptr.to(tl.pointer_type(tl.int16))).to(tl.int32)
    else:
        word = tl.load(level_ptr.to(tl.pointer_type(tl.int32)) + place)
    return tl.full([1, 1], 0x80808080 if C.scale_signed else 0, tl.uint32).to(tl.int32, bitcast=True) ^ word


@triton.jit
def values_by_table(low, high, step, level_ptr, C: tl.constexpr):
    """A tile of floats (a, b), each [N, 4], from its words [N], with ``step`` [N, 1]: four levels are one instruction."""
    if C.width == 5:
        front, back = _four_of_five(low), _four_of_five(high)
    else:
        low = _four_bits_apart(low, C)
        front, back, high = low, low >> 16, low
    front, back = _level_bytes(front.expand_dims(1), level_ptr, C), _level_bytes(back.expand_dims(1), level_ptr, C)
    four = tl.arange(0, 4).expand_dims(0)
    low, high = low.expand_dims(1), high.expand_dims(1)
    if C.dtype == 0:
        FURTHER: tl.constexpr = 4 if C.width <= 4 else 0
        return _looked_up(front, four, low, four, step, C), _looked_up(back, four, high, four + FURTHER, step, C)
    else:
        even = (four & 1) * 2
        levels = tl.where(four < 2, front, back)
        word = low if C.width <= 4 else tl.where(four < 2, low, high)
        field = four * 2 if C.width <= 4 else even
        return _looked_up(levels, even, word, field, step, C), _looked_up(levels, even + 1, word, field + 1, step, C)


@triton.jit
def _looked_up(levels, byte, word, field, step, C: tl.constexpr):
    """A byte of ``levels``, times a step, with the sign of that field of ``word``, whose fields are 4 or 5 bits apart."""
    level = permuted(levels, tl.full([1, 1], _PLACE_BITS, tl.int32), byte + 0x7440).to(tl.float32, bitcast=True)
    ZERO: tl.constexpr = _PLACE + 128 if C.scale_signed else _PLACE
    SIGNED: tl.constexpr = not C.unsigned and not C.scale_signed
    sign = word << 0
    if SIGNED:
        sign = (word << (31 - C.magnitude_bits - field * max(C.width, 4)).to(tl.uint32)) & 0x80000000
    if C.learned or (SIGNED and C.levels[0] == 0):  # level 0 has no sign
        level -= ZERO
        if SIGNED:
            level = (level.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) + 0.0
        return level * step
    else:
        value = (level - ZERO) * step
        if SIGNED:
            value = (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return value


@triton.jit
def _four_bits_apart(word, C: tl.constexpr):
    """Eight fields of up to 4 bits."""
    if C.width < 4:
        word = _apart(_apart(_apart(word, C.width * 4, 16), C.width * 2, 8), C.width, 4)
    return word


@triton.jit
def _apart(word, BITS: tl.constexpr, DISTANCE: tl.constexpr):
    """Pairs of fields of so many bits, side by side, to that distance."""
    FIRST: tl.constexpr = _every(BITS, 2 * DISTANCE)
    return (word & FIRST) | ((word & (FIRST << BITS)) << (DISTANCE - BITS))


@triton.constexpr_function
def _every(bits: int, distance: int) -> int:
    """So many bits set, and again at every multiple of a distance."""
    return sum(((1 << bits) - 1) << place for place in range(0, 32, distance))


@triton.jit
def _four_of_five(word):
    """The indices of four fields of 5 bits, without the sign above them, 4 bits apart."""
    return (word & 0xF) | ((word >> 1) & 0xF0) | ((word >> 2) & 0xF00) | ((word >> 3) & 0xF000)


@triton.jit
def _level_bytes(selector, level_ptr, C: tl.constexpr):
    """Four levels, a byte each."""
    index = selector & (0x1111 * min(len(C.levels) - 1, 7))
    few = _levels(0, level_ptr, C)
    more = few if len(C.levels) <= 4 else _levels(1, level_ptr, C)
    levels = permuted(few, more, index)
    if len(C.levels) == 16:  # the upper levels as what sets them apart from the lower ones
        upper = (selector >> 3) & 0x1111
        upper = (upper | (upper << 8)) & 0x00110011
        upper = (upper | (upper << 4)) & 0x01010101
        apart = permuted(few ^ _levels(2, level_ptr, C), more ^ _levels(3, level_ptr, C), index)
        levels ^= apart & (upper * 255)
    return levels
