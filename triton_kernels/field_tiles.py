"""Codes one by one, on tiles in registers: decoding at random in a code's cell, and coding to levels of a tensor's own.

Slower than ``tiles`` and ``codebook_tiles``. Source: US12277502B2 (dequantising at random).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .noise_tiles import bytes_of, philox

_DITHER = tl.constexpr(1)
_DENSITY = tl.constexpr(2)
_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def values_by_field(low, high, step, seed, number, level_ptr, C: tl.constexpr):
    """A tile of floats (a, b), each [N, 4], at random in the cells of the codes in its words [N], with ``step`` [N, 1].

    ``seed`` is an int64, ``number`` [N] (uint32) that of each group; levels of a tensor's own are at ``level_ptr``.
    """
    PAIRED: tl.constexpr = C.dtype != 0
    u_low, u_high = philox(seed, number, _DITHER)
    u_a, u_b = bytes_of(u_low, u_high, PAIRED)
    v_a, v_b = u_a, u_b
    if C.dither == "density":
        v_low, v_high = philox(seed, number, _DENSITY)
        v_a, v_b = bytes_of(v_low, v_high, PAIRED)
    four = tl.arange(0, 4).expand_dims(0)
    low, high = low.expand_dims(1), high.expand_dims(1)
    HALF: tl.constexpr = 8 if C.width <= 4 else 4  # fields of a word
    if PAIRED:
        word = low if C.width <= 4 else tl.where(four < 2, low, high)
        field = (four * 2) % HALF
        code_a, code_b = _field(word, field, C), _field(word, field + 1, C)
    else:
        code_a, code_b = _field(low, four, C), _field(high, (four + 4) % HALF, C)
    return _drawn(code_a, u_a, v_a, step, level_ptr, C), _drawn(code_b, u_b, v_b, step, level_ptr, C)


@triton.jit
def _field(word, field, C: tl.constexpr):
    return ((word >> (field * C.width).to(tl.uint32)) & ((1 << C.width) - 1)).to(tl.int32, bitcast=True)


@triton.jit
def _drawn(code, u, v, step, level_ptr, C: tl.constexpr):
    """The floats of codes; u and v: words whose lowest byte is random."""
    SIGNED: tl.constexpr = not C.unsigned and not C.scale_signed
    negative = (code >> C.magnitude_bits) != 0
    magnitude = code & ((1 << C.magnitude_bits) - 1) if SIGNED else code
    if C.twos:
        magnitude = tl.where(negative, (1 << C.width) - code, magnitude)
    away = (u & 255).to(tl.int32, bitcast=True)
    if C.dither == "density":
        other = (v & 255).to(tl.int32, bitcast=True)
        nearer = tl.where(other & 1 != 0, tl.minimum(away, other), away)
        away = nearer if C.codebook else tl.where(magnitude > 0, nearer, away)
    if C.codebook:
        n = _level(magnitude, away, level_ptr, C)
    else:  # in 1/512 of a step
        n = magnitude * 512 + (away * 2 - (511 if C.unsigned else 255))
        if C.unsigned:
            n = tl.where(code == 0, 0, n)
        step = step * (1 / 512)
    if SIGNED:
        n = tl.where(negative, -n, n)
    return ((n + _ROUND_BITS).to(tl.float32, bitcast=True) - _ROUND) * step


@triton.jit
def _level(index, away, level_ptr, C: tl.constexpr):
    """A number in the cell of each index, ``away`` 256ths of the cell from the end nearer to zero; for level 0 itself."""
    if C.learned:
        first, last, level = _learned_cells(index, level_ptr, C)
    else:
        first, last, level = _chosen(index, C.first), _chosen(index, C.last), _chosen(index, C.levels)
    further = (away * (last - first + 1)) >> 8
    return tl.where(level > 0, first + further, tl.where(level < 0, last - further, level))


@triton.jit
def _learned_cells(index, level_ptr, C: tl.constexpr):
    """The least and the greatest number of each index's cell, and its level: ``codebooks.cells``, of a tensor's own levels."""
    LAST: tl.constexpr = len(C.levels) - 1
    TOP: tl.constexpr = 127 if C.scale_signed else 255
    level = loaded_level(level_ptr, C)
    edge = (level + loaded_level(level_ptr + 1, C)) >> 1
    least = tl.maximum(level * 2 - edge, -TOP) if C.scale_signed else 0
    first, last, levels = tl.full(index.shape, 0, tl.int32) + least, tl.full(index.shape, 0, tl.int32) + edge, level
    for i in tl.static_range(1, LAST + 1):
        least = 1 if C.unsigned and i == 1 else edge + 1
        level = loaded_level(level_ptr + i, C)
        edge = (level + loaded_level(level_ptr + (i + 1), C)) >> 1 if i < LAST else tl.minimum(level * 2 - least, TOP)
        first = tl.where(index == i, least, first)
        last = tl.where(index == i, edge, last)
        levels = tl.where(index == i, level, levels)
    return first, last, levels


@triton.jit
def _chosen(index, OF: tl.constexpr):
    result = tl.full(index.shape, OF[0], tl.int32)
    for i in tl.static_range(1, len(OF)):
        result = tl.where(index == i, OF[i], result)
    return result


@triton.jit
def codes_of_learned(bits, reciprocal, level_ptr, C: tl.constexpr):
    """Codes [N, 4] (uint32) of float32 bits: of the nearest of the levels at ``level_ptr``, ties to the lower."""
    x = bits.to(tl.float32, bitcast=True)
    product = x * 1.0 if C.scale_signed else tl.abs(x)
    n = tl.fma(product, reciprocal, _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
    TOP: tl.constexpr = 127 if C.scale_signed else 255
    n = tl.maximum(tl.minimum(n, TOP), -TOP) * 2
    index = tl.zeros(n.shape, tl.int32)
    for i in tl.static_range(len(C.levels) - 1):
        edge = loaded_level(level_ptr + i, C) + loaded_level(level_ptr + (i + 1), C)
        index += (n > edge).to(tl.int32)
    if C.unsigned:
        index = tl.where(bits > 0, tl.maximum(index, 1), 0)
    elif not C.scale_signed:
        negative = (x + 0.0).to(tl.int32, bitcast=True) < 0  # zeros have no sign
        negative = negative & ((index > 0) | (loaded_level(level_ptr, C) > 0))
        index = index | (negative.to(tl.int32) << C.magnitude_bits)
    return index.to(tl.uint32, bitcast=True)


@triton.jit
def loaded_level(pointer, C: tl.constexpr):
    """One level (int32) of a tensor's own."""
    level = tl.load(pointer).to(tl.int32)
    return (level ^ 128) - 128 if C.scale_signed else level
