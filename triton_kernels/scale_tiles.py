"""The shared scales of a tile's blocks, in registers: from the values' bits to codes, to what values are multiplied by.

Functions of tiles take the ``Codec`` C as a compile-time argument.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

_SIGN_BIT = tl.constexpr(7)  # of a scale's code
_GUESS = tl.constexpr(0x7EF27000)  # less the bits of a float, those of about its reciprocal


@triton.jit
def scales_of(a, b, BLOCKS: tl.constexpr, C: tl.constexpr):
    """Scale codes [BLOCKS] (int32) of a tile of float32 bits (a, b) whose blocks are BLOCKS equal runs of groups.

    Both as they are stored, and as they serve to encode: without the code that says that a block is zero.
    """
    if C.scale_signed:
        positive = tl.maximum(_largest(a, b, BLOCKS), 0).to(tl.uint32, bitcast=True) << 1
        opposite = _largest(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True), BLOCKS) << 1
        doubled = tl.maximum(positive, opposite)
    else:
        doubled = _largest((a << 1).to(tl.uint32, bitcast=True), (b << 1).to(tl.uint32, bitcast=True), BLOCKS)
    code = code_of(doubled, C)
    if C.scale_up or C.scale_base > 0:
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
    if C.scale_up:
        peak = ((doubled >> 1).to(tl.float32, bitcast=True) * C.peak_factor).to(tl.uint32, bitcast=True)
        code = ((peak + ((1 << C.scale_shift) - 1)) >> C.scale_shift).to(tl.int32)
    else:
        code = (doubled >> (C.scale_shift + 1)).to(tl.int32)
    return tl.maximum(code - C.scale_base, C.scale_least)


@triton.jit
def exponent_of(code, C: tl.constexpr):
    """The biased exponent of S."""
    return (code + C.scale_base) >> C.scale_mantissa_bits


@triton.jit
def _largest(a, b, BLOCKS: tl.constexpr):
    """The greatest integer of each block, infinities and NaNs among those on top."""
    return tl.max(tl.reshape(tl.maximum(a, b), [BLOCKS, a.numel // BLOCKS]), axis=1)


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
