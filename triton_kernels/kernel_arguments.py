"""What the kernels of stored values take: the planes that they write, and tensors as they need them."""

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import packing
from .format import BFPFormat, Plane

VALUE_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
PLANE_POINTERS = {
    "code32_ptr": "*i32",
    "code16_ptr": "*i16",
    "code8_ptr": "*u8",
    "scale_ptr": "*u8",
    "outlier_ptr": "*i16",
    "level_ptr": "*u8",
}
_ALIGNMENT = 16
"""Bytes that a tensor's first value must be a multiple of: where it is not, Triton would go by way of shared memory."""


def on_nvidia() -> bool:
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def kernel_planes(fmt: BFPFormat, numel: int) -> list[Plane]:
    """The planes that a kernel writes: those of the format, but for scales of fewer than 8 bits, which it does not pack."""
    n_codes = len(fmt.group_planes)
    planes = fmt.planes(numel)
    return [
        *planes[:n_codes],
        Plane("scale", "uint8", fmt.n_blocks(numel), 1),
        *planes[len(planes) - n_ancillary(fmt) :],
    ]


def n_ancillary(fmt: BFPFormat) -> int:
    """Planes behind the scales."""
    return (fmt.outliers > 0) + (fmt.codebook == "learned")


def stored_planes(planes: Sequence[Tensor], fmt: BFPFormat) -> tuple[Tensor, ...]:
    """The planes of the format of those that a kernel wrote."""
    n_codes = len(fmt.group_planes)
    return (*planes[:n_codes], *packing.pack_scales(planes[n_codes], fmt), *planes[n_codes + 1 :])


def plane_arguments(planes: Sequence[Tensor], fmt: BFPFormat, instead: Tensor) -> list[Tensor]:
    """The planes in the order of the kernels' arguments; ``instead``, which nothing writes to, for those that there are not."""
    names = [f"{plane.name}_ptr" for plane in kernel_planes(fmt, 1)]
    by_name = dict(zip(names, planes, strict=True))
    return [by_name.get(name, instead) for name in PLANE_POINTERS]


def aligned(x: Tensor) -> Tensor:
    """A copy where the values may not start at a multiple of 16 bytes; whole storages do."""
    address = x.storage_offset() * x.itemsize if is_fake(x) else x.data_ptr()
    return x if statically_known_true(address % _ALIGNMENT == 0) else x.clone()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels started inside run on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
