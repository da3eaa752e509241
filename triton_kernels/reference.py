"""The definition of every format in plain torch: the truth that all other implementations equal, bit for bit.

Written to be read beside the docstring of ``BFPFormat``; works on any device with eager operators. This file puts the steps
together: ``shared_scales``, ``outliers``, ``learned``, ``rounding`` (the random bytes), ``coding`` and ``packing``.
Storage scheme: US20200210839A1 (a shared exponent and narrow mantissas for activations kept for backward).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import codebooks, coding, learned, outliers, packing, rounding, shared_scales as scales
from .format import DTYPES, GROUP, BFPFormat


def compress(
    x_flat: Tensor,
    fmt: BFPFormat,
    seed: Tensor | None = None,
    *,
    first_value: int = 0,
    levels: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Store the values of ``x_flat`` [numel] (float32, bfloat16 or float16) as the planes of ``fmt.planes(numel)``.

    ``x_flat`` holds tiles in the order in which they are stored (``tiling``). ``seed`` is an int64 scalar, for formats with
    ``+sr``. A part of a tensor that starts at ``first_value``, a whole number of groups of blocks, is stored as in the whole;
    with ``:learned``, if ``levels`` are those of the whole.

    Raises:
        TypeError: ``x_flat`` has another dtype.
        ValueError: the seed is missing.
    """
    dtype = dtype_name(x_flat.dtype, fmt)
    seed = checked_seed(seed, fmt, fmt.compress_needs_seed)
    levels = fmt.levels if fmt.codebook != "learned" else levels or learned.levels_of(x_flat, fmt)
    values = _blocks(x_flat.detach().float(), fmt.block)
    noise = _rounding_noise(values, fmt, seed, first_value // GROUP)
    first = scales.first(values, fmt, dtype)
    scale_codes, codes = _searched(values, first, fmt, dtype, noise, levels)
    nan = scale_codes == fmt.scale_kind.nan
    ancillary = []
    if first.found is not None:
        entries, codes = outliers.encode(first.found, scales.exponents(scale_codes, fmt), codes, fmt)
        ancillary = [entries.masked_fill(nan.unsqueeze(1), 0).flatten()]
    if fmt.codebook == "learned":
        ancillary.append(torch.tensor([level & 255 for level in levels], dtype=torch.uint8, device=x_flat.device))
    codes = codes.masked_fill(nan.unsqueeze(1), 0)
    packed = packing.pack(codes, fmt.width, fmt.group_planes)
    return (*packed, *packing.pack_scales(scale_codes, fmt), *ancillary)


def decompress(
    planes: Sequence[Tensor],
    fmt: BFPFormat,
    numel: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    *,
    first_value: int = 0,
) -> Tensor:
    """The ``numel`` values that ``planes`` store, as a tensor [numel] of ``dtype`` (float32, bfloat16 or float16).

    ``seed`` is an int64 scalar, for formats with ``+dither``; ``first_value`` as in ``compress``.

    Raises:
        TypeError: ``dtype`` is another dtype.
        ValueError: the seed is missing.
    """
    dtype_name(dtype, fmt)
    seed = checked_seed(seed, fmt, fmt.decompress_needs_seed)
    n_codes = len(fmt.group_planes)
    n_ancillary = (fmt.outliers > 0) + (fmt.codebook == "learned")
    ancillary = list(planes[len(planes) - n_ancillary :])
    codes = packing.unpack(planes[:n_codes], fmt.width, fmt.group_planes).view(-1, fmt.block)
    scale_codes = packing.unpack_scales(planes[n_codes:], fmt, codes.shape[0])
    levels = fmt.levels
    if fmt.codebook == "learned":
        levels = codebooks.from_hex(bytes(ancillary[-1].tolist()).hex(), signed=fmt.signed_levels)
    noise = _dither_noise(codes, fmt, seed, first_value // GROUP)
    shared = scales.floats(scale_codes, fmt)
    values = coding.decode(codes, shared, fmt, noise, levels)
    if fmt.outliers:
        entries = ancillary[0].view(-1, fmt.outliers)
        values = outliers.decode(entries, scales.exponents(scale_codes, fmt), codes, values, fmt)
    if dtype == torch.float16 and not fmt.is_basic:
        values = values.clamp(-65504.0, 65504.0)
    return values.to(dtype).flatten()[:numel].clone()


def dtype_name(dtype: torch.dtype, fmt: BFPFormat) -> str:
    """The name of ``dtype`` as ``BFPFormat`` spells it; TypeError where the format ``fmt`` cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"format '{fmt}' holds values of dtype {', '.join(DTYPES)}, not {name}")
    return name


def checked_seed(seed: Tensor | None, fmt: BFPFormat, needed: bool) -> Tensor | None:
    """``seed`` where one is needed, else nothing.

    Raises:
        ValueError: one is needed and missing, or it is no int64 tensor of one value.
    """
    if not needed:
        return None
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        found = "none" if seed is None else f"{seed.dtype} of shape {list(seed.shape)}"
        raise ValueError(f"format '{fmt}' needs a seed here, an int64 tensor of one value; found {found}")
    return seed.reshape(())


def _blocks(values: Tensor, block: int) -> Tensor:
    """[numel] -> [n_blocks, block], the last block filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)


def _rounding_noise(values: Tensor, fmt: BFPFormat, seed: Tensor | None, first_group: int) -> Tensor | None:
    if fmt.rounding == "hash":
        return rounding.hashed(values)
    if seed is None:
        return None
    return rounding.philox(seed, first_group, values.numel() // GROUP, rounding.ROUNDING).view_as(values)


def _dither_noise(codes: Tensor, fmt: BFPFormat, seed: Tensor | None, first_group: int) -> tuple[Tensor, Tensor] | None:
    if seed is None:
        return None
    n_groups = codes.numel() // GROUP
    first = rounding.philox(seed, first_group, n_groups, rounding.DITHER)
    second = rounding.philox(seed, first_group, n_groups, rounding.DENSITY) if fmt.dither == "density" else first
    return first.view_as(codes), second.view_as(codes)


def _searched(
    values: Tensor, first: scales.First, fmt: BFPFormat, dtype: str, noise: Tensor | None, levels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The scale codes of least squared error, the first such among the candidates, and the codes under them."""
    best_scales, best_codes, best = first.codes, None, None
    lowest = scales.candidate(first.codes, min(fmt.search_offsets), fmt, dtype, first.least_exponents)
    for offset in fmt.search_offsets:
        tried = scales.candidate(first.codes, offset, fmt, dtype, first.least_exponents) if fmt.search else first.codes
        floats = scales.floats(tried, fmt)
        codes = coding.encode(values, floats, fmt, noise, levels)
        if not fmt.search:
            return tried, codes
        errors = coding.squared_errors(values, floats, codes, fmt, levels).masked_fill(~first.counted, 0).sum(dim=1)
        weighted = errors * scales.squared(tried, fmt, lowest)
        if best is None or best_codes is None:
            best_scales, best_codes, best = tried, codes, weighted
            continue
        better = weighted < best
        best = torch.where(better, weighted, best)
        best_scales = torch.where(better, tried, best_scales)
        best_codes = torch.where(better.unsqueeze(1), codes, best_codes)
    assert best_codes is not None
    return best_scales, best_codes
