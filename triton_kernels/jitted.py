"""The path for CPU tensors compiled by numba, where there is no C compiler: ``numba_loops``, on torch tensors.

For codes that are even and rounded to nearest under scales of 8 bits, equal to ``reference`` bit for bit; ``cpu`` does the
rest in eager operators. numba is found when it is first asked for (``pip install fxpipe[cpu]``); FXPIPE_NUMBA=0 in the
environment does without. It keeps compiled code beside its source, or in its own cache if that cannot be written, or nowhere.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .format import BFPFormat
from .plane_layout import plane_layouts
from .reference import dtype_name

SHARE = 1 << 15
"""Values that a thread is worth starting for: a whole number of tiles."""

_LARGEST_HALF = 65504.0


def ready(fmt: BFPFormat) -> bool:
    """Whether numba is there, and its loops know the format."""
    plain = not (fmt.codebook or fmt.outliers or fmt.search or fmt.dither) and fmt.rounding == "nearest"
    return plain and fmt.scale_kind.bits == 8 and _is_there()


def compress(x_flat: Tensor, fmt: BFPFormat) -> tuple[Tensor, ...]:
    """As ``reference.compress``, if ``ready``."""
    numbers = _numbers(fmt, dtype_name(x_flat.dtype, fmt))
    numel, n_blocks = x_flat.numel(), fmt.n_blocks(x_flat.numel())
    planes = tuple(x_flat.new_empty(p.length(n_blocks), dtype=p.dtype) for p in plane_layouts(fmt))

    def encode(start: int, end: int) -> None:
        values = _whole_blocks(x_flat[start:end], fmt.block).numpy()
        _loops().compress(values, values.view("int32"), *_arrays(planes, fmt, start, end), numbers)

    _share_out(encode, numel, fmt.block)
    return planes


def decompress(planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.decompress``, if ``ready``."""
    numbers = _numbers(fmt, dtype_name(dtype, fmt))
    out = planes[0].new_empty(numel, dtype=dtype)

    def decode(start: int, end: int) -> None:
        part = out[start:end]
        direct = dtype is torch.float32 and (end - start) % fmt.block == 0
        values = part if direct else part.new_empty(-(-(end - start) // fmt.block) * fmt.block, dtype=torch.float32)
        _loops().decompress(values.numpy(), *_arrays(planes, fmt, start, end), numbers)
        if dtype is torch.float16 and not fmt.is_basic:
            values.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        if not direct:
            part.copy_(values[: end - start])

    _share_out(decode, numel, fmt.block)
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
        rounds_scale_up=fmt.rounds_scale_up, peak_factor=fmt.peak_factor,
    )  # fmt: skip


def _whole_blocks(values: Tensor, block: int) -> Tensor:
    values = values.detach().float().contiguous()
    return torch.nn.functional.pad(values, (0, -values.numel() % block)) if values.numel() % block else values


def _arrays(planes: Sequence[Tensor], fmt: BFPFormat, start: int, end: int) -> list[Any]:
    """The parts of the planes that store those values, unsigned: of 4, 2 and 1 bytes, empty if there is none, and scales."""
    *codes, scales = (
        plane[before.length : through.length].numpy()
        for plane, before, through in zip(planes, fmt.planes(start), fmt.planes(end), strict=True)
    )
    unsigned = {plane.itemsize: plane.view(f"uint{8 * plane.itemsize}") for plane in codes}
    return [*(unsigned.get(size, scales[:0].view(f"uint{8 * size}")) for size in (4, 2, 1)), scales]


def _share_out(run: Callable[[int, int], None], numel: int, block: int) -> None:
    """``run(start, end)`` on as many threads as torch has, each its part of the whole blocks; what is left after them last."""
    whole = numel // block * block
    n_threads = min(torch.get_num_threads(), -(-whole // SHARE))
    if n_threads > 1:
        each = -(-whole // n_threads // SHARE) * SHARE
        parts = [(start, min(start + each, whole)) for start in range(0, whole, each)]
        others = [_pool().submit(run, *part) for part in parts[1:]]
        run(*parts[0])
        for other in others:
            other.result()
    elif whole:
        run(0, whole)
    if whole < numel:
        run(whole, numel)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fxpipe")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
