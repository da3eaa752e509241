"""Runs the Triton kernels on tensors: allocates the planes, chooses the tile, launches.

CUDA and HIP tensors; under ``TRITON_INTERPRET=1`` CPU tensors too, for tests.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .format import BFPFormat
from .kernels import compress_kernel, decompress_kernel
from .reference import dtype_name

TILE = 4096
"""Values that one program handles: 32 a thread."""

N_WARPS = 4
PLACE_BITS = 0x4B000000
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}


def compress(x_flat: Tensor, fmt: BFPFormat, tile: int = TILE) -> tuple[Tensor, ...]:
    """The planes of ``x_flat`` [numel], contiguous. ``tile``: values a program, a power of two and at least a block."""
    numel = x_flat.numel()
    planes = tuple(x_flat.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in fmt.planes(numel))
    if numel > 0:
        if x_flat.data_ptr() % 4:  # 16-bit values are read in pairs
            x_flat = x_flat.clone()
        with _device(x_flat):
            compress_kernel[(triton.cdiv(numel, tile),)](
                x_flat, *_pointers(planes, fmt), numel, **compress_constants(fmt, x_flat.dtype, numel, tile), num_warps=N_WARPS
            )
    return planes


def decompress(planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, tile: int = TILE) -> Tensor:
    """The values [numel] of ``dtype`` that ``planes`` (contiguous) store."""
    y = planes[0].new_empty(numel, dtype=dtype)
    if numel > 0:
        with _device(y):
            decompress_kernel[(triton.cdiv(numel, tile),)](
                *_pointers(planes, fmt), y, numel, PLACE_BITS, **constants(fmt, dtype, numel, tile), num_warps=N_WARPS
            )
    return y


def constants(fmt: BFPFormat, dtype: torch.dtype, numel: int, tile: int = TILE) -> dict[str, Any]:
    """The compile-time arguments of ``decompress_kernel``."""
    return {
        "WIDTH": fmt.width,
        "BLOCK": fmt.block,
        "UNSIGNED": fmt.unsigned,
        "DTYPE": DTYPE_CODES[dtype_name(dtype, fmt)],
        "BLOCKS": tile // fmt.block,
        "EVEN": numel % tile == 0,
    }


def compress_constants(fmt: BFPFormat, dtype: torch.dtype, numel: int, tile: int = TILE) -> dict[str, Any]:
    """The compile-time arguments of ``compress_kernel``."""
    return {**constants(fmt, dtype, numel, tile), "EXPONENT_MIN": fmt.exponent_min(dtype_name(dtype, fmt))}


def _pointers(planes: Sequence[Tensor], fmt: BFPFormat) -> list[Tensor]:
    """The planes in the places of the kernels' arguments; the exponents stand in where the width has no plane."""
    by_name = dict(zip((plane.name for plane in fmt.planes(1)), planes, strict=True))
    return [by_name.get(name, planes[-1]) for name in ("code32", "code16", "code8", "exponent")]


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
