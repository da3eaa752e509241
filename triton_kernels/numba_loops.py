"""The loops of ``jitted``, which alone imports this: numba compiles them when they are first called.

The steps are those of ``bfp.c``, for codes that are even and rounded to nearest. Values pass in tiles that stay in the
first-level cache, and every step is one flat loop, which LLVM makes vectors of; nested loops and small blocks it leaves alone.
numba makes 64 bits of every sum of integers: where it is made 32 again at once, twice as many fit in a vector.
Compiled code is kept on disk where numba finds a place for it: by the date of this file, so that all loops are in this one.
"""

# mypy: disable-error-code="no-untyped-def"
# (numba finds the types itself)

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

TILE = 1024
"""Values at a time: a whole number of blocks of any size."""

ROUND32, ROUND64 = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
SIGNS, MAGNITUDES = np.uint32(0x88888888), np.uint32(0x77777777)
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
def _find_largest(bits, largest, scratch, n, block):
    """Of each block, by halves: the larger of two neighbours, until one is left."""
    magnitude = np.int32(0x7FFFFFFF)
    for i in range(n // 2):
        largest[i] = max(np.int32(bits[2 * i] & magnitude), np.int32(bits[2 * i + 1] & magnitude))
    left = n // 2
    while left > n // block:
        left //= 2
        for i in range(left):
            scratch[i] = max(largest[2 * i], largest[2 * i + 1])
        for i in range(left):
            largest[i] = scratch[i]


@_compiled
def _scales_of(largest, codes, n_blocks, f):
    shift, base, nan, least = np.int32(f.scale_shift), np.int32(f.scale_base), np.int32(f.scale_nan), f.least_scale
    addend = np.int32(f.scale_addend)
    peak = np.float32(f.peak_factor)
    for b in range(n_blocks):
        bits = np.float32(np.int32(largest[b]).view(np.float32) * peak).view(np.int32) + addend
        code = min(max(np.int32(np.int32(bits >> shift) - base), np.int32(least)), nan)
        codes[b] = nan if largest[b] >= np.int32(0x7F800000) else code


@_compiled
def _floats_of(codes, scales, n_blocks, f):
    """S of each block as a float32."""
    base, shift, nan = np.int32(f.scale_base), np.int32(f.scale_shift), np.int32(f.scale_nan)
    for b in range(n_blocks):
        code = np.int32(codes[b])
        bits = np.int32(0x7FC00000) if code == nan else np.int32(np.int32(code + base) << shift)
        scales[b] = np.int32(bits).view(np.float32)


@_compiled
def _spread(of_blocks, factors, n_blocks, block):
    for b in range(n_blocks):
        factors[b * block : (b + 1) * block] = of_blocks[b]


@_compiled
def _encode_signed32(values, factors, codes, n, magnitude_bits):
    """Codes plus 2^M, for scales that are powers of two. One bit of magnitude doubles all: 1/step may be no normal float."""
    offset, double = 1 << magnitude_bits, 2 if magnitude_bits == 1 else 1
    added, zero = np.float32((ROUND32 + offset) * double), np.float32(ROUND32 * double).view(np.int32)
    least, top = np.int32(1), np.int32(2 * offset - 1)
    for i in range(n):
        sum = np.int32(np.float32(values[i] * factors[i] + added).view(np.int32) - zero)
        codes[i] = np.uint8(max(min(sum, top), least))


@_compiled
def _encode_signed64(values, factors, codes, n, magnitude_bits):
    """For other scales: in float64 the product is exact, and the sum is rounded once."""
    offset, double = 1 << magnitude_bits, 2 if magnitude_bits == 1 else 1
    added, zero = np.float64((ROUND64 + offset) * double), np.float64(ROUND64 * double).view(np.int64)
    for i in range(n):
        sum = np.float64(np.float64(values[i]) * np.float64(factors[i]) + added).view(np.int64) - zero
        codes[i] = np.uint8(max(min(sum, 2 * offset - 1), 1))


@_compiled
def _encode_unsigned32(values, bits, factors, codes, n, magnitude_bits):
    top, one = np.int32((1 << magnitude_bits) - 1), np.int32(np.float32(ROUND32).view(np.int32) - np.int32(1))
    for i in range(n):
        cell = np.float32(values[i] * factors[i] - np.float32(0.5))
        code = min(np.int32(np.float32(cell + ROUND32).view(np.int32) - one), bits[i])
        codes[i] = np.uint8(min(max(code, np.int32(0)), top))


@_compiled
def _encode_unsigned64(values, bits, factors, codes, n, magnitude_bits):
    top, one = np.int32((1 << magnitude_bits) - 1), np.int32(np.float32(ROUND32).view(np.int32) - np.int32(1))
    for i in range(n):
        cell = np.float32(np.float64(values[i]) * np.float64(factors[i]) - 0.5)
        code = min(np.int32(np.float32(cell + ROUND32).view(np.int32) - one), bits[i])
        codes[i] = np.uint8(min(max(code, np.int32(0)), top))


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
def _nibbles_to_stored(words, stored):
    """The same of eight codes of 4 bits in each word."""
    for g in range(len(stored)):
        negative = np.uint32(np.uint32(words[g] & SIGNS) ^ SIGNS)
        ones = np.uint32(negative >> np.uint32(3))
        flipped = np.uint32(np.uint32(words[g] ^ np.uint32(negative - ones)) & MAGNITUDES)
        stored[g] = np.uint32(np.uint32(flipped + ones) | negative)


@_compiled
def _nibbles_from_stored(stored, words):
    for g in range(len(stored)):
        negative = np.uint32(stored[g] & SIGNS)
        ones = np.uint32(negative >> np.uint32(3))
        flipped = np.uint32(np.uint32(stored[g] & MAGNITUDES) ^ np.uint32(negative - ones))
        words[g] = np.uint32(np.uint32(flipped + ones) + np.uint32(negative ^ SIGNS))


@_compiled
def _each(value, period):
    """The uint64 with ``value`` at each multiple of ``period`` bits."""
    word = np.uint64(0)
    for shift in range(0, 64, period):
        word |= np.uint64(value) << np.uint64(shift)
    return word


@_compiled
def _narrow(words, n, width):
    """A code in each byte -> eight in the low bits."""
    for fields in (1, 2, 4):
        bits, gap = np.uint64(width * fields), np.uint64((8 - width) * fields)
        lower = _each((1 << (width * fields)) - 1, 16 * fields)
        upper = lower << bits
        for g in range(n):
            words[g] = (words[g] & lower) | ((words[g] >> gap) & upper)


@_compiled
def _widen(words, n, width):
    for fields in (4, 2, 1):
        bits, gap = np.uint64(width * fields), np.uint64((8 - width) * fields)
        lower = _each((1 << (width * fields)) - 1, 16 * fields)
        upper = lower << bits
        for g in range(n):
            words[g] = (words[g] & lower) | ((words[g] & upper) << gap)


@_compiled
def _pack(codes, halves, code32, code16, code8, first, n, f):
    """``n`` groups of codes to the planes, from group ``first`` on. ``halves``: uint8 [TILE / 2], for what is between."""
    width, below = f.width, np.uint64(f.width - 1)
    words = codes.view(np.uint64)
    if width == 4:
        pairs, nibbles = codes.view(np.uint16), halves.view(np.uint32)
        for i in range(4 * n):
            halves[i] = np.uint8(pairs[i] | np.uint16(pairs[i] >> np.uint16(4)))
        if f.mode == SIGN_MAGNITUDE:
            _nibbles_to_stored(nibbles, code32[first : first + n])
            return
        flip = SIGNS if f.mode == COMPLEMENT else np.uint32(0)
        for g in range(n):
            code32[first + g] = np.uint32(nibbles[g] ^ flip)
        return
    _to_stored(words, n, _each(1 << (width - 1), 8), below, f.mode)
    if width == 8:
        code32[2 * first : 2 * (first + n)] = codes.view(np.uint32)[: 2 * n]
        return
    _narrow(words, n, width)
    shift16 = np.uint64(32 if width & 4 else 0)
    shift8 = shift16 + np.uint64(16 if width & 2 else 0)
    for g in range(n if width & 4 else 0):
        code32[first + g] = np.uint32(words[g])
    for g in range(n if width & 2 else 0):
        code16[first + g] = np.uint16(words[g] >> shift16)
    for g in range(n if width & 1 else 0):
        code8[first + g] = np.uint8(words[g] >> shift8)


@_compiled
def _unpack(codes, halves, code32, code16, code8, first, n, f):
    width, below = f.width, np.uint64(f.width - 1)
    words = codes.view(np.uint64)
    if width == 4:
        pairs, nibbles = codes.view(np.uint16), halves.view(np.uint32)
        flip = SIGNS if f.mode == COMPLEMENT else np.uint32(0)
        if f.mode == SIGN_MAGNITUDE:
            _nibbles_from_stored(code32[first : first + n], nibbles)
        else:
            for g in range(n):
                nibbles[g] = np.uint32(code32[first + g] ^ flip)
        for i in range(4 * n):
            pair = np.uint16(halves[i])
            pairs[i] = np.uint16(pair | np.uint16(pair << np.uint16(4))) & np.uint16(0x0F0F)
        return
    if width == 8:
        codes.view(np.uint32)[: 2 * n] = code32[2 * first : 2 * (first + n)]
    else:
        shift16 = np.uint64(32 if width & 4 else 0)
        shift8 = shift16 + np.uint64(16 if width & 2 else 0)
        words[:n] = np.uint64(0)
        for g in range(n if width & 4 else 0):
            words[g] = np.uint64(code32[first + g])
        for g in range(n if width & 2 else 0):
            words[g] |= np.uint64(code16[first + g]) << shift16
        for g in range(n if width & 1 else 0):
            words[g] |= np.uint64(code8[first + g]) << shift8
        _widen(words, n, width)
    _from_stored(words, n, _each(1 << (width - 1), 8), below, f.mode)


@_compiled
def _encode(values, bits, factors, codes, n, f):
    if f.is_unsigned and f.scale_shift == 23:
        _encode_unsigned32(values, bits, factors, codes, n, f.magnitude_bits)
    elif f.is_unsigned:
        _encode_unsigned64(values, bits, factors, codes, n, f.magnitude_bits)
    elif f.scale_shift == 23:
        _encode_signed32(values, factors, codes, n, f.magnitude_bits)
    else:
        _encode_signed64(values, factors, codes, n, f.magnitude_bits)


@_compiled
def _clear_not_finite(scales, codes, n_blocks, f, zero):
    greatest = np.int32(0)
    for b in range(n_blocks):
        greatest = max(greatest, scales[b])
    for b in range(n_blocks if greatest == f.scale_nan else 0):
        if scales[b] == f.scale_nan:
            codes[b * f.block : (b + 1) * f.block] = zero


@_compiled
def compress(values, bits, code32, code16, code8, scales, f):
    """``values`` (float32, whole blocks) and the same as ``bits`` (int32) -> the planes (unsigned; empty if not used)."""
    largest, scratch = np.empty(TILE // 2, np.int32), np.empty(TILE // 2, np.int32)
    of_blocks, factors = np.empty(TILE // 8, np.float32), np.empty(TILE, np.float32)
    found, codes, halves = np.empty(TILE // 8, np.int32), np.empty(TILE, np.uint8), np.empty(TILE // 2, np.uint8)
    doubles = not f.is_unsigned and f.magnitude_bits == 1
    units = np.int32((f.magnitude_bits - 1 + doubles + 127) << 23).view(np.float32)
    zero = 0 if f.mode == AS_STORED else 1 << f.magnitude_bits
    for start in range(0, len(values), TILE):
        tile, tile_bits = values[start : start + TILE], bits[start : start + TILE]
        n = len(tile)
        n_blocks = n // f.block
        _find_largest(tile_bits, largest, scratch, n, f.block)
        _scales_of(largest, found, n_blocks, f)
        _floats_of(found, of_blocks, n_blocks, f)
        for b in range(n_blocks):
            of_blocks[b] = units / of_blocks[b]
        _spread(of_blocks, factors, n_blocks, f.block)
        _encode(tile, tile_bits, factors, codes, n, f)
        _clear_not_finite(found, codes, n_blocks, f, zero)
        for b in range(n_blocks):
            scales[start // f.block + b] = np.uint8(found[b])
        _pack(codes, halves, code32, code16, code8, start // 8, n // 8, f)


@_compiled
def _decode_signed(codes, factors, values, n, offset):
    for i in range(n):
        values[i] = np.float32(np.int32(np.int32(codes[i]) - offset)) * factors[i]


@_compiled
def _decode_unsigned(codes, factors, values, n):
    for i in range(n):
        values[i] = max(np.float32(codes[i]) - np.float32(0.5), np.float32(0)) * factors[i]


@_compiled
def decompress(values, code32, code16, code8, scales, f):
    """The inverse: writes ``values``."""
    of_blocks, factors = np.empty(TILE // 8, np.float32), np.empty(TILE, np.float32)
    codes, halves = np.empty(TILE, np.uint8), np.empty(TILE // 2, np.uint8)
    step = np.int32((1 - f.magnitude_bits + 127) << 23).view(np.float32)
    for start in range(0, len(values), TILE):
        tile = values[start : start + TILE]
        n = len(tile)
        _floats_of(scales[start // f.block :], of_blocks, n // f.block, f)
        for b in range(n // f.block):
            of_blocks[b] *= step
        _spread(of_blocks, factors, n // f.block, f.block)
        _unpack(codes, halves, code32, code16, code8, start // 8, n // 8, f)
        if f.is_unsigned:
            _decode_unsigned(codes, factors, tile, n)
        else:
            _decode_signed(codes, factors, tile, n, np.int32(1 << f.magnitude_bits))
