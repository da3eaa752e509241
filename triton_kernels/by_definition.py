"""Stores and restores values by the definition, a chunk at a time, as it takes some ten times the memory of its values.

For formats that have nothing faster; on any device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import learned, reference
from .format import BFPFormat

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def compress(x_flat: Tensor, fmt: BFPFormat, seed: Tensor | None, chunk: int) -> tuple[Tensor, ...]:
    """As ``reference.compress``. ``chunk``: values at a time, a whole number of groups of blocks of any size."""
    levels = learned.levels_of(x_flat, fmt) if fmt.codebook == "learned" and x_flat.dtype in _FLOATS else None
    starts = range(0, max(x_flat.numel(), 1), chunk)
    parts = [
        reference.compress(x_flat[start : start + chunk], fmt, seed, first_value=start, levels=levels)
        for start in starts
    ]
    planes = [torch.cat(part) for part in zip(*parts, strict=True)]
    return (*planes[:-1], parts[0][-1]) if fmt.codebook == "learned" else tuple(planes)


def decompress(
    planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, seed: Tensor | None, chunk: int
) -> Tensor:
    """As ``reference.decompress``, ``chunk`` as above."""
    out = planes[0].new_empty(numel, dtype=dtype)
    for start in range(0, max(numel, 1), chunk):
        part = out[start : start + chunk]
        before, through = fmt.planes(start), fmt.planes(start + part.numel())
        inside = [
            plane if a.name == "level" else plane[a.length : b.length]
            for plane, a, b in zip(planes, before, through, strict=True)
        ]
        part.copy_(reference.decompress(inside, fmt, part.numel(), dtype, seed, first_value=start))
    return out
