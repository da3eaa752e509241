"""Codebooks fitted to data: for one tensor while it is stored (``:learned``), or once, from samples, for a format's text.

Source: Lloyd, Least squares quantization in PCM, 1982; US12277502B2 (codes whose levels are not evenly spaced).
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import codebooks, coding, shared_scales as scales
from .format import LEARNED_BLOCKS, LEARNED_ROUNDS, BFPFormat

_FULL_ROUNDS = 200


def learn_codebook(samples: Tensor, fmt: BFPFormat) -> BFPFormat:
    """``fmt`` with explicit levels, fitted to ``samples`` (any shape; float32, bfloat16 or float16).

    Blocks are runs of ``samples`` flattened. The levels are those of small squared error over all samples, each in units of
    its block's scale; ``fmt`` may have any codebook, or none.

    Raises:
        FormatError: ``fmt`` cannot have a codebook.
    """
    wanted = replace(fmt, codebook="learned")
    levels = _fit(samples.detach().flatten(), wanted, stride=1, rounds=_FULL_ROUNDS)
    return replace(fmt, codebook=bytes(level & 255 for level in levels).hex())


def levels_of(x_flat: Tensor, fmt: BFPFormat) -> tuple[int, ...]:
    """The levels of ``:learned`` for a tensor [numel]: fitted to at most 1024 of its blocks."""
    n_blocks = fmt.n_blocks(x_flat.numel())
    return _fit(x_flat, fmt, stride=max(1, -(-n_blocks // LEARNED_BLOCKS)), rounds=LEARNED_ROUNDS)


def _fit(x_flat: Tensor, fmt: BFPFormat, *, stride: int, rounds: int) -> tuple[int, ...]:
    grid = fmt.level_grid
    counts = torch.bincount(_on_grid(x_flat, fmt, stride) - grid[0], minlength=len(grid)).tolist()
    return codebooks.fit(counts, fmt.levels, grid=grid, rounds=rounds, first_is_zero=fmt.unsigned)


def _on_grid(x_flat: Tensor, fmt: BFPFormat, stride: int) -> Tensor:
    """The n of the values of every ``stride``-th block that a level is for, under the scales before any search."""
    numel = x_flat.numel()
    starts = torch.arange(0, numel, fmt.block * stride, device=x_flat.device)
    places = starts.unsqueeze(1) + torch.arange(fmt.block, device=x_flat.device)
    inside = places < numel
    values = x_flat.detach()[places.clamp(max=max(numel - 1, 0))].float().masked_fill(~inside, 0.0)
    first = scales.first(values, fmt, str(x_flat.dtype).removeprefix("torch."))
    n = coding.grid(coding.in_steps(values, scales.floats(first.codes, fmt), fmt), fmt)
    finite = (scales.magnitudes(first.codes, fmt) != fmt.scale_kind.nan).unsqueeze(1)
    return n[first.counted & finite & ((values > 0) if fmt.unsigned else (values != 0))]
