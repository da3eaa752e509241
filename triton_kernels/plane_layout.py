"""The planes of a format as operators need them call by call: torch dtypes and lengths, worked out once a format."""

from dataclasses import dataclass
from functools import cache

import torch

from .format import GROUP, BFPFormat


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """``per_part`` elements for each part of ``blocks`` blocks, the last part a whole one; without blocks, a fixed length."""

    name: str
    dtype: torch.dtype
    per_part: int
    blocks: int

    def length(self, n_blocks: int) -> int:
        """Elements of the plane, for so many blocks."""
        return -(-n_blocks // self.blocks) * self.per_part if self.blocks else self.per_part


@cache
def plane_layouts(fmt: BFPFormat) -> tuple[PlaneLayout, ...]:
    """Of each of ``fmt.planes(numel)``, for any number of values: read off those of 1 and 8 blocks."""
    one, eight = fmt.planes(fmt.block), fmt.planes(GROUP * fmt.block)
    return tuple(
        PlaneLayout(a.name, getattr(torch, a.dtype), a.length, _blocks_of_part(a.name, a.length, b.length))
        for a, b in zip(one, eight, strict=True)
    )


def _blocks_of_part(name: str, of_one: int, of_eight: int) -> int:
    if name == "level":
        return 0
    return GROUP if of_one == of_eight else 1
