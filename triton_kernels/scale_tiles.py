"""The shared scales of a tile's blocks, in registers: from the values' bits to codes, to what values are multiplied by.

Functions of tiles take the ``Codec`` C as a compile-time argument.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import largest
from .pair_tiles import doubled_extremes, doubled_largest, float_bits

_SIGN_BIT = tl.constexpr(7)  # of a scale's code
_GUESS = tl.constexpr(0x7EF27000)  # less the bits of a float, those of about its reciprocal


@triton.jit
def scales_of(a, b, C: tl.constexpr):
    """Scale codes [BLOCKS] (int32) of a tile (a, b) as it was loaded.

    Both as they are stored, and as they serve to encode: without the code that says that a block is zero.
    """
    if C.scale_signed:
        positive, opposite = _doubled_extremes(a, b, C)
        doubled = tl.maximum(positive, opposite)
    else:
        doubled = magnitudes_of_blocks(a, b, C)
    code = code_of(doubled, C)
    if C.scale_addend > 0 or C.scale_base > 0:
        code = tl.minimum(code, C.scale_nan)
    if C.scale_signed:
        negative = tl.where(opposite > positive, 1 << 7, 0)
        code = tl.where(code == C.scale_nan, code, code | negative)
    stored = code
    if C.scale_zero:
        stored = tl.where(doubled == 0, 0, code)
    return stored, code


@triton.jit
def code_of(doubled, C: tl.constexpr):
    """The scale's code, which may lie beyond the range, for the bits of each block's largest magnitude, times 2."""
    if C.scale_addend > 0:
        peak = ((doubled >> 1).to(tl.float32, bitcast=True) * C.peak_factor).to(tl.uint32, bitcast=True)
        code = ((peak + C.scale_addend) >> C.scale_shift).to(tl.int32)
    else:
        code = (doubled >> (C.scale_shift + 1)).to(tl.int32)
    return tl.maximum(code - C.scale_base, C.scale_least)


@triton.jit
def exponent_of(code, C: tl.constexpr):
    """The biased exponent of S."""
    return (code + C.scale_base) >> C.scale_mantissa_bits


@triton.jit
def magnitudes_of_blocks(a, b, C: tl.constexpr):
    """Twice the bits of each block's largest magnitude; infinities and NaNs are on top."""
    if C.dtype != 0 and C.packs:
        return doubled_largest(a, C)
    else:
        if C.dtype != 0:
            a, b = float_bits(a, C)
        return largest(tl.maximum((a << 1).to(tl.uint32, bitcast=True), (b << 1).to(tl.uint32, bitcast=True)), C)


@triton.jit
def _doubled_extremes(a, b, C: tl.constexpr):
    """The same of the values from 0 on, and of those below zero, if there are any."""
    if C.dtype != 0 and C.packs:
        return doubled_extremes(a, C)
    else:
        if C.dtype != 0:
            a, b = float_bits(a, C)
        positive = tl.maximum(largest(tl.maximum(a, b), C), 0).to(tl.uint32, bitcast=True)
        opposite = largest(tl.maximum(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)), C)
        return positive << 1, opposite << 1


@triton.jit
def reciprocal(code, MORE: tl.constexpr, C: tl.constexpr):
    """fl(1/S) * 2^(grid_bits - 1 + MORE), what values are multiplied by."""
    if C.scale_mantissa_bits == 0:
        return ((-code + (253 + C.grid_bits + MORE - C.scale_base)) << 23).to(tl.float32, bitcast=True)
    else:
        bits = _bits(code, C.grid_bits - 1 + MORE, C)
        scale = bits.to(tl.float32, bitcast=True)
        inverse = (-bits + _GUESS).to(tl.float32, bitcast=True)
        error = tl.fma(-scale, inverse, 1.0)
        inverse = tl.fma(inverse, tl.fma(error, error, error), inverse)  # an error of 6 % is cubed
        error = tl.fma(-scale, inverse, 1.0)
        if C.scale_mantissa_bits > 2:  # for the mantissas of fewer bits, its square is enough
            error = tl.fma(error, error, error)
        inverse = tl.fma(inverse, error, inverse)
        return _with_sign(inverse, code, C)


@triton.jit
def step(code, C: tl.constexpr):
    """S * 2^(1 - grid_bits), what decoded integers are multiplied by; NaN where the block is."""
    value = _bits(code, C.grid_bits - 1, C).to(tl.float32, bitcast=True)
    if C.scale_zero:
        value = tl.where((code & C.scale_nan) == 0, 0.0, value)
    if C.scale_signed:
        value = _with_sign(value, code, C)
    return tl.where((code & C.scale_nan) == C.scale_nan, float("nan"), value)


@triton.jit
def _bits(code, LESS: tl.constexpr, C: tl.constexpr):
    """The bits of |S| * 2^-LESS."""
    if C.scale_signed:
        code = code & C.scale_nan
    return (code + (C.scale_base - (LESS << C.scale_mantissa_bits))) << C.scale_shift


@triton.jit
def _with_sign(value, code, C: tl.constexpr):
    if C.scale_signed:
        sign = (code >> _SIGN_BIT) << 31
        return (value.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    else:
        return value
