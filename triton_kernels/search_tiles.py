"""The scale of least squared error among a few, on tiles in registers.

What counts is how far a value is from the nearest level, whichever of two at a tie: so errors take no codes, and only
the best scale's codes are made, as without a search. Errors are integers n - level, of n as ``BFPFormat`` has it:

* Even levels: adding 1.5 * 2^23 leaves n in 1/16 steps, adding to that again leaves the nearest multiple of 16.
* Codebooks: of two levels the nearer is | |n - middle| - half their distance | away. The least of these over the levels, two
  by two, is the error. On NVIDIA n goes as float16, exact to 2048, two in a word; errors of one byte are squared and added
  four in one instruction.

Zeros of ``+unsigned``, which do not count, come to the same error under every scale: it is subtracted once a block.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import for_groups, sums
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
def searched(a, b, code, level_ptr, C: tl.constexpr):
    """The best scale codes [BLOCKS] (int32) for a tile as it was loaded, from the first ones and as these have them."""
    a, b = _what_counts(a, b, C)
    magnitude = code & C.scale_nan
    sign = code - magnitude
    lowest = _candidate(magnitude, _lowest_offset(C), C)
    too_much = _of_zeros(a, b, level_ptr, C)
    best = magnitude
    least = _weighted_error(a, b, magnitude, sign, lowest, too_much, 0, level_ptr, C)
    for i in tl.static_range(1, len(C.search)):
        tried = _candidate(magnitude, C.search[i], C)
        error = _weighted_error(a, b, tried, sign, lowest, too_much, C.search[i], level_ptr, C)
        best = tl.where(error < least, tried, best)
        least = tl.minimum(error, least)
    return tl.where(magnitude == C.scale_nan, code, best + sign)


@triton.jit
def _what_counts(a, b, C: tl.constexpr):
    """Float32 bits (a, b) of magnitudes, of values that have their signs under a signed scale, of 0 for negative ones."""
    if C.scale_signed:
        if C.dtype != 0:
            a, b = float_bits(a, C)
    elif C.unsigned:
        if C.dtype != 0:
            a, b = float_bits(a, C)
        a, b = tl.maximum(a, 0), tl.maximum(b, 0)
    elif C.dtype != 0:
        a, b = float_bits(a & 0x7FFF7FFF, C)
    else:
        a, b = a & 0x7FFFFFFF, b & 0x7FFFFFFF
    return a, b


@triton.constexpr_function
def _lowest_offset(C) -> int:
    return min(C.search)


@triton.jit
def _candidate(magnitude, OFFSET: tl.constexpr, C: tl.constexpr):
    """The codes so far from the first ones', within the range."""
    return tl.minimum(tl.maximum(magnitude + OFFSET, C.scale_least), C.scale_nan - 1)


@triton.jit
def _of_zeros(a, b, level_ptr, C: tl.constexpr):
    """What the zeros of ``+unsigned`` come to in each block's sum of errors [BLOCKS]."""
    if C.unsigned:
        if C.learned:
            each = loaded_level(level_ptr + 1, C)
        else:
            each = tl.full([], C.levels[1] if C.codebook else 8, tl.int32)
        counted = sums(tl.sum(tl.minimum(a, 1) + tl.minimum(b, 1), axis=1), C)
        return (-counted + C.block) * (each * each)
    else:
        return 0


@triton.jit
def _weighted_error(a, b, magnitude, sign, lowest, too_much, OFFSET: tl.constexpr, level_ptr, C: tl.constexpr):
    """Squared errors times S squared, in units of the lowest scale's [BLOCKS] (int64)."""
    N: tl.constexpr = a.shape[0]
    MORE: tl.constexpr = 0 if C.codebook else 4
    inverse = for_groups(reciprocal(magnitude + sign, MORE, C), N, C).expand_dims(1)
    if C.learned:
        total = _sum_squares(_error_of_learned(a, inverse, level_ptr, C), _error_of_learned(b, inverse, level_ptr, C), C)
    elif C.codebook and C.packs:
        total = _codebook_by_halves(a, b, inverse, C)
    elif C.codebook:
        total = _sum_squares(_error_of_codebook(a, inverse, C), _error_of_codebook(b, inverse, C), C)
    else:
        total = _sum_squares(_error_of_even(a, inverse, OFFSET, C), _error_of_even(b, inverse, OFFSET, C), C)
    ONE: tl.constexpr = 1 << C.scale_mantissa_bits
    mantissa = ((magnitude + C.scale_base) & (ONE - 1)) + ONE
    shift = (exponent_of(magnitude, C) - exponent_of(lowest, C)) * 2
    return (total - too_much).to(tl.int64) * ((mantissa * mantissa) << shift).to(tl.int64)


@triton.constexpr_function
def _is_wide(C) -> bool:
    """Whether squares may add up, in a thread, to more than floats hold exactly."""
    return not C.codebook and C.magnitude_bits > 5


@triton.jit
def _sum_squares(u, v, C: tl.constexpr):
    """The sum of the squares of errors (float32) [N, 4] in each block."""
    if _is_wide(C):
        u = tl.minimum(tl.maximum((u + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS, -_LIMIT), _LIMIT)
        v = tl.minimum(tl.maximum((v + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS, -_LIMIT), _LIMIT)
    return sums(tl.sum(u * u + v * v, axis=1), C)


@triton.constexpr_function
def _may_exceed(C, offset: int) -> bool:
    """Whether values may be more than half a step above the top level under a scale so far from the first one."""
    return offset < 0 or (offset == 0 and not C.scale_up)


@triton.jit
def _error_of_even(bits, inverse, OFFSET: tl.constexpr, C: tl.constexpr):
    """In 1/16 steps; ``inverse`` makes values that."""
    HALF: tl.constexpr = 8 if C.unsigned else 0
    TOP: tl.constexpr = (1 << C.magnitude_bits) - 1 - C.unsigned
    UP: tl.constexpr = _ROUND_TO_16 - _ROUND
    n = tl.fma(bits.to(tl.float32, bitcast=True), inverse, _ROUND - HALF)
    level = n + UP
    if _may_exceed(C, OFFSET):
        level = tl.minimum(level, _ROUND_TO_16 + 16 * TOP)
    return n - (level - UP)


@triton.jit
def _number(bits, inverse, C: tl.constexpr):
    """n on the grid (float32)."""
    n = tl.fma(bits.to(tl.float32, bitcast=True), inverse, _ROUND) - _ROUND
    return tl.minimum(n, C.search_limit) if C.search_limit > 0 else n


@triton.jit
def _error_of_codebook(bits, inverse, C: tl.constexpr):
    n = _number(bits, inverse, C)
    least = tl.abs(tl.abs(n - C.search_pairs[0][0]) - C.search_pairs[0][1])
    for i in tl.static_range(1, len(C.search_pairs)):
        least = tl.minimum(least, tl.abs(tl.abs(n - C.search_pairs[i][0]) - C.search_pairs[i][1]))
    return least


@triton.jit
def _error_of_learned(bits, inverse, level_ptr, C: tl.constexpr):
    n = _number(bits, inverse, C)
    FIRST: tl.constexpr = 1 if C.unsigned else 0
    least = tl.abs(n - loaded_level(level_ptr + FIRST, C).to(tl.float32))
    for i in tl.static_range(FIRST + 1, len(C.levels)):
        least = tl.minimum(least, tl.abs(n - loaded_level(level_ptr + i, C).to(tl.float32)))
    return least


@triton.jit
def _codebook_by_halves(a, b, inverse, C: tl.constexpr):
    """The sum of squared errors in each block, two values at a time as float16."""
    u = tl.fma(a.to(tl.float32, bitcast=True), inverse, _ROUND_TO_HALF).to(tl.int32, bitcast=True)
    v = tl.fma(b.to(tl.float32, bitcast=True), inverse, _ROUND_TO_HALF).to(tl.int32, bitcast=True)
    n = _halves_less(permuted(u, v, 0x5410), _HALF)
    if C.search_limit > 0:
        n = _lesser_halves(n, tl.full([1, 1], _two_halves(C.search_limit), tl.int32))
    least = _distance_of_pair(n, 0, C)
    for i in tl.static_range(1, len(C.search_pairs)):
        least = _lesser_halves(least, _distance_of_pair(n, i, C))
    word = _halves_less(least, -1024)  # whose low ten bits are the error
    if C.search_bytes:
        x, y = tl.split(tl.reshape(word, [word.shape[0], 2, 2]))
        x, y = tl.split(permuted(x, y, 0x6420))
        return sums(_squares_of_bytes(x, _squares_of_bytes(y, x ^ x)).to(tl.int32), C)
    else:
        x, y = (word & 1023).to(tl.int32), ((word >> 16) & 1023).to(tl.int32)
        return sums(tl.sum(x * x + y * y, axis=1), C)


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
    value = tl.full([1, 1], _two_halves(VALUE), tl.int32)
    return tl.inline_asm_elementwise(
        "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [word, value], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _absolute_halves(word):
    return tl.inline_asm_elementwise("abs.f16x2 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _lesser_halves(word, other):
    return tl.inline_asm_elementwise(
        "min.f16x2 $0, $1, $2;", "=r,r,r", [word, other], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _squares_of_bytes(word, before):
    """The squares of a word's bytes, and ``before``, added up."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $1, $2;", "=r,r,r", [word, before], dtype=tl.uint32, is_pure=True, pack=1
    )
