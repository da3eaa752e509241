"""The path for CPU tensors compiled by numba, where there is no C compiler: ``numba_loops``, on torch tensors.

For codes that are even and rounded to nearest under scales of 8 bits, equal to ``reference`` bit for bit; ``cpu`` does the
rest in eager operators. numba is found when it is first asked for (``pip install fxpipe[cpu]``); FXPIPE_NUMBA=0 in the
environment does without. It keeps compiled code beside its source, or in its own cache if that cannot be written, or nowhere.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .format import BFPFormat
from .plane_layout import plane_layouts
from .reference import dtype_name
from .torch_threads import share_out

SHARE = 1 << 15
"""Values that a thread is worth waking for: a whole number of tiles."""

CHUNK = 1 << 20
"""Values that are made float32, or made of it, at a time."""

Floats = NDArray[np.float32]

_LARGEST_HALF = 65504.0


def ready(fmt: BFPFormat) -> bool:
    """Whether numba is there, and its loops know the format."""
    plain = not (fmt.codebook or fmt.outliers or fmt.search or fmt.dither) and fmt.rounding == "nearest"
    return plain and fmt.scale_kind.bits == 8 and _is_there()


def compress(x_flat: Tensor, fmt: BFPFormat) -> tuple[Tensor, ...]:
    """As ``reference.compress``, if ``ready``."""
    numbers = _numbers(fmt, dtype_name(x_flat.dtype, fmt))
    x_flat, numel = x_flat.detach(), x_flat.numel()
    planes = tuple(x_flat.new_empty(p.length(fmt.n_blocks(numel)), dtype=p.dtype) for p in plane_layouts(fmt))
    arrays = _arrays(planes)
    for start, end in _chunks(x_flat.dtype, numel, fmt.block):
        values = _whole_blocks(x_flat[start:end], fmt.block).numpy()

        def encode(first: int, last: int, values: Floats = values, start: int = start) -> None:
            part = values[first:last].reshape(-1, fmt.block)
            _loops().compress(part, part.view(np.int32), *_stored(arrays, fmt, start + first, start + last), numbers)

        share_out(encode, _shares(len(values)))
    return planes


def decompress(planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.decompress``, if ``ready``."""
    numbers = _numbers(fmt, dtype_name(dtype, fmt))
    out, arrays = planes[0].new_empty(numel, dtype=dtype), _arrays(planes)
    for start, end in _chunks(dtype, numel, fmt.block):
        n = fmt.n_blocks(end - start) * fmt.block
        direct = dtype is torch.float32 and n == end - start
        values = out[start:end] if direct else out.new_empty(n, dtype=torch.float32)
        floats = values.numpy()

        def decode(first: int, last: int, values: Floats = floats, start: int = start) -> None:
            part = values[first:last].reshape(-1, fmt.block)
            _loops().decompress(part, *_stored(arrays, fmt, start + first, start + last), numbers)

        share_out(decode, _shares(n))
        if dtype is torch.float16 and not fmt.is_basic:
            values.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        if not direct:
            out[start:end].copy_(values[: end - start])
    return out


@cache
def _is_there() -> bool:
    if os.environ.get("FXPIPE_NUMBA") == "0" or find_spec("numba") is None:
        return False
    try:
        _loops()
    except ImportError as reason:  # a numba that is older than numpy, say
        logging.getLogger("fxpipe").warning(
            "CPU tensors are compressed by eager operators, as numba cannot be imported: %s. FXPIPE_NUMBA=0 asks for that.",
            reason,
        )
        return False
    return True


@cache
def _loops() -> ModuleType:
    from . import numba_loops

    return numba_loops


@lru_cache(maxsize=256)
def _numbers(fmt: BFPFormat, dtype: str) -> Any:
    loops, scale = _loops(), fmt.scale_kind
    mode = loops.AS_STORED if fmt.unsigned else loops.COMPLEMENT if fmt.twos else loops.SIGN_MAGNITUDE
    return loops.Numbers(
        width=fmt.width, block=fmt.block, magnitude_bits=fmt.magnitude_bits, is_unsigned=fmt.unsigned, mode=mode,
        scale_shift=scale.shift, scale_base=scale.base, scale_nan=scale.nan, least_scale=fmt.least_scale(dtype),
        scale_addend=fmt.scale_addend, peak_factor=fmt.peak_factor,
    )  # fmt: skip


def _chunks(dtype: torch.dtype, numel: int, block: int) -> list[tuple[int, int]]:
    """Of float32 all whole blocks at once, then what is left; of other dtypes as many values as there is scratch for."""
    if dtype is torch.float32:
        whole = numel // block * block
        return [(start, end) for start, end in ((0, whole), (whole, numel)) if start < end]
    return _parts(numel, CHUNK)


def _shares(n: int) -> list[tuple[int, int]]:
    """One for each of torch's threads, of whole tiles."""
    return _parts(n, -(-n // (torch.get_num_threads() * SHARE)) * SHARE)


def _parts(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _whole_blocks(values: Tensor, block: int) -> Tensor:
    values = values.float().contiguous()
    return torch.nn.functional.pad(values, (0, -values.numel() % block)) if values.numel() % block else values


def _arrays(planes: Sequence[Tensor]) -> list[NDArray[Any]]:
    """The planes, unsigned."""
    arrays = [plane.numpy() for plane in planes]
    return [array.view(f"uint{8 * array.itemsize}") for array in arrays]


def _stored(arrays: Sequence[NDArray[Any]], fmt: BFPFormat, start: int, end: int) -> list[NDArray[Any]]:
    """The parts that store those values: codes of 4, 2 and 1 bytes, empty where there is no such plane, and scales."""
    before, through = start // fmt.block, fmt.n_blocks(end)
    layouts = plane_layouts(fmt)
    *codes, scales = (a[p.length(before) : p.length(through)] for a, p in zip(arrays, layouts, strict=True))
    of_size = {array.itemsize: array for array in codes}
    return [*(of_size.get(size, scales[:0].view(f"uint{8 * size}")) for size in (4, 2, 1)), scales]
