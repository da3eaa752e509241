"""Random bytes for stochastic rounding and dithering, the same on every device, and for every size of tile.

``philox``: counter-based, from a seed and the index of a group of 8 values; ``hashed``: from a value's own bits.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): Philox2x32 with 7 rounds.
"""

import torch
from torch import Tensor

ROUNDS = 7
FRACTION_BITS = 8
"""Bits of the fraction of a step that stochastic rounding looks at, and of the random numbers."""

ROUNDING, DITHER, DENSITY = 0, 1, 2
"""What random bytes are for: added to the high word of the counter."""

_MULTIPLIER = 0xD256D193
_WEYL = 0x9E3779B9
_MASK = 0xFFFFFFFF


def philox(seed: Tensor, first_group: int, n_groups: int, purpose: int) -> Tensor:
    """Bytes [n_groups, 8] (int64), one for each value of the groups ``first_group``, ``first_group + 1``, ...

    ``seed`` is an int64 scalar. The counter is (group's index mod 2^32, high half of the seed + ``purpose``), the key the
    seed's low half. Value j of a group has byte j of the two words that come out, low bytes first.
    """
    seed = seed.to(torch.int64)
    low = (torch.arange(n_groups, device=seed.device, dtype=torch.int64) + first_group) & _MASK
    high = (((seed >> 32) + purpose) & _MASK).expand_as(low)
    key = seed & _MASK
    for _ in range(ROUNDS):
        product = low * _MULTIPLIER  # modulo 2^64
        low, high = ((product >> 32) & _MASK) ^ key ^ high, product & _MASK
        key = (key + _WEYL) & _MASK
    words = torch.stack([low, high], dim=1).unsqueeze(2)
    return (words >> torch.arange(0, 32, 8, device=seed.device)).view(n_groups, 8) & 0xFF


def hashed(values: Tensor) -> Tensor:
    """A byte (int64) from the magnitude's bits of each float32 value; equal values, and their negatives, have the same."""
    bits = values.view(torch.int32).long() & 0x7FFFFFFF
    return ((bits ^ (bits >> 15)) * _WEYL & _MASK) >> 24
