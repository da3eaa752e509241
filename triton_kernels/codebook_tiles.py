"""Codes with a codebook, on tiles in registers: nearest levels for four values at a time, a byte each, and back.

A byte is compared to all the levels' edges by addition: of the bytes that are greater, the top bit becomes one. As the
edges rise, bit p of the index of the nearest level is the exclusive or of every 2^p-th of these.
Source: US12277502B2 (codes whose levels are not evenly spaced).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

_PLACE = tl.constexpr(8388608)  # 2^23
_PLACE_BITS = tl.constexpr(0x4B000000)
_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)
_TOPS = tl.constexpr(0x80808080)


@triton.constexpr_function
def _four_bytes(value: int) -> int:
    return value * 0x01010101


@triton.constexpr_function
def _table(levels, place: int) -> int:
    """Four levels, a byte each, as an int32."""
    word = int.from_bytes(bytes(level & 255 for level in levels[4 * place : 4 * place + 4]).ljust(4, b"\0"), "little")
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def grid(bits, reciprocal, C: tl.constexpr):
    """The n [N, 4] (uint32), in the lowest byte, of float32 bits; the other bytes are those of ``grid_excess``."""
    x = bits.to(tl.float32, bitcast=True)
    if C.scale_signed:
        n = tl.fma(x, reciprocal, _ROUND + 128).to(tl.int32, bitcast=True)
        return tl.minimum(tl.maximum(n, _ROUND_BITS + 1), _ROUND_BITS + 255).to(tl.uint32, bitcast=True)
    elif C.unsigned:
        n = tl.fma(x, reciprocal, _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
        n = tl.maximum(tl.minimum(tl.maximum(n, 1), bits), 0)  # as in ``tiles``: zero for zeros alone
        return tl.minimum(n, 255).to(tl.uint32, bitcast=True)
    else:
        n = tl.fma(tl.abs(x), reciprocal, _PLACE).to(tl.uint32, bitcast=True)
        return tl.minimum(n, _PLACE_BITS + 255)


@triton.constexpr_function
def grid_excess(C) -> int:
    """What four such n add up to too much, each at its byte of a word."""
    each = 0 if C.unsigned else 0x4B400000 if C.scale_signed else 0x4B000000
    return _four_bytes(each) % 2**32


@triton.jit
def negative(bits, C: tl.constexpr):
    """1 (uint32) for values below zero; for minus zero only where it does not matter."""
    if C.levels[0] > 0:
        bits = (bits.to(tl.float32, bitcast=True) + 0.0).to(tl.int32, bitcast=True)
    return bits.to(tl.uint32, bitcast=True) >> 31


@triton.jit
def codes(n, signs, C: tl.constexpr):
    """Codes of the four bytes of each word ``n``, a byte each; ``signs`` has 1 in those of values below zero."""
    index = _bit(n, 0, C)
    for p in tl.static_range(1, 4):
        if (1 << p) <= len(C.thresholds):
            index |= _bit(n, p, C)
    if C.unsigned or C.scale_signed:
        return index
    else:
        signs = signs << C.magnitude_bits
        if C.levels[0] == 0:
            signs &= index + _four_bytes((1 << C.magnitude_bits) - 1)  # carries for all but 0
        return index | signs


@triton.jit
def _bit(n, P: tl.constexpr, C: tl.constexpr):
    """Bit P of the index of each byte's nearest level, at its place."""
    rest = n & 0x7F7F7F7F
    tops = _above(n, rest, C.thresholds[(1 << P) - 1])
    for i in tl.static_range((2 << P) - 1, len(C.thresholds), 1 << P):
        tops ^= _above(n, rest, C.thresholds[i])
    return (tops & _TOPS) >> (7 - P)


@triton.jit
def _above(n, rest, THRESHOLD: tl.constexpr):
    """Words whose bytes' top bits say whether those of ``n`` are more than a number; ``rest`` is ``n`` without top bits."""
    sums = rest + _four_bytes(127 - THRESHOLD % 128)
    return sums | n if THRESHOLD < 128 else sums & n


@triton.jit
def squeeze(word, WIDTH: tl.constexpr):
    """The low WIDTH bits of a word's four bytes, side by side."""
    LOW: tl.constexpr = 0x00FF00FF
    pairs = (word & LOW) | ((word >> (8 - WIDTH)) & (LOW << WIDTH))
    return (pairs & 0xFFFF) | ((pairs >> 16) << (2 * WIDTH))


@triton.jit
def levels_of(word, index, C: tl.constexpr):
    """The levels [N, 4] (float32), with their signs, of the fields ``index`` [1, 4] of ``word``."""
    field = word >> (index * C.width)
    place = field & (len(C.levels) - 1)
    table = tl.full(place.shape, _table(C.levels, 0), tl.int32)
    if len(C.levels) == 8:
        table = tl.where(place & 4 != 0, _table(C.levels, 1), _table(C.levels, 0))
    elif len(C.levels) == 16:
        upper = tl.where(place & 4 != 0, _table(C.levels, 3), _table(C.levels, 2))
        lower = tl.where(place & 4 != 0, _table(C.levels, 1), _table(C.levels, 0))
        table = tl.where(place & 8 != 0, upper, lower)
    level = table.to(tl.uint32, bitcast=True) >> ((place & 3) * 8)
    if C.scale_signed:
        return (((level & 255) ^ 128) | _PLACE_BITS).to(tl.float32, bitcast=True) - (_PLACE + 128)
    value = ((level & 255) | _PLACE_BITS).to(tl.float32, bitcast=True) - _PLACE
    if not C.unsigned:
        sign = (field >> C.magnitude_bits) << 31
        value = (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        if C.levels[0] == 0:
            value = value + 0.0  # no minus zero
    return value
