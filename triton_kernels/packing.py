"""Codes of 2 to 8 bits in planes of 4, 2 and 1 bytes, eight codes to a group of W bytes, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .format import GROUP, BFPFormat, Plane


def pack(codes: Tensor, width: int, planes: Sequence[Plane]) -> list[Tensor]:
    """Codes, a whole number of groups -> the planes: a group's bits are the low W bytes of an int64, dealt out."""
    shifts = torch.arange(GROUP, device=codes.device) * width
    words = (codes.view(-1, GROUP).long() << shifts).sum(dim=1)
    group_bytes = words.view(torch.uint8).view(-1, 8).narrow(1, 0, width)
    parts = group_bytes.split([plane.n_bytes for plane in planes], dim=1)  # type: ignore[no-untyped-call]
    return [part.flatten().clone().view(getattr(torch, plane.dtype)) for part, plane in zip(parts, planes, strict=True)]


def unpack(planes: Sequence[Tensor], width: int, group_planes: Sequence[Plane]) -> Tensor:
    """The planes -> codes [n_groups, 8] (int64). ``group_planes`` has what one group takes of each."""
    parts = [
        plane.contiguous().view(torch.uint8).view(-1, group_plane.n_bytes)
        for plane, group_plane in zip(planes, group_planes, strict=True)
    ]
    words = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 8 - width)).contiguous().view(torch.int64)
    shifts = torch.arange(GROUP, device=words.device) * width
    return (words >> shifts) & ((1 << width) - 1)


def pack_scales(codes: Tensor, fmt: BFPFormat) -> list[Tensor]:
    """Scale codes [n_blocks] -> their planes."""
    bits = fmt.scale_kind.bits
    if bits == 8:
        return [codes.to(torch.uint8)]
    return pack(torch.nn.functional.pad(codes, (0, -codes.numel() % GROUP)), bits, BFPFormat(bits, GROUP).group_planes)


def unpack_scales(planes: Sequence[Tensor], fmt: BFPFormat, n_blocks: int) -> Tensor:
    """The planes of scales, whatever follows them -> codes [n_blocks] (int64)."""
    bits = fmt.scale_kind.bits
    if bits == 8:
        return planes[0].long()
    group_planes = BFPFormat(bits, GROUP).group_planes
    return unpack(planes[: len(group_planes)], bits, group_planes).flatten().narrow(0, 0, n_blocks)
