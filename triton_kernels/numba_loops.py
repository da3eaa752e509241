"""The loops of ``jitted``, which alone imports this: numba compiles them when they are first called.

The steps are those of ``bfp.c``, for codes that are even and rounded to nearest. Values pass in tiles that stay in the
first-level cache, and every step is a loop of its own, which LLVM makes vectors of if it is plain:

- one flat loop, or one over blocks and in it one over a block's values, as many as the array has columns: a number that is
  known here would have LLVM write all of them out, one by one;
- arrays are sliced at the top of a function that calls no other, where it costs nothing; elsewhere slices and views count
  references, which takes as long as a hundred values;
- numba makes 64 bits of every sum of integers: where it is made 32 again at once, twice as many fit in a vector.

Compiled code is kept on disk where numba finds a place for it: by the date of this file, so that all loops are in this one.
"""

# mypy: disable-error-code="no-untyped-def"
# (numba finds the types itself)

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

TILE = 2048
"""Values at a time: a whole number of blocks of any size."""

ROUND32, ROUND64 = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
MAGNITUDE, NAN_BITS = np.int32(0x7FFFFFFF), np.int32(0x7FC00000)
AS_STORED, SIGN_MAGNITUDE, COMPLEMENT = range(3)


class Numbers(NamedTuple):
    """A format as the loops read it. ``mode``: what codes in bytes are, as in ``bfp_packing.h``."""

    width: int
    block: int
    magnitude_bits: int
    is_unsigned: bool
    mode: int
    scale_shift: int
    scale_base: int
    scale_nan: int
    least_scale: int
    scale_addend: int
    peak_factor: float


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By numba, without the interpreter's lock while it runs."""
    settings = {"nogil": True, "error_model": "numpy"}
    compiled: Callable[..., Any]
    try:
        compiled = njit(function, cache=True, **settings)
    except RuntimeError:  # no place on disk
        compiled = njit(function, **settings)
    return compiled


@_compiled
def _find_largest(bits, first, n_blocks, largest):
    bits = bits[first : first + n_blocks]
    for b in range(n_blocks):
        found = np.int32(0)
        for i in range(bits.shape[1]):
            found = max(found, np.int32(bits[b, i] & MAGNITUDE))
        largest[b] = found


@_compiled
def _float_of(code, f):
    """S as a float32."""
    bits = np.int32(np.int32(code + np.int32(f.scale_base)) << np.int32(f.scale_shift))
    return np.int32(NAN_BITS if code == f.scale_nan else bits).view(np.float32)


@_compiled
def _find_scales(largest, units, n_blocks, scales, first, factors, f):
    """Scale codes, the factors that make values steps of them, and whether all are finite."""
    scales = scales[first : first + n_blocks]
    shift, base, nan, least = np.int32(f.scale_shift), np.int32(f.scale_base), np.int32(f.scale_nan), f.least_scale
    addend = np.int32(f.scale_addend)
    peak = np.float32(f.peak_factor)
    greatest = np.int32(0)
    for b in range(n_blocks):
        bits = np.float32(np.int32(largest[b]).view(np.float32) * peak).view(np.int32) + addend
        code = np.int32(min(max(np.int32(np.int32(bits >> shift) - base), np.int32(least)), nan))
        code = np.int32(nan if largest[b] >= np.int32(0x7F800000) else code)
        scales[b] = np.uint8(code)
        factors[b] = units / _float_of(code, f)
        greatest = max(greatest, code)
    return greatest < nan


@_compiled
def _find_steps(scales, first, n_blocks, step, factors, f):
    scales = scales[first : first + n_blocks]
    for b in range(n_blocks):
        factors[b] = _float_of(np.int32(scales[b]), f) * step


@_compiled
def _encode_signed32(values, first, n_blocks, factors, codes, magnitude_bits):
    """Codes plus 2^M, for scales that are powers of two. One bit of magnitude doubles all: 1/step may be no normal float."""
    values = values[first : first + n_blocks]
    offset, double = 1 << magnitude_bits, 2 if magnitude_bits == 1 else 1
    added, zero = np.float32((ROUND32 + offset) * double), np.float32(ROUND32 * double).view(np.int32)
    least, top = np.int32(zero + 1), np.int32(zero + 2 * offset - 1)
    for b in range(n_blocks):
        factor = factors[b]
        for i in range(values.shape[1]):
            sum = np.float32(values[b, i] * factor + added).view(np.int32)
            codes[b, i] = np.uint8(max(min(sum, top), least))


@_compiled
def _encode_signed64(values, first, n_blocks, factors, codes, magnitude_bits):
    """For other scales: in float64 the product is exact, and the sum is rounded once."""
    values = values[first : first + n_blocks]
    offset, double = 1 << magnitude_bits, 2 if magnitude_bits == 1 else 1
    added, zero = np.float64((ROUND64 + offset) * double), np.float64(ROUND64 * double).view(np.int64)
    least, top = zero + 1, zero + 2 * offset - 1
    for b in range(n_blocks):
        factor = np.float64(factors[b])
        for i in range(values.shape[1]):
            sum = np.float64(np.float64(values[b, i]) * factor + added).view(np.int64)
            codes[b, i] = np.uint8(max(min(sum, top), least))


@_compiled
def _encode_unsigned32(values, bits, first, n_blocks, factors, codes, magnitude_bits):
    values, bits = values[first : first + n_blocks], bits[first : first + n_blocks]
    top, one = np.int32((1 << magnitude_bits) - 1), np.int32(np.float32(ROUND32).view(np.int32) - np.int32(1))
    for b in range(n_blocks):
        factor = factors[b]
        for i in range(values.shape[1]):
            cell = np.float32(values[b, i] * factor - np.float32(0.5))
            code = min(np.int32(np.float32(cell + ROUND32).view(np.int32) - one), bits[b, i])
            codes[b, i] = np.uint8(min(max(code, np.int32(0)), top))


@_compiled
def _encode_unsigned64(values, bits, first, n_blocks, factors, codes, magnitude_bits):
    values, bits = values[first : first + n_blocks], bits[first : first + n_blocks]
    top, one = np.int32((1 << magnitude_bits) - 1), np.int32(np.float32(ROUND32).view(np.int32) - np.int32(1))
    for b in range(n_blocks):
        factor = np.float64(factors[b])
        for i in range(values.shape[1]):
            cell = np.float32(np.float64(values[b, i]) * factor - 0.5)
            code = min(np.int32(np.float32(cell + ROUND32).view(np.int32) - one), bits[b, i])
            codes[b, i] = np.uint8(min(max(code, np.int32(0)), top))


@_compiled
def _to_stored(words, n, signs, below, mode):
    """Of codes with a sign at each bit of ``signs``, ``below`` bits above their lowest."""
    if mode == COMPLEMENT:
        for g in range(n):
            words[g] ^= signs
    elif mode == SIGN_MAGNITUDE:
        for g in range(n):
            negative = (words[g] & signs) ^ signs
            ones = negative >> below
            words[g] = (((words[g] ^ (negative - ones)) & ~signs) + ones) | negative


@_compiled
def _from_stored(words, n, signs, below, mode):
    if mode == COMPLEMENT:
        for g in range(n):
            words[g] ^= signs
    elif mode == SIGN_MAGNITUDE:
        for g in range(n):
            negative = words[g] & signs
            ones = negative >> below
            words[g] = ((words[g] & ~signs) ^ (negative - ones)) + ones + (negative ^ signs)


@_compiled
def _each(value, period):
    """The uint64 with ``value`` at each multiple of ``period`` bits."""
    word = np.uint64(0)
    for shift in range(0, 64, period):
        word |= np.uint64(value) << np.uint64(shift)
    return word


@_compiled
def _neighbours(width, n):
    """Where the lower and the upper of two runs of ``n`` codes are once they are together, and how far apart they were."""
    lower = _each((1 << (width * n)) - 1, 16 * n)
    return lower, lower << np.uint64(width * n), np.uint64((8 - width) * n)


@_compiled
def _narrow(words, n, width):
    """A code in each byte -> eight in the low bits."""
    lower1, upper1, gap1 = _neighbours(width, 1)
    lower2, upper2, gap2 = _neighbours(width, 2)
    lower4, upper4, gap4 = _neighbours(width, 4)
    for g in range(n):
        word = words[g]
        word = (word & lower1) | ((word >> gap1) & upper1)
        word = (word & lower2) | ((word >> gap2) & upper2)
        words[g] = (word & lower4) | ((word >> gap4) & upper4)


@_compiled
def _widen(words, n, width):
    lower1, upper1, gap1 = _neighbours(width, 1)
    lower2, upper2, gap2 = _neighbours(width, 2)
    lower4, upper4, gap4 = _neighbours(width, 4)
    for g in range(n):
        word = words[g]
        word = (word & lower4) | ((word & upper4) << gap4)
        word = (word & lower2) | ((word & upper2) << gap2)
        words[g] = (word & lower1) | ((word & upper1) << gap1)


@_compiled
def _deal(words, n, plane, first, shift):
    """To a plane, the bits of the words from ``shift`` on."""
    stored = plane[first : first + n]
    for g in range(n):
        stored[g] = words[g] >> shift


@_compiled
def _collect(plane, first, n, words, shift):
    stored = plane[first : first + n]
    for g in range(n):
        words[g] |= np.uint64(stored[g]) << shift


@_compiled
def _copy(source, first, target, to, n):
    part, copied = source[first : first + n], target[to : to + n]
    for i in range(n):
        copied[i] = part[i]


@_compiled
def _shifts(width):
    """Where the bits of a group begin that go to the planes of 16 and of 8 bits."""
    return np.uint64(32 if width & 4 else 0), np.uint64((32 if width & 4 else 0) + (16 if width & 2 else 0))


@_compiled
def _pack(words, quads, code32, code16, code8, first, n, f):
    """``n`` groups of codes to the planes, from group ``first`` on."""
    width = f.width
    _to_stored(words, n, _each(1 << (width - 1), 8), np.uint64(width - 1), f.mode)
    if width == 8:
        _copy(quads, 0, code32, 2 * first, 2 * n)
        return
    _narrow(words, n, width)
    shift16, shift8 = _shifts(width)
    if width & 4:
        _deal(words, n, code32, first, np.uint64(0))
    if width & 2:
        _deal(words, n, code16, first, shift16)
    if width & 1:
        _deal(words, n, code8, first, shift8)


@_compiled
def _unpack(words, quads, code32, code16, code8, first, n, f):
    width = f.width
    if width == 8:
        _copy(code32, 2 * first, quads, 0, 2 * n)
    else:
        shift16, shift8 = _shifts(width)
        for g in range(n):
            words[g] = np.uint64(0)
        if width & 4:
            _collect(code32, first, n, words, np.uint64(0))
        if width & 2:
            _collect(code16, first, n, words, shift16)
        if width & 1:
            _collect(code8, first, n, words, shift8)
        _widen(words, n, width)
    _from_stored(words, n, _each(1 << (width - 1), 8), np.uint64(width - 1), f.mode)


@_compiled
def _encode(values, bits, first, n_blocks, factors, codes, f):
    if f.is_unsigned and f.scale_shift == 23:
        _encode_unsigned32(values, bits, first, n_blocks, factors, codes, f.magnitude_bits)
    elif f.is_unsigned:
        _encode_unsigned64(values, bits, first, n_blocks, factors, codes, f.magnitude_bits)
    elif f.scale_shift == 23:
        _encode_signed32(values, first, n_blocks, factors, codes, f.magnitude_bits)
    else:
        _encode_signed64(values, first, n_blocks, factors, codes, f.magnitude_bits)


@_compiled
def _clear_not_finite(scales, first, n_blocks, codes, zero, nan):
    for b in range(n_blocks):
        if scales[first + b] == nan:
            codes[b] = zero


@_compiled
def compress(values, bits, code32, code16, code8, scales, f):
    """``values`` (float32, a block a row) and the same as ``bits`` (int32) -> the planes (unsigned; empty if not used)."""
    largest, factors, codes = np.empty(TILE // 8, np.int32), np.empty(TILE // 8, np.float32), np.empty(TILE, np.uint8)
    rows, words, quads = codes.reshape((-1, f.block)), codes.view(np.uint64), codes.view(np.uint32)
    doubles = not f.is_unsigned and f.magnitude_bits == 1
    units = np.int32((f.magnitude_bits - 1 + doubles + 127) << 23).view(np.float32)
    zero = 0 if f.mode == AS_STORED else 1 << f.magnitude_bits
    groups = f.block // 8
    for first in range(0, len(values), TILE // f.block):
        n_blocks = min(TILE // f.block, len(values) - first)
        _find_largest(bits, first, n_blocks, largest)
        are_finite = _find_scales(largest, units, n_blocks, scales, first, factors, f)
        _encode(values, bits, first, n_blocks, factors, rows, f)
        if not are_finite:
            _clear_not_finite(scales, first, n_blocks, rows, zero, f.scale_nan)
        _pack(words, quads, code32, code16, code8, first * groups, n_blocks * groups, f)


@_compiled
def _decode_signed(codes, factors, values, first, n_blocks, offset):
    values = values[first : first + n_blocks]
    for b in range(n_blocks):
        factor = factors[b]
        for i in range(values.shape[1]):
            values[b, i] = np.float32(np.int32(np.int32(codes[b, i]) - offset)) * factor


@_compiled
def _decode_unsigned(codes, factors, values, first, n_blocks):
    values = values[first : first + n_blocks]
    for b in range(n_blocks):
        factor = factors[b]
        for i in range(values.shape[1]):
            values[b, i] = max(np.float32(codes[b, i]) - np.float32(0.5), np.float32(0)) * factor


@_compiled
def decompress(values, code32, code16, code8, scales, f):
    """The inverse: writes ``values``."""
    factors, codes = np.empty(TILE // 8, np.float32), np.empty(TILE, np.uint8)
    rows, words, quads = codes.reshape((-1, f.block)), codes.view(np.uint64), codes.view(np.uint32)
    step = np.int32((1 - f.magnitude_bits + 127) << 23).view(np.float32)
    groups = f.block // 8
    for first in range(0, len(values), TILE // f.block):
        n_blocks = min(TILE // f.block, len(values) - first)
        _find_steps(scales, first, n_blocks, step, factors, f)
        _unpack(words, quads, code32, code16, code8, first * groups, n_blocks * groups, f)
        if f.is_unsigned:
            _decode_unsigned(rows, factors, values, first, n_blocks)
        else:
            _decode_signed(rows, factors, values, first, n_blocks, np.int32(1 << f.magnitude_bits))
