"""The shared scales of blocks in plain torch: from largest magnitudes to codes, to floats, to bytes, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import outliers
from .format import BFPFormat

_SIGN_BIT = 7


@dataclass(frozen=True)
class First:
    """Scales before any search: their codes [n_blocks] (int64), which values they were made from, the others."""

    codes: Tensor
    counted: Tensor  # [n_blocks, block] bool
    found: outliers.Outliers | None
    least_exponents: Tensor | None  # [n_blocks], biased


def first(values: Tensor, fmt: BFPFormat, dtype: str) -> First:
    """The scales of ``values`` [n_blocks, block] (float32), which were of the dtype of that name."""
    magnitudes = values.abs()
    largest = magnitudes.amax(dim=1)  # a NaN wins
    finite = largest.isfinite()
    counted, found, least = torch.ones_like(values, dtype=torch.bool), None, None
    if fmt.outliers:
        found, chosen = outliers.choose(values, fmt)
        counted, least = ~chosen, found.least_exponent(fmt)
        largest = torch.where(finite, magnitudes.masked_fill(chosen, 0.0).amax(dim=1), largest)
    codes = codes_of_largest(largest, fmt, dtype, least)
    codes = codes.masked_fill(~finite, fmt.scale_kind.nan)
    if fmt.zero_scale:
        codes = codes.masked_fill((values == 0).all(dim=1), 0)
    if fmt.scale_kind.signed:
        kept = values.masked_fill(~counted, 0.0)
        negative = (kept.amax(dim=1) < -kept.amin(dim=1)) & (codes != fmt.scale_kind.nan)
        codes = codes | (negative.long() << _SIGN_BIT)
    return First(codes, counted, found, least)


def codes_of_largest(largest: Tensor, fmt: BFPFormat, dtype: str, least_exponents: Tensor | None = None) -> Tensor:
    """Scale codes [n_blocks] (int64) for the largest magnitude (float32) of each block.

    ``least_exponents`` [n_blocks], biased: what S must be at least, besides.
    """
    scale = fmt.scale_kind
    bits = (largest * fmt.peak_factor).view(torch.int32).long() + fmt.scale_addend
    codes = ((bits >> scale.shift) - scale.base).clamp(min=fmt.least_scale(dtype))
    if least_exponents is not None:
        codes = torch.maximum(codes, (least_exponents << scale.mantissa_bits) - scale.base)
    return codes.clamp(max=scale.nan)


def candidate(first: Tensor, offset: int, fmt: BFPFormat, dtype: str, least_exponents: Tensor | None = None) -> Tensor:
    """The codes ``offset`` from ``first``, within the range, of the same sign; NaN and 0 stay."""
    scale = fmt.scale_kind
    first, sign = magnitudes(first, fmt), first - magnitudes(first, fmt)
    codes = (first + offset).clamp(fmt.least_scale(dtype), scale.nan - 1)
    if least_exponents is not None:
        codes = torch.maximum(codes, (least_exponents << scale.mantissa_bits) - scale.base)
    return sign + torch.where((first == scale.nan) | (first == 0), first, codes)


def magnitudes(codes: Tensor, fmt: BFPFormat) -> Tensor:
    """The codes without their sign, if they have one."""
    return codes & fmt.scale_kind.nan


def floats(codes: Tensor, fmt: BFPFormat) -> Tensor:
    """S (float32) of each code (int64): NaN for NaN, and 0 for code 0 where that is the scale of zeros."""
    scale = fmt.scale_kind
    unsigned = magnitudes(codes, fmt)
    values = ((unsigned + scale.base) << scale.shift).to(torch.int32).view(torch.float32)
    if fmt.zero_scale:
        values = values.masked_fill(unsigned == 0, 0.0)
    return torch.where(codes > unsigned, -values, values).masked_fill(unsigned == scale.nan, torch.nan)


def exponents(codes: Tensor, fmt: BFPFormat) -> Tensor:
    """The biased exponent of S (int64)."""
    return (magnitudes(codes, fmt) + fmt.scale_kind.base) >> fmt.scale_kind.mantissa_bits


def squared(codes: Tensor, fmt: BFPFormat, least: Tensor) -> Tensor:
    """S squared (int64), in units that depend on ``least`` alone, the least code of those to be compared."""
    scale = fmt.scale_kind
    one = 1 << scale.mantissa_bits
    mantissas = one + ((magnitudes(codes, fmt) + scale.base) & (one - 1))
    return (mantissas * mantissas) << (2 * (exponents(codes, fmt) - exponents(least, fmt)))
