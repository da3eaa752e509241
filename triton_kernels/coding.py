"""Values <-> codes under given scales, in plain torch: part of the definition, see ``BFPFormat``.

``values`` are float32 [n_blocks, block], ``scales`` S float32 [n_blocks], codes int64 [n_blocks, block].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import codebooks
from .format import FRACTION_BITS, BFPFormat

_SEARCH_FRACTION_BITS = 4
_SEARCH_LIMIT = 2047


def encode(values: Tensor, scales: Tensor, fmt: BFPFormat, noise: Tensor | None, levels: Sequence[int]) -> Tensor:
    """The codes. ``noise``: a byte (int64) for each value, or nothing for ``nearest`` and ``trunc``."""
    steps = in_steps(values, scales, fmt)
    if fmt.codebook:
        return _of_codebook(grid(steps, fmt), values, fmt, levels)
    top = (1 << fmt.magnitude_bits) - 1
    if fmt.unsigned:
        cells = _fraction(steps, noise, 128) if fmt.rounding != "nearest" else (steps - 0.5).float().round().long() + 1
        return torch.where(values > 0, cells.clamp(1, top), 0)
    magnitudes = _fraction(steps, noise, 0) if fmt.rounding != "nearest" else steps.abs().round().long()
    magnitudes = magnitudes.clamp(max=top)
    negative = (values < 0) & (magnitudes > 0)
    if fmt.twos:
        return torch.where(negative, (1 << fmt.width) - magnitudes, magnitudes)
    return magnitudes | (negative.long() << fmt.magnitude_bits)


def squared_errors(values: Tensor, scales: Tensor, codes: Tensor, fmt: BFPFormat, levels: Sequence[int]) -> Tensor:
    """The squared error of each value (int64), in units of its block's steps, or sixteenths of them without a codebook."""
    steps = in_steps(values, scales, fmt)
    if fmt.codebook:
        places = codes if fmt.signed_levels else codes & (fmt.n_levels - 1)
        errors = grid(steps, fmt, 2 * fmt.level_grid[-1] + 1) - _table(levels, fmt, codes.device)[places]
    else:
        steps = steps.abs()
        magnitudes = codes & ((1 << fmt.magnitude_bits) - 1)
        if fmt.twos:
            magnitudes = torch.where(codes >> fmt.magnitude_bits == 1, (1 << fmt.width) - codes, codes)
        one = 1 << _SEARCH_FRACTION_BITS
        errors = (steps * one).round().long() - (magnitudes * one - one // 2 * fmt.unsigned)
    if fmt.unsigned:
        errors = errors.masked_fill(values <= 0, 0)
    return errors.abs().clamp(max=_SEARCH_LIMIT) ** 2


def decode(
    codes: Tensor, scales: Tensor, fmt: BFPFormat, noise: tuple[Tensor, Tensor] | None, levels: Sequence[int]
) -> Tensor:
    """The values (float32). ``noise``: two bytes (int64) for each value, the second for ``density``, or nothing."""
    steps = _decoded_codebook(codes, fmt, noise, levels) if fmt.codebook else _decoded(codes, fmt, noise)
    return steps.float() * (scales * 2.0 ** (1 - fmt.grid_bits)).unsqueeze(1)


def in_steps(values: Tensor, scales: Tensor, fmt: BFPFormat) -> Tensor:
    """``values`` over a step (float64), as the exact product with fl(1/S); 0 where S is NaN or 0."""
    reciprocals = scales.reciprocal().double() * 2.0 ** (fmt.grid_bits - 1)
    return (values.double() * reciprocals.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)


def grid(steps: Tensor, fmt: BFPFormat, top: int = 0) -> Tensor:
    """The n on the grid of codebooks (int64), or as far as ``top``; magnitudes unless levels have their signs."""
    top = top or fmt.level_grid[-1]
    return (steps if fmt.signed_levels else steps.abs()).round().clamp(-top, top).long()


def _fraction(steps: Tensor, noise: Tensor | None, offset: int) -> Tensor:
    """Magnitudes in steps, brought to integers by way of 1/256 steps and the noise."""
    n = (steps.abs() * (1 << FRACTION_BITS)).round().long() + offset
    return (n if noise is None else n + noise) >> FRACTION_BITS


def _of_codebook(n: Tensor, values: Tensor, fmt: BFPFormat, levels: Sequence[int]) -> Tensor:
    codes = torch.tensor(codebooks.codes_of_grid(levels, fmt.level_grid), device=n.device)[n - fmt.level_grid[0]]
    if fmt.signed_levels:
        return codes
    if fmt.unsigned:
        return torch.where(values > 0, codes.clamp(min=1), 0)
    negative = (values < 0) & ((codes > 0) | (levels[0] > 0))
    return codes | (negative.long() << fmt.magnitude_bits)


def _table(levels: Sequence[int], fmt: BFPFormat, device: torch.device) -> Tensor:
    """The level of each code; codes beyond the last level have that."""
    padded = [*levels, *[levels[-1]] * (fmt.n_levels - len(levels))]
    return torch.tensor(padded, device=device)


def _sign_and_magnitude(codes: Tensor, fmt: BFPFormat) -> tuple[Tensor, Tensor]:
    """1 or -1, and the magnitude."""
    sign = 1 - 2 * (codes >> fmt.magnitude_bits)
    if fmt.twos:
        return sign, torch.where(sign < 0, (1 << fmt.width) - codes, codes)
    return sign, codes & ((1 << fmt.magnitude_bits) - 1)


def _decoded(codes: Tensor, fmt: BFPFormat, noise: tuple[Tensor, Tensor] | None) -> Tensor:
    """In steps (float64, exact)."""
    sign, magnitudes = _sign_and_magnitude(codes, fmt)
    middles = magnitudes - 0.5 * fmt.unsigned
    if noise is not None:
        away = torch.where(magnitudes > 0, _away_from_zero(noise, fmt), noise[0])
        middles = middles + (away + 0.5) / 256 - 0.5
    return sign * (middles.masked_fill(codes == 0, 0.0) if fmt.unsigned else middles) + 0.0  # no minus zero


def _decoded_codebook(
    codes: Tensor, fmt: BFPFormat, noise: tuple[Tensor, Tensor] | None, levels: Sequence[int]
) -> Tensor:
    sign, places = (torch.ones_like(codes), codes) if fmt.signed_levels else _sign_and_magnitude(codes, fmt)
    middles = _table(levels, fmt, codes.device)[places]
    if noise is not None:
        first, last = (torch.tensor(ends, device=codes.device)[places] for ends in cells(levels, fmt))
        away = (_away_from_zero(noise, fmt) * (last - first + 1)) >> 8
        middles = torch.where(middles > 0, first + away, torch.where(middles < 0, last - away, middles))
    return sign * middles


def _away_from_zero(noise: tuple[Tensor, Tensor], fmt: BFPFormat) -> Tensor:
    """How far a value lies in its cell, from the end nearer to zero, in 256 parts."""
    first, second = noise
    return torch.where(second & 1 == 1, torch.minimum(first, second), first) if fmt.dither == "density" else first


def cells(levels: Sequence[int], fmt: BFPFormat) -> tuple[list[int], list[int]]:
    """The least and the greatest n of each code's cell: ``codebooks.cells``."""
    return codebooks.cells(levels, fmt.n_levels, fmt.level_grid, signed=fmt.signed_levels, first_is_zero=fmt.unsigned)
