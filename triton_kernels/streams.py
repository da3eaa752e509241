"""The planes of a compressed tensor as streams of symbols, for lossless coding on the host, and back.

A stream is an array of unsigned integers of at most 8 bits. Every bit of every plane is in one of them, so what restores the
streams restores the planes exactly, whatever they hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import packing, tiling
from .format import GROUP, BFPFormat

Symbols = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of a stream beforehand: ``length`` symbols of ``bits`` bits, a matrix of ``columns`` columns.

    The symbols are the matrix row by row; its last row may be short.
    """

    name: str
    bits: int
    length: int
    columns: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the symbols, packed."""
        return (self.length * self.bits + 7) // 8


def layouts(fmt: BFPFormat, shape: Sequence[int]) -> list[Layout]:
    """The streams of a tensor of that shape in that format.

    ``code``: one symbol for each stored value, row by row of the tensor's last dimension, filled up as it is stored: in tiles
    to whole tiles, in runs to a whole last block. ``scale``: one a block. ``outlier low`` and ``outlier high``: the
    bytes of the entries. ``level``: a learned codebook.
    """
    n_blocks = fmt.n_blocks(fmt.stored_numel(shape))
    columns = _filled(shape, fmt)[-1] if shape else 1
    streams = [Layout("code", fmt.width, n_blocks * fmt.block, max(columns, 1))]
    bits = fmt.scale_kind.bits
    streams.append(_row("scale", bits, n_blocks if bits == 8 else -(-n_blocks // GROUP) * GROUP))
    if fmt.outliers:
        streams += [_row(f"outlier {part}", 8, n_blocks * fmt.outliers) for part in ("low", "high")]
    if fmt.codebook == "learned":
        streams.append(_row("level", 8, fmt.n_levels))
    return streams


def split(planes: Sequence[Tensor], fmt: BFPFormat, shape: Sequence[int]) -> list[Symbols]:
    """The symbols of each stream of ``layouts(fmt, shape)``, from the planes (on the CPU) of ``fmt.planes``."""
    n_codes = len(fmt.group_planes)
    n_scales = 1 if fmt.scale_kind.bits == 8 else len(_scale_format(fmt).group_planes)
    codes = packing.unpack(planes[:n_codes], fmt.width, fmt.group_planes).flatten()
    if fmt.rows:
        codes = tiling.from_stored(codes, fmt, _filled(shape, fmt)).flatten()
    scales = planes[n_codes]
    if fmt.scale_kind.bits < 8:
        scale_planes = planes[n_codes : n_codes + n_scales]
        scales = packing.unpack(scale_planes, fmt.scale_kind.bits, _scale_format(fmt).group_planes).flatten()
    streams = [codes, scales]
    if fmt.outliers:
        streams += planes[n_codes + n_scales].contiguous().view(torch.uint8).view(-1, 2).unbind(dim=1)
    if fmt.codebook == "learned":
        streams.append(planes[-1])
    return [stream.to(torch.uint8).contiguous().numpy() for stream in streams]


def join(streams: Sequence[Symbols], fmt: BFPFormat, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The planes whose ``split`` is ``streams``."""
    codes, scales, *others = (torch.from_numpy(stream.copy()) for stream in streams)
    if fmt.rows:
        codes = tiling.to_stored(codes.view(_filled(shape, fmt)), fmt)
    planes = packing.pack(codes, fmt.width, fmt.group_planes)
    if fmt.scale_kind.bits == 8:
        planes.append(scales)
    else:
        planes += packing.pack(scales, fmt.scale_kind.bits, _scale_format(fmt).group_planes)
    if fmt.outliers:
        planes.append(torch.stack(others[:2], dim=1).flatten().view(torch.int16))
    if fmt.codebook == "learned":
        planes.append(others[-1])
    return tuple(planes)


def _row(name: str, bits: int, length: int) -> Layout:
    return Layout(name, bits, length, max(length, 1))


def _scale_format(fmt: BFPFormat) -> BFPFormat:
    """The format whose codes are packed as these narrow scales are."""
    return BFPFormat(fmt.scale_kind.bits, GROUP)


def _filled(shape: Sequence[int], fmt: BFPFormat) -> list[int]:
    """The shape; where blocks are tiles, that of the matrix filled up to whole tiles."""
    if not fmt.rows:
        return list(shape)
    n_rows, n_columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    return [-(-n_rows // fmt.rows) * fmt.rows, -(-n_columns // fmt.columns) * fmt.columns]
