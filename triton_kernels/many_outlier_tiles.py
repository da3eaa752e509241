"""Outliers of every kind, on tiles in registers: any number, under every scale, with ``+unsigned`` and ``+search``.

Keys of a block's values are all different, so that the next largest is the greatest key below the one before: nothing is
marked as taken. Which values are apart is then asked of each by comparing it with two numbers of its block. The one largest
value of a format without any of these is found faster by ``outlier_tiles``. Source: US20200210839A1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005
# (Triton knows no Python types, and no stars in tuples)

import triton
import triton.language as tl

from .block_tiles import for_groups, largest, store_for_blocks, sums
from .outlier_tiles import entry_of, keys_of, least_code_of, own_code, put_codes, shortened
from .pair_tiles import float_bits
from .scale_tiles import exponent_of, magnitudes_of_blocks, scales_of
from .search_tiles import searched

_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def take_out_many(a, b, level_ptr, C: tl.constexpr):
    """Of a tile as it was loaded: scale codes [BLOCKS] as ``scales_of`` has them, the outliers, and the tile's floats.

    (stored, code, found, a, b), where ``found`` is for ``put_many``; a and b are float32 bits, zero for the outliers.
    """
    x, y = a, b
    if C.dtype != 0:
        x, y = float_bits(a, C)
    key_x, key_y = keys_of(x, y, C)
    keys, last = _largest_keys(key_x, key_y, C)
    bits = _bits_of_keys(keys, key_x, key_y, x, y, C)
    size_x, size_y = _sizes(x, key_x, C), _sizes(y, key_y, C)
    edge = _least_size(key_x, key_y, size_x, size_y, last, C)
    apart_x, apart_y = _apart(key_x, key_y, size_x, size_y, last, edge, C)
    if C.dtype != 0:
        top = tl.where(keys[0] >= edge, keys[0], 0) & -256
    else:
        top = largest(tl.maximum(tl.where(apart_x, size_x, 0), tl.where(apart_y, size_y, 0)), C)
    least = least_code_of(shortened(top, 23 - C.magnitude_bits - C.outlier_extra_bits, C), C)
    others_a, others_b = _others(a, b, apart_x, apart_y, C)
    if C.dtype != 0 and not C.unsigned:
        doubled = (keys[0] << 1).to(tl.uint32, bitcast=True) & 0xFFFFFE00
    else:
        doubled = magnitudes_of_blocks(a, b, C)
    stored, code = _scales(others_a, others_b, doubled, least, C)
    if len(C.search) > 0:
        count = C.outliers
        if C.outlier_threshold > 0:
            count = sums(apart_x.to(tl.int32) + apart_y.to(tl.int32), C)
        code, others_a, others_b = searched(others_a, others_b, stored, least, count, level_ptr, C)
        stored = code
    apart_x, apart_y = _apart(key_x, key_y, size_x, size_y, last, tl.maximum(edge, _least_used(code, C)), C)
    found = (keys, bits, edge, key_x, key_y, x, y)
    return stored, code, found, tl.where(apart_x, 0, x), tl.where(apart_y, 0, y)


@triton.jit
def put_many(low, high, found, code, outlier_ptr, rest, C: tl.constexpr, FULL: tl.constexpr):
    """Store the entries at ``outlier_ptr``; return the words (low, high) [N] of a tile with the outliers' codes put in."""
    keys, bits, edge, key_x, key_y, x, y = found
    OUTLIERS: tl.constexpr = C.outliers
    if in_turn(C):
        key = keys[0]
        for i in range(OUTLIERS):
            value = _bits_of_key(key, key_x, key_y, x, y, C)
            low, high = _put_one(low, high, key, value, edge, code, key_x, outlier_ptr + i, rest, C, FULL)
            key = _key_below(key, key_x, key_y, C)
    else:
        for i in tl.static_range(OUTLIERS):
            low, high = _put_one(low, high, keys[i], bits[i], edge, code, key_x, outlier_ptr + i, rest, C, FULL)
    return low, high


@triton.jit
def _put_one(low, high, key, bits, edge, code, key_x, outlier_ptr, rest, C: tl.constexpr, FULL: tl.constexpr):
    """The same of one outlier of each block, from its key and its float32 bits."""
    N: tl.constexpr = low.shape[0]
    size = tl.maximum(bits, 0) if C.unsigned else bits & 0x7FFFFFFF
    rounded = shortened(size, 23 - C.magnitude_bits - C.outlier_extra_bits, C)
    if C.outlier_threshold > 0:
        rounded = tl.where(size >= edge, rounded, 0)
    place = -((key if C.dtype == 0 else key >> 1) & 127) + 127
    entry = entry_of(rounded, place, code, C)
    store_for_blocks(outlier_ptr, entry.to(tl.int16), rest, N, C, FULL, C.outliers)
    own = own_code(rounded, C)
    if not C.unsigned:
        own |= ((bits >> 31) & 1) << C.magnitude_bits
    place = tl.where(entry == 0, -1, place)
    return put_codes(low, high, _for_words(place, key_x, C), _for_words(own, key_x, C), C)


@triton.jit
def _for_words(values, key_x, C: tl.constexpr):
    """What ``for_groups`` has, in the threads that have the keys of a group: else words may move to others' instead.

    Keys have no sign, so that this adds nothing, as the compiler will find.
    """
    values = for_groups(values, key_x.shape[0], C).expand_dims(1)
    return tl.max(values + (key_x >> 31), axis=1)


@triton.constexpr_function
def in_turn(C) -> bool:
    """Whether outliers are so many that they are found twice, in loops, and not kept in registers.

    On NVIDIA: for AMD, LLVM fails on some of these loops in float32.
    """
    return bool(C.outliers > 8 and C.packs)


@triton.jit
def _largest_keys(key_x, key_y, C: tl.constexpr):
    """The largest keys [BLOCKS] of each block, falling, or only the first of them; and the last."""
    OUTLIERS: tl.constexpr = C.outliers
    key = largest(tl.maximum(key_x, key_y), C)
    keys = (key,)
    if in_turn(C):
        for _ in range(1, OUTLIERS):
            key = _key_below(key, key_x, key_y, C)
    else:
        for _ in tl.static_range(1, OUTLIERS):
            key = _key_below(key, key_x, key_y, C)
            keys = keys + (key,)
    return keys, key


@triton.jit
def _key_below(key, key_x, key_y, C: tl.constexpr):
    """The greatest key [BLOCKS] of each block that is less than ``key``, of which there must be one.

    Less ``key`` those are negative, and without signs more than all the others.
    """
    than = for_groups(key, key_x.shape[0], C).expand_dims(1)
    below_x, below_y = (key_x - than).to(tl.uint32, bitcast=True), (key_y - than).to(tl.uint32, bitcast=True)
    return key + largest(tl.maximum(below_x, below_y), C).to(tl.int32, bitcast=True)


@triton.jit
def _sizes(bits, key, C: tl.constexpr):
    """What outliers are compared by: of 16-bit values the keys, whose low bits are below those of any value."""
    if C.dtype != 0:
        return key
    else:
        return tl.maximum(bits, 0) if C.unsigned else bits & 0x7FFFFFFF


@triton.jit
def _least_size(key_x, key_y, size_x, size_y, last, C: tl.constexpr):
    """The magnitude's bits [BLOCKS] from which on the values with the largest keys are apart."""
    if C.outlier_threshold > 0:
        ABOVE: tl.constexpr = C.outlier_threshold << 23
        than = for_groups(last, key_x.shape[0], C).expand_dims(1)
        rest = largest(tl.maximum(tl.where(key_x < than, size_x, 0), tl.where(key_y < than, size_y, 0)), C)
        if C.dtype != 0:
            rest = rest & -256
        return tl.minimum(rest, _INFINITY - ABOVE) + ABOVE  # more than all that is finite, where it has no bits
    else:
        return tl.zeros(last.shape, tl.int32)


@triton.jit
def _bits_of_keys(keys, key_x, key_y, x, y, C: tl.constexpr):
    bits = ()
    for i in tl.static_range(len(keys)):
        bits = bits + (_bits_of_key(keys[i], key_x, key_y, x, y, C),)
    return bits


@triton.jit
def _bits_of_key(key, key_x, key_y, x, y, C: tl.constexpr):
    """The float32 bits [BLOCKS] of the value of each block that has that key."""
    if C.dtype != 0:
        return (key & 0x7FFFFF00) | ((key & 1) << 31)
    else:
        of = for_groups(key, key_x.shape[0], C).expand_dims(1)
        found = tl.where(key_x == of, x, 0) | tl.where(key_y == of, y, 0)
        return largest(found.to(tl.uint32, bitcast=True), C).to(tl.int32, bitcast=True)


@triton.jit
def _apart(key_x, key_y, size_x, size_y, last, edge, C: tl.constexpr):
    """Which values [N, 4] of a tile have a key from ``last`` on, and a size from ``edge`` on, [BLOCKS]."""
    N: tl.constexpr = key_x.shape[0]
    if C.dtype != 0:
        least = for_groups(tl.maximum(last, edge), N, C).expand_dims(1)
        return key_x >= least, key_y >= least
    else:
        key, size = for_groups(last, N, C).expand_dims(1), for_groups(edge, N, C).expand_dims(1)
        return (key_x >= key) & (size_x >= size), (key_y >= key) & (size_y >= size)


@triton.jit
def _others(a, b, apart_x, apart_y, C: tl.constexpr):
    """The tile as it was loaded, with zeros for outliers."""
    if C.dtype == 0:
        return tl.where(apart_x, 0, a), tl.where(apart_y, 0, b)
    else:
        pair = a & tl.where(apart_x, -0x10000, -1) & tl.where(apart_y, 0xFFFF, -1)
        return pair, pair


@triton.jit
def _scales(others_a, others_b, doubled, least, C: tl.constexpr):
    """Scale codes as ``scales_of`` has them, of at least ``least``, for a tile without its outliers.

    ``doubled`` [BLOCKS] (uint32): twice the bits of the largest magnitudes of all.
    """
    _, code = scales_of(others_a, others_b, C)
    size = code & C.scale_nan
    raised = tl.minimum(tl.maximum(size, least), C.scale_nan)
    raised = tl.where(doubled < 0xFF000000, raised, C.scale_nan)
    code = tl.where(raised == C.scale_nan, C.scale_nan, raised + (code - size)) if C.scale_signed else raised
    return tl.where(doubled == 0, 0, code) if C.scale_zero else code, code


@triton.jit
def _least_used(code, C: tl.constexpr):
    """The least bits of a magnitude that rounds to 1/2 of S or more: those of an entry that is used."""
    DROP: tl.constexpr = 23 - C.magnitude_bits - C.outlier_extra_bits
    HALF: tl.constexpr = (1 << (DROP - 1)) if C.dtype == 0 else 0
    return ((exponent_of(code & C.scale_nan, C) - 1) << 23) - HALF
