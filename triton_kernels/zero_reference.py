"""Zero compression on the device: its layout, and its definition in plain torch, which the kernels equal bit for bit.

The codes that are not zero are kept, and a mask says where they belong. All sizes are known before anything runs, so nothing
waits for the device, and nothing can overflow: where no code is zero, what is kept is as large as the codes are::

    mask       uint8 [n_groups]     bit j: code j of the group of 8 is not zero
    start      int64 [n_tiles + 1]  the word of payload at which each tile's codes begin; the last: how many words there are
    payload    int32 [n_words]      a tile is ``TILE_GROUPS`` groups; its codes that are not zero, ``width`` bits each, little
                                    end first, from a whole word on. Words behind the last tile's are zeros

So ``payload[:start[-1]]`` holds everything, and the W bits of a value become 1 + (1 - z) W, where z is the share of codes that
are zero: it pays from z = 1 / W on, a quarter at 4 bits. Source: US12277502B2 (zero compression of compressed activations).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import packing
from .format import GROUP, BFPFormat

TILE_GROUPS = 512
"""Groups that one program handles: 32 codes a thread."""

WORD_BITS = 32


@dataclass(frozen=True)
class ZeroCoded:
    """The planes of a tensor without the codes that are zero; ``others`` are the planes that hold no codes, as they were."""

    mask: Tensor
    start: Tensor
    payload: Tensor
    others: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.mask, self.start, self.payload, *self.others)

    def used_bytes(self) -> int:
        """Bytes that must be kept or sent. Waits for the device."""
        behind = self.payload.numel() - int(self.start[-1])
        return sum(tensor.nbytes for tensor in self.tensors()) - behind * self.payload.itemsize

    def shrunk(self) -> "ZeroCoded":
        """The same with only the used payload, copied, so that the larger one can be freed. Waits for the device."""
        return replace(self, payload=self.payload[: int(self.start[-1])].clone())


def n_tiles(n_groups: int) -> int:
    """Tiles of so many groups."""
    return -(-n_groups // TILE_GROUPS)


def n_words(n_groups: int, width: int) -> int:
    """Words that hold the codes of so many groups where none is zero."""
    return -(-n_groups * GROUP * width // WORD_BITS)


def compress(planes: Sequence[Tensor], fmt: BFPFormat) -> ZeroCoded:
    """``planes`` of ``fmt`` (any device) without the codes that are zero."""
    n_codes = len(fmt.group_planes)
    groups = packing.unpack(planes[:n_codes], fmt.width, fmt.group_planes)
    some = groups != 0
    mask = (some.long() << torch.arange(GROUP, device=some.device)).sum(dim=1).to(torch.uint8)
    tiles = _in_tiles(some)
    words = -(-tiles.sum(dim=1) * fmt.width // WORD_BITS)
    start = torch.nn.functional.pad(words.cumsum(0), (1, 0))
    place = _first_bits(tiles, start, fmt)[tiles].unsqueeze(1) + torch.arange(fmt.width, device=some.device)
    bits = mask.new_zeros(n_words(len(groups), fmt.width) * WORD_BITS)
    bits[place] = (groups[some].unsqueeze(1) >> torch.arange(fmt.width, device=some.device) & 1).to(torch.uint8)
    weights = torch.arange(WORD_BITS, device=some.device)
    low = (bits.view(-1, WORD_BITS).long() << weights).sum(dim=1)
    payload = low.view(torch.int32).view(-1, 2)[:, 0].clone()
    return ZeroCoded(mask, start, payload, tuple(planes[n_codes:]))


def decompress(coded: ZeroCoded, fmt: BFPFormat) -> tuple[Tensor, ...]:
    """The planes that ``compress`` was given."""
    some = (coded.mask.long().unsqueeze(1) >> torch.arange(GROUP, device=coded.mask.device) & 1).bool()
    tiles = _in_tiles(some)
    place = _first_bits(tiles, coded.start, fmt)[tiles].unsqueeze(1) + torch.arange(fmt.width, device=some.device)
    bits = coded.payload.long()[place // WORD_BITS] >> place % WORD_BITS & 1
    groups = torch.zeros(some.shape, dtype=torch.int64, device=some.device)
    groups[some] = (bits << torch.arange(fmt.width, device=some.device)).sum(dim=1)
    return (*packing.pack(groups.flatten(), fmt.width, fmt.group_planes), *coded.others)


def _in_tiles(some: Tensor) -> Tensor:
    """[n_groups, 8] -> [n_tiles, codes of a tile], filled up with False."""
    missing = n_tiles(len(some)) * TILE_GROUPS - len(some)
    return torch.nn.functional.pad(some, (0, 0, 0, missing)).view(-1, TILE_GROUPS * GROUP)


def _first_bits(tiles: Tensor, start: Tensor, fmt: BFPFormat) -> Tensor:
    """For each code that is not zero, the bit of the payload at which it begins."""
    before = tiles.long().cumsum(dim=1) - tiles.long()
    return start[:-1].unsqueeze(1) * WORD_BITS + before * fmt.width
