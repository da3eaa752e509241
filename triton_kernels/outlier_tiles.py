"""One outlier a block, on tiles in registers: the largest value of a block, kept apart with more bits.

Its place in the block rides in the low bits of the key by which it is found. Source: US20200210839A1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .scale_tiles import code_of, exponent_of

_BIAS = tl.constexpr(2)
_MAX_FIELD = tl.constexpr(15)


@triton.jit
def take_out(a, b, BLOCKS: tl.constexpr, C: tl.constexpr):
    """Scale codes [BLOCKS] as ``scales_of`` has them, outliers' entries and codes, and the tile without outliers.

    (stored, code, entry, own, a, b); ``own`` and ``entry`` are 0 where a block has no outlier.
    """
    GROUPS: tl.constexpr = C.block // 8
    key_a, key_b = _keys(a, b, C)
    key = tl.max(tl.reshape(tl.maximum(key_a, key_b), [BLOCKS, GROUPS * 4]), axis=1)
    chosen = tl.reshape(tl.broadcast_to(key.expand_dims(1), [BLOCKS, GROUPS]), [BLOCKS * GROUPS]).expand_dims(1)
    here_a, here_b = key_a == chosen, key_b == chosen
    if C.dtype == 0:
        bits = _the_one(tl.where(here_a, a, 0), tl.where(here_b, b, 0), BLOCKS)
    else:
        bits = (key & 0x7FFFFF00) | ((key & 1) << 31)
    magnitude = bits & 0x7FFFFFFF
    doubled_a = tl.where(here_a, 0, a << 1).to(tl.uint32, bitcast=True)
    doubled_b = tl.where(here_b, 0, b << 1).to(tl.uint32, bitcast=True)
    rest = tl.max(tl.reshape(tl.maximum(doubled_a, doubled_b), [BLOCKS, GROUPS * 4]), axis=1)
    finite = (magnitude < 0x7F800000) & (rest < 0xFF000000)
    rounded = _shortened(magnitude, 23 - C.magnitude_bits - C.outlier_extra_bits)
    if C.unsigned:
        rounded = tl.where(bits > 0, rounded, 0)
    if C.outlier_threshold > 0:
        apart = magnitude - (C.outlier_threshold << 23) >= (rest >> 1).to(tl.int32)
        rounded = tl.where(apart, rounded, 0)
        rest = tl.where(apart, rest, tl.maximum(rest, (magnitude << 1).to(tl.uint32, bitcast=True)))
    exponent = rounded >> (C.magnitude_bits + C.outlier_extra_bits)
    code = code_of(rest, C)
    code = tl.maximum(code, ((exponent + (_BIAS - _MAX_FIELD)) << C.scale_mantissa_bits) - C.scale_base)
    code = tl.where(finite, tl.minimum(code, C.scale_nan), C.scale_nan)
    field = exponent - exponent_of(code, C) + _BIAS
    used = (field >= 1) & (rounded > 0) & (code != C.scale_nan)
    index = 127 - (key & 127 if C.dtype == 0 else (key >> 1) & 127)
    extra = rounded & ((1 << C.outlier_extra_bits) - 1)
    entry = (field << 12) | (extra << (12 - C.outlier_extra_bits)) | index
    own = (rounded >> C.outlier_extra_bits) & ((1 << C.magnitude_bits) - 1)
    if not C.unsigned:
        own |= ((bits >> 31) & 1) << C.magnitude_bits
    stored = tl.where((magnitude == 0) & (rest == 0), 0, code) if C.scale_zero else code
    gone = tl.where(used, key, -1)
    gone = tl.reshape(tl.broadcast_to(gone.expand_dims(1), [BLOCKS, GROUPS]), [BLOCKS * GROUPS]).expand_dims(1)
    return (
        stored, code, tl.where(used, entry, 0), tl.where(used, own, 0),
        tl.where(key_a == gone, 0, a), tl.where(key_b == gone, 0, b),
    )  # fmt: skip


@triton.jit
def _keys(a, b, C: tl.constexpr):
    """Magnitudes' bits, the low 7 of which say where in its block a value is; the first of equal values has the most."""
    place_a, place_b = _places(a.shape[0], C)
    if C.unsigned:
        a, b = tl.maximum(a, 0), tl.maximum(b, 0)
    if C.dtype == 0:
        return (a & 0x7FFFFF80) | (-place_a + 127), (b & 0x7FFFFF80) | (-place_b + 127)
    else:  # there is room for the sign, too
        key_a = (a & 0x7FFFFF00) | ((a >> 31) & 1) | (-place_a + 127) * 2
        key_b = (b & 0x7FFFFF00) | ((b >> 31) & 1) | (-place_b + 127) * 2
        return key_a, key_b


@triton.jit
def _places(N: tl.constexpr, C: tl.constexpr):
    """The places in their blocks of the values of a tile (a, b), each [N, 4]."""
    group = (tl.arange(0, N) % (C.block // 8)).expand_dims(1) * 8
    four = tl.arange(0, 4).expand_dims(0)
    if C.dtype == 0:
        return group + four, group + four + 4
    else:
        return group + four * 2, group + four * 2 + 1


@triton.jit
def _the_one(a, b, BLOCKS: tl.constexpr):
    """The bits of the one value of each block that is not 0."""
    both = (a | b).to(tl.uint32, bitcast=True)
    return tl.max(tl.reshape(both, [BLOCKS, a.numel // BLOCKS]), axis=1).to(tl.int32, bitcast=True)


@triton.jit
def _shortened(bits, DROP: tl.constexpr):
    """The bits of floats without the lowest DROP, to nearest even, finite ones below infinity."""
    rounded = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP
    return tl.minimum(rounded, (0x7F800000 >> DROP) - 1)


@triton.jit
def put_codes(low, high, entry, own, C: tl.constexpr):
    """The words (low, high) [N] of a tile with the outliers' codes put in; ``entry``, ``own`` [N] of each group's block."""
    N: tl.constexpr = low.shape[0]
    entry = entry.expand_dims(1)
    own = own.to(tl.uint32).expand_dims(1)
    place = (entry & (C.block - 1)) - (tl.arange(0, N) % (C.block // 8)).expand_dims(1) * 8
    FIELDS: tl.constexpr = 8 if C.width <= 4 else 4
    there = (entry > 0) & (place >= 0) & (place < FIELDS)
    low = tl.reshape(low.expand_dims(1) | tl.where(there, own << ((place & (FIELDS - 1)) * C.width), 0), [N])
    if C.width <= 4:
        return low, low
    else:
        there = (entry > 0) & (place >= 4) & (place < 8)
        return low, tl.reshape(high.expand_dims(1) | tl.where(there, own << ((place & 3) * C.width), 0), [N])


@triton.jit
def put_values(a, b, low, high, entry, code, C: tl.constexpr):
    """The decoded tile (a, b) with the outliers put in; ``entry`` and the scale's ``code`` [N] are of each group's block."""
    X: tl.constexpr = C.outlier_extra_bits
    entry = entry & 0xFFFF
    index = entry & (C.block - 1)
    FIELDS: tl.constexpr = 8 if C.width <= 4 else 4
    word = low if C.width <= 4 else tl.where(index & 4 != 0, high, low)
    own = (word >> ((index & (FIELDS - 1)) * C.width)).to(tl.int32, bitcast=True)
    mantissa = ((own & ((1 << C.magnitude_bits) - 1)) << X) | ((entry >> (12 - X)) & ((1 << X) - 1))
    exponent = exponent_of(code, C) + (entry >> 12) - _BIAS
    bits = (exponent << 23) | (mantissa << (23 - C.magnitude_bits - X))
    if not C.unsigned:
        bits = bits ^ (((own >> C.magnitude_bits) & 1) << 31)
    value = bits.to(tl.float32, bitcast=True).expand_dims(1)
    index = tl.where(entry >> 12 > 0, index, -1).expand_dims(1)
    place_a, place_b = _places(a.shape[0], C)
    return tl.where(place_a == index, value, a), tl.where(place_b == index, value, b)
