"""The scale of least squared error among a few, on tiles in registers.

What counts is how far a value is from the nearest level, whichever of two at a tie: so errors take no codes, and only
the best scale's codes are made, as without a search. Errors are integers n - level, of n as ``BFPFormat`` has it:

* Even levels: adding 1.5 * 2^23 leaves n in 1/16 steps, adding to that again leaves the nearest multiple of 16.
* Codebooks: of two levels the nearer is | |n - middle| - half their distance | away. The least of these over the levels, two
  by two, is the error. On NVIDIA n goes as float16, exact to 2048, two in a word; errors of one byte are squared and added
  four in one instruction.

Zeros of ``+unsigned``, which do not count, come to the same error under every scale: it is subtracted once a block.
All scales are tried on four values before the next four, so that few registers are enough.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005
# (Triton knows no Python types, and no stars in tuples)

import triton
import triton.language as tl

from .block_tiles import blocks_in_run, for_groups, for_runs, groups_in_turn, groups_of_run, sums_of_runs
from .field_tiles import loaded_level
from .pair_tiles import float_bits, permuted
from .scale_tiles import exponent_of, reciprocal

_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)
_ROUND_TO_16 = tl.constexpr(201326592)  # 1.5 * 2^27
_LIMIT = tl.constexpr(2047)
_HALF = tl.constexpr(1536)  # as a float16 0x6600, whose next ones are one more each
_ROUND_TO_HALF = tl.constexpr(8388608 + 0x6600)  # the low half of n plus this is that float16 plus n


@triton.jit
def searched(a, b, code, lowest_code, gone, level_ptr, C: tl.constexpr):
    """The best scale codes [BLOCKS] (int32) for a tile as it was loaded, from the first ones, and the tile.

    With outliers, which are zeros in the tile: ``gone`` [BLOCKS] of a block, and codes of at least ``lowest_code`` [BLOCKS].
    Code 0, that of a block of zeros, stays: whatever it makes of zeros, encoding makes zeros.
    """
    N: tl.constexpr = a.shape[0]
    magnitude = code & C.scale_nan
    sign = code - magnitude
    inverses = ()
    for i in tl.static_range(len(C.search)):
        tried = _candidate(magnitude, C.search[i], lowest_code, C)
        inverses = inverses + (for_runs(reciprocal(tried + sign, 0 if C.codebook else 4, C), N, C),)
    totals, counts = _errors_of_runs(a, b, inverses, level_ptr, C)
    total = sums_of_runs(totals[0], N, C)
    if C.packs:  # as sums are never negative; what depends on codes is not kept until here, but made again
        code = code | (total >> 31)
        magnitude = code & C.scale_nan
        sign = code - magnitude
    lowest = _candidate(magnitude, _lowest_offset(C), lowest_code, C)
    too_much = _of_zeros(counts, gone, N, level_ptr, C)
    best = magnitude
    least = _weighted(total - too_much, magnitude, lowest, C)
    for i in tl.static_range(1, len(C.search)):
        tried = _candidate(magnitude, C.search[i], lowest_code, C)
        error = _weighted(sums_of_runs(totals[i], N, C) - too_much, tried, lowest, C)
        best = tl.where(error < least, tried, best)
        least = tl.minimum(error, least)
    best = tl.where((magnitude == C.scale_nan) | (magnitude == 0), code, best + sign)
    if C.packs:
        zero = for_groups((least >> 63).to(tl.int32), N, C).expand_dims(1)
        a, b = a | zero, b | zero
    return best, a, b


@triton.constexpr_function
def _lowest_offset(C) -> int:
    return int(min(C.search))


@triton.jit
def _candidate(magnitude, OFFSET: tl.constexpr, lowest_code, C: tl.constexpr):
    """The codes so far from the first ones', within the range."""
    code = tl.maximum(magnitude + OFFSET, C.scale_least)
    if C.outliers > 0:
        code = tl.maximum(code, lowest_code)
    return tl.minimum(code, C.scale_nan - 1)


@triton.jit
def _weighted(total, magnitude, lowest, C: tl.constexpr):
    """Squared errors times S squared, in units of the lowest scale's [BLOCKS] (int64)."""
    ONE: tl.constexpr = 1 << C.scale_mantissa_bits
    mantissa = ((magnitude + C.scale_base) & (ONE - 1)) + ONE
    shift = (exponent_of(magnitude, C) - exponent_of(lowest, C)) * 2
    return total.to(tl.int64) * ((mantissa * mantissa) << shift).to(tl.int64)


@triton.jit
def _of_zeros(counts, gone, N: tl.constexpr, level_ptr, C: tl.constexpr):
    """What the zeros of ``+unsigned`` come to in each block's sum of errors [BLOCKS]; ``counts``: the other values.

    Else what as many zeros as are outliers do, under codebooks without a level of zero.
    """
    if C.unsigned:
        each = loaded_level(level_ptr + 1, C) if C.learned else (C.levels[1] if C.codebook else 8)
        return (-sums_of_runs(counts, N, C) + C.block) * (each * each)
    elif C.outliers > 0 and C.codebook:
        error = _error_of_codebook(tl.zeros([1], tl.float32), 1.0, level_ptr, C).to(tl.int32)
        return gone * (error * error)
    else:
        return 0


@triton.jit
def _errors_of_runs(a, b, inverses, level_ptr, C: tl.constexpr):
    """Tuples of tensors [N // run], one for each block in a run: for each scale squared errors added up, and counts."""
    N: tl.constexpr = a.shape[0]
    BLOCKS: tl.constexpr = blocks_in_run(N, C)
    GROUPS: tl.constexpr = groups_of_run(N, C)
    a, b = groups_in_turn(a, C), groups_in_turn(b, C)
    totals, counts = (), ()
    for j in tl.static_range(BLOCKS):
        so_far = ()
        for _ in tl.static_range(len(C.search)):
            so_far = so_far + (_nothing(a[0][0], C),)
        count = tl.zeros(a[0][0].shape, tl.int32)
        zero = count
        for g in tl.static_range(j * GROUPS, (j + 1) * GROUPS):
            for half in tl.static_range(2):
                four = _what_counts(a[g][2 * half], a[g][2 * half + 1], b[g][2 * half], b[g][2 * half + 1], zero, C)
                if C.unsigned:
                    count = _counted(count, a[g][2 * half] | zero, four[0], four[2], C)
                    count = _counted(count, a[g][2 * half + 1] | zero, four[1], four[3], C)
                more = ()
                for i in tl.static_range(len(C.search)):
                    inverse = inverses[i][g][0]
                    if _waits(i, C):
                        inverse = _or_zero(inverse, more[i - 1].to(tl.int32, bitcast=True) >> 31)
                    more = more + (_errors_added(so_far[i], four, inverse, C.search[i], level_ptr, C),)
                so_far = more
                if C.packs:  # as sums are never negative
                    zero = (so_far[len(C.search) - 1].to(tl.int32, bitcast=True) | count) >> 31
        totals = totals + (so_far,)
        counts = counts + (count if C.dtype == 0 else (count & 0xFFFF) + (count >> 16),)
    by_scale = ()
    for i in tl.static_range(len(C.search)):
        of_scale = ()
        for j in tl.static_range(BLOCKS):
            of_scale = of_scale + (totals[j][i],)
        by_scale = by_scale + (of_scale,)
    return by_scale, counts


@triton.jit
def _counted(count, word, x, y, C: tl.constexpr):
    """``count`` and how many of two values are above zero; in the halves of words, where ``word`` is a pair of them."""
    if C.dtype == 0:
        return count + tl.minimum(x.to(tl.int32, bitcast=True), 1) + tl.minimum(y.to(tl.int32, bitcast=True), 1)
    else:
        word = word.to(tl.uint32, bitcast=True)
        above = ((word & 0x7FFF7FFF) + 0x7FFF7FFF) & (word ^ 0xFFFFFFFF) & 0x80008000
        return count + (above >> 15).to(tl.int32, bitcast=True)


@triton.constexpr_function
def _waits(place: int, C) -> bool:
    """Whether a scale is tried only when the one before it was: four values under all scales would not fit."""
    apart = place > 0 if C.unsigned else place == len(C.search) // 2
    return len(C.search_pairs) > 3 and _by_bytes(C) and apart


@triton.jit
def _or_zero(value, zero):
    return (value.to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True)


@triton.jit
def _what_counts(a, b, c, d, zero, C: tl.constexpr):
    """Four values (float32) from two in a and b and two in c and d: magnitudes, those of signed scales, 0 for negative ones.

    16-bit values are pairs in a and b, and c and d the same. ``zero`` makes these instructions wait for what it comes from.
    """
    if C.dtype != 0:
        a, c = float_bits(_kept(a, zero, 0x7FFF7FFF, C), C)
        b, d = float_bits(_kept(b, zero, 0x7FFF7FFF, C), C)
        if C.unsigned:
            a, b, c, d = tl.maximum(a, 0), tl.maximum(b, 0), tl.maximum(c, 0), tl.maximum(d, 0)
    elif C.unsigned:
        a, b, c, d = tl.maximum(a, zero), tl.maximum(b, zero), tl.maximum(c, zero), tl.maximum(d, zero)
    else:
        a, b = _kept(a, zero, 0x7FFFFFFF, C), _kept(b, zero, 0x7FFFFFFF, C)
        c, d = _kept(c, zero, 0x7FFFFFFF, C), _kept(d, zero, 0x7FFFFFFF, C)
    a, b = a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    return a, b, c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True)


@triton.jit
def _kept(word, zero, MAGNITUDES: tl.constexpr, C: tl.constexpr):
    """A word's magnitudes, or all of it where signs count."""
    return word | zero if C.scale_signed or C.unsigned else (word & MAGNITUDES) | zero


@triton.constexpr_function
def _by_bytes(C) -> bool:
    return C.codebook and C.packs and C.search_bytes and not C.learned


@triton.constexpr_function
def _is_wide(C) -> bool:
    """Whether squares may add up, in a thread, to more than floats hold exactly."""
    return not C.codebook and C.magnitude_bits > 5


@triton.jit
def _nothing(like, C: tl.constexpr):
    return tl.zeros(like.shape, tl.int32 if _by_bytes(C) or _is_wide(C) else tl.float32)


@triton.jit
def _errors_added(total, four, inverse, OFFSET: tl.constexpr, level_ptr, C: tl.constexpr):
    """``total`` plus the squared errors of four values, under the scale that lies so far from the first one."""
    if _by_bytes(C):
        return _squares_of_bytes(_four_errors(four, inverse, C), total)
    else:
        for k in tl.static_range(4):
            total = _error_added(total, four[k], inverse, OFFSET, level_ptr, C)
        return total


@triton.jit
def _error_added(total, x, inverse, OFFSET: tl.constexpr, level_ptr, C: tl.constexpr):
    error = _error_of_codebook(x, inverse, level_ptr, C) if C.codebook else _error_of_even(x, inverse, OFFSET, C)
    if _is_wide(C):
        whole = (error + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
        whole = tl.minimum(tl.maximum(whole, -_LIMIT), _LIMIT)
        return total + whole * whole
    else:
        return tl.fma(error, error, total)


@triton.constexpr_function
def _may_exceed(C, offset: int) -> bool:
    """Whether values may be more than half a step above the top level under a scale so far from the first one."""
    return offset < 0 or (offset == 0 and C.scale_addend == 0)


@triton.jit
def _error_of_even(x, inverse, OFFSET: tl.constexpr, C: tl.constexpr):
    """In 1/16 steps; ``inverse`` makes values that."""
    HALF: tl.constexpr = 8 if C.unsigned else 0
    TOP: tl.constexpr = (1 << C.magnitude_bits) - 1 - C.unsigned
    UP: tl.constexpr = _ROUND_TO_16 - _ROUND
    n = tl.fma(x, inverse, _ROUND - HALF)
    level = n + UP
    if _may_exceed(C, OFFSET):
        level = tl.minimum(level, _ROUND_TO_16 + 16 * TOP)
    return n - (level - UP)


@triton.jit
def _error_of_codebook(x, inverse, level_ptr, C: tl.constexpr):
    """On the grid."""
    n = tl.fma(x, inverse, _ROUND) - _ROUND
    if C.search_limit > 0:
        n = tl.minimum(n, C.search_limit)
    if C.learned:
        FIRST: tl.constexpr = 1 if C.unsigned else 0
        least = tl.abs(n - loaded_level(level_ptr + FIRST, C).to(tl.float32))
        for i in tl.static_range(FIRST + 1, len(C.levels)):
            least = tl.minimum(least, tl.abs(n - loaded_level(level_ptr + i, C).to(tl.float32)))
    else:
        least = tl.abs(tl.abs(n - C.search_pairs[0][0]) - C.search_pairs[0][1])
        for i in tl.static_range(1, len(C.search_pairs)):
            least = tl.minimum(least, tl.abs(tl.abs(n - C.search_pairs[i][0]) - C.search_pairs[i][1]))
    return least


@triton.jit
def _four_errors(four, inverse, C: tl.constexpr):
    """The errors of four values, a byte each."""
    first = _two_errors(four[0], four[2], inverse, C)
    return permuted(first, _two_errors(four[1], four[3], inverse, C), 0x6420)


@triton.jit
def _two_errors(x, y, inverse, C: tl.constexpr):
    """Words whose halves have the errors of two values in their low bytes."""
    x = tl.fma(x, inverse, _ROUND_TO_HALF).to(tl.int32, bitcast=True)
    y = tl.fma(y, inverse, _ROUND_TO_HALF).to(tl.int32, bitcast=True)
    n = _halves_less(permuted(x, y, 0x5410), _HALF)
    if C.search_limit > 0:
        n = _lesser_halves(n, tl.full([1], _two_halves(C.search_limit), tl.int32))
    least = _distance_of_pair(n, 0, C)
    for i in tl.static_range(1, len(C.search_pairs)):
        least = _lesser_halves(least, _distance_of_pair(n, i, C))
    return _halves_less(least, -1024)


@triton.jit
def _distance_of_pair(n, PLACE: tl.constexpr, C: tl.constexpr):
    apart = _absolute_halves(_halves_less(n, C.search_pairs[PLACE][0]))
    if C.search_pairs[PLACE][1] > 0:
        apart = _absolute_halves(_halves_less(apart, C.search_pairs[PLACE][1]))
    return apart


@triton.constexpr_function
def _two_halves(value: float) -> int:
    """The bits of a float16, twice, as an int32: of 0, or of a magnitude from 1/2 on of at most 11 bits."""
    exponent = int(abs(value)).bit_length() - 1
    bits = ((exponent + 15) << 10) + int((abs(value) / 2.0**exponent - 1) * 1024) if value else 0
    bits = (bits + 0x8000 * (value < 0)) * 0x00010001
    return bits - 2**32 if bits >= 2**31 else bits


@triton.jit
def _halves_less(word, VALUE: tl.constexpr):
    value = tl.full([1], _two_halves(VALUE), tl.int32)
    return tl.inline_asm_elementwise(
        "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [word, value], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _absolute_halves(word):
    return tl.inline_asm_elementwise("abs.f16x2 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _lesser_halves(word, other):
    return tl.inline_asm_elementwise(
        "min.NaN.f16x2 $0, $1, $2;", "=r,r,r", [word, other], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _squares_of_bytes(word, before):
    """The squares of a word's bytes, and ``before``, added up."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $1, $2;", "=r,r,r", [word, before], dtype=tl.int32, is_pure=True, pack=1
    )
