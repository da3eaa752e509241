"""Runs the Triton kernels on tensors, or compiles them for a device that is not there.

CUDA and HIP tensors; under ``TRITON_INTERPRET=1`` CPU tensors too, for tests.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .format import BFPFormat
from .kernels import compress_kernel, decompress_kernel
from .reference import dtype_name
from .tiles import BFLOAT16, FLOAT16, FLOAT32

TILE = 4096
"""Values that one program handles: 32 a thread."""

N_WARPS = 4
PLACE_BITS = 0x4B000000
"""Bits of the float 2^23, see ``tiles.decode``."""

Kind = Literal["compress", "decompress"]
KERNELS: dict[Kind, Any] = {"compress": compress_kernel, "decompress": decompress_kernel}
_DTYPE_CODES = {"float32": FLOAT32.value, "bfloat16": BFLOAT16.value, "float16": FLOAT16.value}
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_PLANE_POINTERS = {"code32_ptr": "*i32", "code16_ptr": "*i16", "code8_ptr": "*u8", "exponent_ptr": "*u8"}


def compress(x_flat: Tensor, fmt: BFPFormat, tile: int = TILE) -> tuple[Tensor, ...]:
    """The planes of ``x_flat`` [numel], contiguous. ``tile``: values a program, a power of two of at least a block."""
    numel = x_flat.numel()
    arguments = _constants("compress", fmt, dtype_name(x_flat.dtype, fmt), numel, tile)
    planes = tuple(x_flat.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in fmt.planes(numel))
    if numel > 0:
        if x_flat.data_ptr() % 4:  # 16-bit values are read in pairs
            x_flat = x_flat.clone()
        with on_device(x_flat):
            grid = (triton.cdiv(numel, tile),)
            compress_kernel[grid](x_flat, *_arguments(planes, fmt), numel, **arguments, num_warps=N_WARPS)
    return planes


def decompress(planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, tile: int = TILE) -> Tensor:
    """The values [numel] of ``dtype`` that ``planes``, contiguous, store."""
    arguments = _constants("decompress", fmt, dtype_name(dtype, fmt), numel, tile)
    y = planes[0].new_empty(numel, dtype=dtype)
    if numel > 0:
        with on_device(y):
            grid = (triton.cdiv(numel, tile),)
            decompress_kernel[grid](*_arguments(planes, fmt), y, numel, PLACE_BITS, **arguments, num_warps=N_WARPS)
    return y


def compile_for(target: GPUTarget, kind: Kind, fmt: BFPFormat, dtype: str, numel: int) -> Any:
    """The compiled kernel for ``target``, which need not be present; its ``asm`` has "ptx" and "cubin", or "amdgcn".

    ``numel`` decides what the launch of so many values would: whether all tiles are full, how sizes divide, and
    whether they need 64 bits.
    Does not work under ``TRITON_INTERPRET=1``.
    """
    kernel = KERNELS[kind]
    constants = _constants(kind, fmt, dtype, numel, TILE)
    types = {
        **_PLANE_POINTERS,
        "x_ptr": _POINTERS[dtype],
        "y_ptr": _POINTERS[dtype],
        "numel": "i32" if numel < 2**31 else "i64",
        "place_bits": "i32",
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    by_16 = [name for name in types if name != "numel" or numel % 16 == 0]
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in by_16}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": N_WARPS})


def _constants(kind: Kind, fmt: BFPFormat, dtype: str, numel: int, tile: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    constants = {
        "WIDTH": fmt.width,
        "BLOCK": fmt.block,
        "UNSIGNED": fmt.unsigned,
        "DTYPE": _DTYPE_CODES[dtype],
        "BLOCKS": tile // fmt.block,
        "EVEN": numel % tile == 0,
    }
    return {**constants, "EXPONENT_MIN": fmt.exponent_min(dtype)} if kind == "compress" else constants


def _arguments(planes: Sequence[Tensor], fmt: BFPFormat) -> list[Tensor]:
    """The planes in the order of the kernels' arguments; the exponents stand in for those that the width has not."""
    by_name = dict(zip((plane.name for plane in fmt.planes(1)), planes, strict=True))
    return [by_name.get(name.removesuffix("_ptr"), planes[-1]) for name in _PLANE_POINTERS]


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels started inside run on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
