"""The definition of every format in plain torch: the truth that all other implementations equal, bit for bit.

Written to be read beside the docstring of ``BFPFormat``; works on any device with eager operators.
Storage scheme: US20200210839A1 (a shared exponent and narrow mantissas for activations kept for backward).
"""

import torch
from torch import Tensor

from .format import DTYPES, EXPONENT_NAN, GROUP, BFPFormat


def compress(x_flat: Tensor, fmt: BFPFormat) -> tuple[Tensor, ...]:
    """Store the values of ``x_flat`` [numel] (float32, bfloat16 or float16) as the planes of ``fmt.planes(numel)``.

    Raises:
        TypeError: ``x_flat`` has another dtype.
    """
    dtype = dtype_name(x_flat.dtype, fmt)
    values = _blocks(x_flat.detach().float(), fmt.block)
    exponents = _shared_exponents(values, fmt.exponent_min(dtype))
    encode = _encode_unsigned if fmt.unsigned else _encode_signed
    codes = encode(values, exponents, fmt.magnitude_bits)
    codes = codes.masked_fill((exponents == EXPONENT_NAN).unsqueeze(1), 0)
    return (*_pack(codes, fmt), exponents.to(torch.uint8))


def decompress(planes: tuple[Tensor, ...] | list[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """The ``numel`` values that ``planes`` store, as a tensor [numel] of ``dtype`` (float32, bfloat16 or float16).

    Raises:
        TypeError: ``dtype`` is another dtype.
    """
    dtype_name(dtype, fmt)
    codes = _unpack(planes[:-1], fmt).view(-1, fmt.block)
    decode = _decode_unsigned if fmt.unsigned else _decode_signed
    values = decode(codes, fmt.magnitude_bits) * _steps(planes[-1].to(torch.int32), fmt.magnitude_bits).unsqueeze(1)
    return values.to(dtype).flatten()[:numel].clone()


def dtype_name(dtype: torch.dtype, fmt: BFPFormat) -> str:
    """The name of ``dtype`` as ``BFPFormat`` spells it; TypeError where the format ``fmt`` cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"format '{fmt}' holds values of dtype {', '.join(DTYPES)}, not {name}")
    return name


def _blocks(values: Tensor, block: int) -> Tensor:
    """[numel] -> [n_blocks, block], the last block filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)


def _shared_exponents(values: Tensor, least: int) -> Tensor:
    """Biased exponent of each block's largest magnitude, at least ``least``; 255 if a NaN or an infinity is in it."""
    largest = values.abs().amax(dim=1)  # a NaN wins
    return (largest.view(torch.int32) >> 23).clamp(min=least)


def _scaled(values: Tensor, exponents: Tensor, magnitude_bits: int) -> Tensor:
    """``values / step``, exactly. In two factors: 1/step alone is no normal float where E = 254 and M = 1."""
    twice_reciprocal = ((255 - exponents + magnitude_bits - 1) << 23).view(torch.float32)
    return values * 0.5 * twice_reciprocal.unsqueeze(1)


def _steps(exponents: Tensor, magnitude_bits: int) -> Tensor:
    steps = ((exponents - (magnitude_bits - 1)) << 23).view(torch.float32)
    return steps.masked_fill(exponents == EXPONENT_NAN, torch.nan)


def _encode_signed(values: Tensor, exponents: Tensor, magnitude_bits: int) -> Tensor:
    top = (1 << magnitude_bits) - 1
    q = _scaled(values, exponents, magnitude_bits).nan_to_num(0.0).round().clamp(-top, top).to(torch.int32)
    return torch.where(q < 0, (1 << magnitude_bits) - q, q)


def _decode_signed(codes: Tensor, magnitude_bits: int) -> Tensor:
    sign = 1 << magnitude_bits
    return torch.where(codes >= sign, sign - codes, codes).float()


def _encode_unsigned(values: Tensor, exponents: Tensor, magnitude_bits: int) -> Tensor:
    top = (1 << magnitude_bits) - 1
    cells = (_scaled(values, exponents, magnitude_bits).nan_to_num(0.0) - 0.5).round()
    return torch.where(values > 0, (cells + 1).clamp(1, top), 0).to(torch.int32)


def _decode_unsigned(codes: Tensor, magnitude_bits: int) -> Tensor:
    return torch.where(codes > 0, codes - 0.5, 0.0)


def _pack(codes: Tensor, fmt: BFPFormat) -> list[Tensor]:
    """Codes [n_blocks, block] -> the planes of codes: a group's bits are the low W bytes of an int64, dealt out."""
    shifts = torch.arange(GROUP, device=codes.device) * fmt.width
    words = (codes.view(-1, GROUP).long() << shifts).sum(dim=1)
    group_bytes = words.view(torch.uint8).view(-1, 8)[:, : fmt.width]
    parts = group_bytes.split([plane.n_bytes for plane in fmt.group_planes], dim=1)  # type: ignore[no-untyped-call]
    return [
        part.flatten().clone().view(getattr(torch, plane.dtype))
        for part, plane in zip(parts, fmt.group_planes, strict=True)
    ]


def _unpack(planes: tuple[Tensor, ...] | list[Tensor], fmt: BFPFormat) -> Tensor:
    """The planes of codes -> codes [n_groups, 8]."""
    parts = [
        plane.view(torch.uint8).view(-1, group_plane.n_bytes)
        for plane, group_plane in zip(planes, fmt.group_planes, strict=True)
    ]
    words = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 8 - fmt.width)).contiguous().view(torch.int64)
    shifts = torch.arange(GROUP, device=words.device) * fmt.width
    return (words >> shifts) & ((1 << fmt.width) - 1)
