"""Decoding in plain operators on every value by itself: a compiler fuses it into the loops that read the values.

Equal to ``reference`` bit for bit. A value's code and scale are found by shifts of its own place, so nothing is put together
in memory first, and every value is made by some ten operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .codec import codec
from .format import GROUP, BFPFormat
from .reference import dtype_name

_LEVELS_IN_A_WORD = 8


def why_not_open(fmt: BFPFormat) -> str:
    """Which part of ``fmt`` is not decoded so."""
    parts = {
        "tiles of rows": fmt.rows > 0,
        "outliers": fmt.outliers > 0,
        "levels learned from the values": fmt.codebook == "learned",
        "decoding at random": bool(fmt.dither),
    }
    return ", ".join(name for name, there in parts.items() if there)


def decompress(
    planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """As ``reference.decompress``, for formats that ``why_not_open`` says nothing against; ``seed`` is not used.

    Values that bfloat16 does not hold are rounded to it before they are converted, in integers, as a compiler may leave
    conversions out; those of float16 by the conversion alone.
    """
    n_codes = len(fmt.group_planes)
    codes = _fields(planes[:n_codes], fmt.width, numel)
    scales = _scale_codes(planes[n_codes:], fmt, numel)
    magnitudes = scales & fmt.scale_kind.nan if fmt.scale_kind.signed else scales
    values = _numbers(codes, fmt) * _steps(scales, magnitudes, fmt)
    if codec(fmt, dtype_name(dtype, fmt), packs=False).inexact:
        values = _nearest_bfloat(values)
    if dtype == torch.float16 and not fmt.is_basic:
        values = values.clamp(-65504.0, 65504.0)
    return torch.where(magnitudes == fmt.scale_kind.nan, torch.nan, values).to(dtype)


def _scale_codes(planes: Sequence[Tensor], fmt: BFPFormat, numel: int) -> Tensor:
    """Of each value's block."""
    bits = fmt.scale_kind.bits
    if bits == 8:
        return _spread(planes[0], fmt.block, numel).to(torch.int32)
    return _fields(planes[: len(BFPFormat(bits, GROUP).group_planes)], bits, numel, fmt.block)


def _fields(planes: Sequence[Tensor], width: int, numel: int, each: int = 1) -> Tensor:
    """Fields of so many bits, [numel] (int32), of planes of codes: ``each`` values in a row have one.

    Everything has the size of the result from the start on, as loops of different sizes are not fused.
    """
    n = GROUP if width < GROUP else GROUP // 2  # in a word
    parts = [_spread(plane, n * each, numel) for plane in planes]
    word, at = parts[0].to(torch.int64 if 4 < width < GROUP else torch.int32), 8 * parts[0].itemsize
    if len(parts) > 1:
        word = word & ((1 << at) - 1)
    for part in parts[1:]:
        word = word | ((part.to(word.dtype) & ((1 << (8 * part.itemsize)) - 1)) << at)
        at += 8 * part.itemsize
    small = statically_known_true(numel < 2**31)
    places = torch.arange(numel, device=word.device, dtype=torch.int32 if small else torch.int64)
    if each > 1:
        places = places >> (each.bit_length() - 1)
    shifts = (places & (n - 1)).to(torch.int32) * width  # of remainders, compilers make more
    return ((word >> shifts) & ((1 << width) - 1)).to(torch.int32)


def _spread(x: Tensor, n: int, numel: int) -> Tensor:
    """Each element ``n`` times, ``numel`` in all."""
    return x.unsqueeze(1).expand(-1, n).reshape(-1).narrow(0, 0, numel)


def _steps(scales: Tensor, magnitudes: Tensor, fmt: BFPFormat) -> Tensor:
    """The step of each value's block (float32), of its scale's code and that without its sign."""
    kind = fmt.scale_kind
    lower = (fmt.grid_bits - 1) << kind.mantissa_bits  # a step is S * 2^(1 - M)
    bits = (magnitudes + (kind.base - lower)) << kind.shift
    if fmt.zero_scale:
        bits = bits.masked_fill(magnitudes == 0, 0)
    if kind.signed:
        bits = bits | ((scales - magnitudes) << 24)
    return bits.view(torch.float32)


def _numbers(codes: Tensor, fmt: BFPFormat) -> Tensor:
    """In steps (float32)."""
    if fmt.twos:
        return ((codes ^ (1 << fmt.magnitude_bits)) - (1 << fmt.magnitude_bits)).to(torch.float32)
    if fmt.unsigned and not fmt.codebook:
        return torch.where(codes == 0, 0.0, codes.to(torch.float32) - 0.5)
    places = codes if fmt.unsigned or fmt.signed_levels else codes & ((1 << fmt.magnitude_bits) - 1)
    sizes = _levels(places, fmt) if fmt.codebook else places
    if fmt.unsigned or fmt.signed_levels:
        return sizes.to(torch.float32)
    return torch.where(codes == places, sizes, -sizes).to(torch.float32)


def _levels(places: Tensor, fmt: BFPFormat) -> Tensor:
    """The level of each place (int32): a byte of a number, shifted down."""
    levels = [*fmt.levels, *[fmt.levels[-1]] * (fmt.n_levels - len(fmt.levels))]
    words = [_table(levels[i : i + _LEVELS_IN_A_WORD], places) for i in range(0, len(levels), _LEVELS_IN_A_WORD)]
    table = words[0] if len(words) == 1 else torch.where(places < _LEVELS_IN_A_WORD, words[0], words[1])
    level = (table >> ((places & (_LEVELS_IN_A_WORD - 1)) << 3)).to(torch.int32) & 255
    return (level ^ 128) - 128 if fmt.signed_levels else level


def _table(levels: Sequence[int], places: Tensor) -> Tensor:
    """At most 8 levels, a byte each, as one integer [1]: one without a dimension would not keep its 64 bits."""
    size = 4 if len(levels) <= 4 else _LEVELS_IN_A_WORD
    number = int.from_bytes(bytes(level & 255 for level in levels).ljust(size, b"\0"), "little", signed=True)
    return torch.full((1,), number, dtype=torch.int32 if size == 4 else torch.int64, device=places.device)


def _nearest_bfloat(values: Tensor) -> Tensor:
    """The nearest bfloat16, ties to even, as float32."""
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
