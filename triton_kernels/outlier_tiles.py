"""Outliers, on tiles in registers: the largest value of a block, kept apart with more bits; back, any number.

The outlier's place in the block rides in the low bits of the key by which it is found. Either it is taken out of the tile
before that is coded, or it is coded and clipped like the others, and all but the sign of its code replaced.
Source: US20200210839A1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import for_groups, largest, numbers
from .pair_tiles import float_bits, two_largest
from .scale_tiles import code_of, exponent_of

_BIAS = tl.constexpr(2)
_MAX_FIELD = tl.constexpr(15)


@triton.constexpr_function
def in_place(C) -> bool:
    """Whether outliers are coded like the others first, clipped and with a sign, and not taken out before."""
    plain = C.rounding == "nearest" and not C.codebook and not C.unsigned
    return plain and C.packs and C.dtype != 0 and C.magnitude_bits > 1


@triton.jit
def take_out(a, b, C: tl.constexpr):
    """Of a tile as it was loaded: scale codes [BLOCKS] as ``scales_of`` has them, the outliers, and the tile's floats.

    (stored, code, entry, place, own, a, b): where a block has no outlier ``entry`` is 0 and ``place`` -1. a and b are
    float32 bits, zero for the outliers, unless ``put_codes`` is to replace all but the sign of these.
    """
    N: tl.constexpr = a.shape[0]
    if in_place(C):
        key, magnitude, doubled = two_largest(a, C)
        index = -(key & 127) + (C.block - 1)
        stored, code, entry, own = _entries(magnitude, doubled, index, C)
        a, b = float_bits(a, C)
        return stored, code, entry, tl.where(entry == 0, -1, index), own, a, b
    else:
        if C.dtype != 0:
            a, b = float_bits(a, C)
        key_a, key_b = keys_of(a, b, C)
        key = largest(tl.maximum(key_a, key_b), C)
        chosen = for_groups(key, N, C).expand_dims(1)
        here_a, here_b = key_a == chosen, key_b == chosen
        if C.dtype == 0:
            bits = _largest(tl.where(here_a, a, 0), tl.where(here_b, b, 0), C)
        else:
            bits = (key & 0x7FFFFF00) | ((key & 1) << 31)
        doubled_a = tl.where(here_a, 0, a << 1).to(tl.uint32, bitcast=True)
        doubled_b = tl.where(here_b, 0, b << 1).to(tl.uint32, bitcast=True)
        index = -(key & 127 if C.dtype == 0 else (key >> 1) & 127) + 127
        rest = largest(tl.maximum(doubled_a, doubled_b), C)
        stored, code, entry, own = _entries(bits & 0x7FFFFFFF, rest, index, C)
        own |= ((bits >> 31) & 1) << C.magnitude_bits
        gone = for_groups(tl.where(entry == 0, -1, key), N, C).expand_dims(1)
        a, b = tl.where(key_a == gone, 0, a), tl.where(key_b == gone, 0, b)
        return stored, code, entry, tl.where(entry == 0, -1, index), own, a, b


@triton.jit
def _entries(magnitude, rest, index, C: tl.constexpr):
    """Scale codes, entries, and own codes without a sign.

    From the bits of the largest magnitudes, and twice the others' largest.
    """
    finite = (magnitude < 0x7F800000) & (rest < 0xFF000000)
    rounded = shortened(magnitude, 23 - C.magnitude_bits - C.outlier_extra_bits, C)
    if C.outlier_threshold > 0:
        apart = magnitude - (C.outlier_threshold << 23) >= (rest >> 1).to(tl.int32)
        rounded = tl.where(apart, rounded, 0)
        rest = tl.where(apart, rest, tl.maximum(rest, (magnitude << 1).to(tl.uint32, bitcast=True)))
    code = tl.maximum(code_of(rest, C), least_code_of(rounded, C))
    code = tl.where(finite, tl.minimum(code, C.scale_nan), C.scale_nan)
    entry = entry_of(rounded, index, code, C)
    stored = tl.where((magnitude == 0) & (rest == 0), 0, code) if C.scale_zero else code
    return stored, code, entry, own_code(rounded, C)


@triton.jit
def least_code_of(rounded, C: tl.constexpr):
    """The least scale code under which a value of that many bits, as ``shortened`` leaves them, can be an entry."""
    exponent = rounded >> (C.magnitude_bits + C.outlier_extra_bits)
    return ((exponent + (_BIAS - _MAX_FIELD)) << C.scale_mantissa_bits) - C.scale_base


@triton.jit
def entry_of(rounded, index, code, C: tl.constexpr):
    """Entries of shortened values under scales with that code; 0 where not used."""
    exponent = exponent_of(code & C.scale_nan if C.scale_signed else code, C)
    field = (rounded >> (C.magnitude_bits + C.outlier_extra_bits)) - exponent + _BIAS
    used = (field >= 1) & (rounded > 0) & (code != C.scale_nan)
    extra = rounded & ((1 << C.outlier_extra_bits) - 1)
    return tl.where(used, (field << 12) | (extra << (12 - C.outlier_extra_bits)) | index, 0)


@triton.jit
def own_code(rounded, C: tl.constexpr):
    """The code of an outlier without its sign."""
    return (rounded >> C.outlier_extra_bits) & ((1 << C.magnitude_bits) - 1)


@triton.jit
def keys_of(a, b, C: tl.constexpr):
    """Magnitudes' bits, the low 7 of which say where in its block a value is; the first of equal values has the most.

    Those of 16-bit values have the sign below that.
    """
    place_a, place_b = _places(numbers(a.shape[0], C), C)
    if C.unsigned:
        a, b = tl.maximum(a, 0), tl.maximum(b, 0)
    if C.dtype == 0:
        return (a & 0x7FFFFF80) | (-place_a + 127), (b & 0x7FFFFF80) | (-place_b + 127)
    else:
        key_a = (a & 0x7FFFFF00) | ((a >> 31) & 1) | (-place_a + 127) * 2
        key_b = (b & 0x7FFFFF00) | ((b >> 31) & 1) | (-place_b + 127) * 2
        return key_a, key_b


@triton.jit
def _places(group, C: tl.constexpr):
    """The places in their blocks of the values of a tile (a, b), each [N, 4], from the numbers of its groups."""
    group = (group % (C.block // 8)).expand_dims(1) * 8
    four = tl.arange(0, 4).expand_dims(0)
    if C.dtype == 0:
        return group + four, group + four + 4
    else:
        return group + four * 2, group + four * 2 + 1


@triton.jit
def _largest(a, b, C: tl.constexpr):
    """The bits of the one value of each block that is not 0."""
    both = (a | b).to(tl.uint32, bitcast=True)
    return largest(both, C).to(tl.int32, bitcast=True)


@triton.jit
def shortened(bits, DROP: tl.constexpr, C: tl.constexpr):
    """The bits of floats without the lowest DROP, to nearest even, finite ones below infinity."""
    EMPTY: tl.constexpr = 0 if C.dtype == 0 else 16 if C.dtype == 1 else 13
    if DROP <= EMPTY:
        return bits >> DROP
    else:
        rounded = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP
        return tl.minimum(rounded, (0x7F800000 >> DROP) - 1)


@triton.jit
def put_codes(low, high, place, own, C: tl.constexpr):
    """The words (low, high) [N] of a tile with the outliers' codes put in; ``place``, ``own`` [N] are of each group's block."""
    group = numbers(low.shape[0], C) % (C.block // 8)
    if C.width <= 4:
        low = _put(low, place, group, own, 8, C)
        return low, low
    else:
        return _put(low, place, group * 2, own, 4, C), _put(high, place, group * 2 + 1, own, 4, C)


@triton.jit
def _put(word, place, number, own, FIELDS: tl.constexpr, C: tl.constexpr):
    """The words [N] with codes replaced, but for signs; word ``number`` of a block has FIELDS of its codes."""
    shift = (place & (FIELDS - 1)) * C.width
    BITS: tl.constexpr = C.width if C.scale_signed else C.magnitude_bits  # there a zero's code may have the top bit
    others = ((((1 << BITS) - 1) << shift) ^ -1).to(tl.uint32, bitcast=True)
    put = (word & others) | (own << shift).to(tl.uint32, bitcast=True)
    return tl.where((place >> (3 if FIELDS == 8 else 2)) == number, put, word)


@triton.jit
def outliers_of(low, high, entry, code, C: tl.constexpr):
    """The places [N, 1] of outliers in their blocks, -1 for none, and the outliers [N, 1] (float32), from a tile's words.

    ``entry`` and the scale's ``code`` [N] are of each group's block.
    """
    X: tl.constexpr = C.outlier_extra_bits
    entry = entry & 0xFFFF
    index = entry & (C.block - 1)
    FIELDS: tl.constexpr = 8 if C.width <= 4 else 4
    word = low if C.width <= 4 else tl.where(index & 4 != 0, high, low)
    own = (word >> ((index & (FIELDS - 1)) * C.width)).to(tl.int32, bitcast=True)
    mantissa = ((own & ((1 << C.magnitude_bits) - 1)) << X) | ((entry >> (12 - X)) & ((1 << X) - 1))
    exponent = exponent_of(code & C.scale_nan if C.scale_signed else code, C) + (entry >> 12) - _BIAS
    bits = (exponent << 23) | (mantissa << (23 - C.magnitude_bits - X))
    if not C.unsigned:
        bits = bits ^ (((own >> C.magnitude_bits) & 1) << 31)
    value = bits.to(tl.float32, bitcast=True).expand_dims(1)
    return tl.where(entry >> 12 > 0, index, -1).expand_dims(1), value


@triton.jit
def put_values(a, b, index, value, C: tl.constexpr):
    """The decoded tile (a, b) with the outliers put in."""
    four = tl.arange(0, 4).expand_dims(0)
    inside = _inside(index, C)
    return tl.where(inside == four, value, a), tl.where(inside == four + 4, value, b)


@triton.jit
def put_pairs(pair, index, outlier, C: tl.constexpr):
    """The same of pairs of 16-bit values; ``outlier`` [N, 1] has the outlier in both halves."""
    inside = _inside(index, C)
    own = tl.where((inside & 1) != 0, 0xFFFF0000, 0x0000FFFF).to(tl.uint32)
    return tl.where(inside >> 1 == tl.arange(0, 4).expand_dims(0), (pair & (own ^ 0xFFFFFFFF)) | (outlier & own), pair)


@triton.jit
def _inside(index, C: tl.constexpr):
    """The places in groups [N, 1] from those in blocks; below 0 or above 7 in other groups."""
    return index - (tl.arange(0, index.shape[0]) % (C.block // 8) * 8).expand_dims(1)
