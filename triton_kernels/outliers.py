"""The largest values of each block, kept apart with more mantissa bits and an exponent of their own.

The docstring of ``BFPFormat`` draws an entry. Source: US20200210839A1 (outlier values in an ancillary tensor).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .format import OUTLIER_BIAS, OUTLIER_EXPONENT_BITS, BFPFormat

_KEY_BITS = 7
_MAX_FIELD = (1 << OUTLIER_EXPONENT_BITS) - 1
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Outliers:
    """Of each block the k chosen values: index, bits rounded to 1 + M + X significant ones (shifted down), and sign."""

    index: Tensor  # [n_blocks, k] int64
    rounded: Tensor  # [n_blocks, k] int64, the exponent above M + X mantissa bits; 0 where not chosen
    negative: Tensor  # [n_blocks, k] bool

    def least_exponent(self, fmt: BFPFormat) -> Tensor:
        """The least exponent of S [n_blocks] (biased) with which the field e of all of them fits."""
        exponents = self.rounded >> _mantissa_bits(fmt)
        return exponents.amax(dim=1) + OUTLIER_BIAS - _MAX_FIELD


def choose(values: Tensor, fmt: BFPFormat) -> tuple[Outliers, Tensor]:
    """The outliers of ``values`` [n_blocks, block] (float32), and which values they are (bool, of the same shape)."""
    bits = values.view(torch.int32) & 0x7FFFFFFF
    if fmt.unsigned:
        bits = bits.masked_fill(values <= 0, 0)
    place = torch.arange(fmt.block, device=values.device, dtype=torch.int32)
    keys = (bits & -(1 << _KEY_BITS)) | ((1 << _KEY_BITS) - 1 - place)
    index = keys.topk(fmt.outliers, dim=1).indices
    chosen = torch.ones_like(index, dtype=torch.bool)
    if fmt.outlier_threshold:
        rest = bits.scatter(1, index, 0).amax(dim=1, keepdim=True)
        chosen = bits.gather(1, index) - (fmt.outlier_threshold << 23) >= rest
    rounded = _rounded(bits.gather(1, index).long(), 23 - _mantissa_bits(fmt)).masked_fill(~chosen, 0)
    found = Outliers(index, rounded, values.gather(1, index) < 0)
    return found, torch.zeros_like(values, dtype=torch.bool).scatter(1, index, chosen)


def encode(found: Outliers, exponents: Tensor, codes: Tensor, fmt: BFPFormat) -> tuple[Tensor, Tensor]:
    """Entries [n_blocks, k] (int16), and ``codes`` [n_blocks, block] with those of the outliers put in.

    ``exponents`` [n_blocks] is the biased exponent of each S.
    """
    extra, index_bits = fmt.outlier_extra_bits, fmt.outlier_index_bits
    fields = (found.rounded >> _mantissa_bits(fmt)) - exponents.unsqueeze(1) + OUTLIER_BIAS
    used = (fields >= 1) & (found.rounded > 0)
    mantissa = found.rounded & ((1 << _mantissa_bits(fmt)) - 1)
    entries = (fields << (extra + index_bits)) | ((mantissa & ((1 << extra) - 1)) << index_bits) | found.index
    own = mantissa >> extra
    if not fmt.unsigned:
        own = own | (found.negative.long() << fmt.magnitude_bits)
    codes = codes.scatter(1, found.index, torch.where(used, own, codes.gather(1, found.index)))
    return entries.masked_fill(~used, 0).to(torch.int16), codes


def decode(entries: Tensor, exponents: Tensor, codes: Tensor, values: Tensor, fmt: BFPFormat) -> Tensor:
    """``values`` [n_blocks, block] (float32), decoded from ``codes``, with the outliers put in."""
    extra, index_bits = fmt.outlier_extra_bits, fmt.outlier_index_bits
    entries = entries.long() & 0xFFFF
    index = entries & ((1 << index_bits) - 1)
    field = entries >> (extra + index_bits)
    own = codes.long().gather(1, index)
    top = own & ((1 << fmt.magnitude_bits) - 1)
    mantissa = (top << extra) | ((entries >> index_bits) & ((1 << extra) - 1))
    bits = ((exponents.unsqueeze(1) + field - OUTLIER_BIAS) << 23) | (mantissa << (23 - _mantissa_bits(fmt)))
    magnitude = bits.to(torch.int32).view(torch.float32)
    signed = magnitude if fmt.unsigned else torch.where(own >> fmt.magnitude_bits == 1, -magnitude, magnitude)
    for k in range(fmt.outliers):  # one at a time: entries that are not used may share an index
        place = index[:, k : k + 1]
        values = values.scatter(
            1, place, torch.where(field[:, k : k + 1] > 0, signed[:, k : k + 1], values.gather(1, place))
        )
    return values


def _mantissa_bits(fmt: BFPFormat) -> int:
    return fmt.magnitude_bits + fmt.outlier_extra_bits


def _rounded(bits: Tensor, drop: int) -> Tensor:
    """The bits of floats without the lowest ``drop``, to nearest even, finite ones below infinity."""
    rounded = (bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)) >> drop
    return rounded.clamp(max=(_INFINITY >> drop) - 1)
