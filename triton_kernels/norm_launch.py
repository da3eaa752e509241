"""Runs ``norm_kernel`` on tensors, or compiles it for a device that is not there; see ``launch``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.backends.compiler import GPUTarget

from .codec import Codec, codec
from .format import BFPFormat
from .kernel_arguments import (
    PLANE_POINTERS,
    VALUE_POINTERS,
    aligned,
    kernel_planes,
    on_device,
    on_nvidia,
    plane_arguments,
    stored_planes,
)
from .norm_kernels import norm_kernel
from .reference import dtype_name

_N_PLANES = 5
_FLOATS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}


@dataclass(frozen=True)
class Norm:
    """A norm over rows of ``width``, ``layer`` or ``rms``, with ``eps`` added to the variance; and what is there besides.

    ``has``: some of ``residual``, ``mask``, ``weight``, ``bias``. ``kept``: the factor of values where the mask is true.
    """

    kind: str
    eps: float
    width: int
    has: tuple[str, ...] = ()
    kept: float = 1.0

    def constants(self, fmt: BFPFormat, dtype: str, stored: str, n_rows: int, *, packs: bool) -> dict[str, Any]:
        """The compile-time arguments of the kernel."""
        c = codec(fmt, dtype, packs=packs)
        padded = triton.next_power_of_2(self.width)
        rows = max(1, _values_of_warp(c) // padded) if padded == self.width else 1
        there = {name.upper(): name in self.has for name in ("residual", "mask", "weight", "bias")}
        stores = {"STORES_INPUT": stored in ("input", "both"), "STORES_OUTPUT": stored in ("output", "both")}
        shape = {"WIDTH": self.width, "PADDED": padded, "ROWS": rows, "EVEN": statically_known_true(n_rows % rows == 0)}
        return {"NORM": self.kind, "EPS": self.eps, "KEPT": self.kept, "C": c, **there, **stores, **shape}


def norm_and_compress(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    norm: Norm,
    fmt: BFPFormat,
    stored: str,
) -> list[Tensor]:
    """What ``norms.by_definition`` returns, of contiguous tensors; but values and statistics have one dimension."""
    x, n_rows = aligned(inputs[0]), math.prod(inputs[0].shape[:-1])
    numel = n_rows * norm.width
    constants = norm.constants(fmt, dtype_name(x.dtype, fmt), stored, n_rows, packs=on_nvidia())
    total, y = (x.new_empty(numel) for _ in range(2))
    mean, rstd = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    bits = x.new_empty(numel // 8, dtype=torch.uint8)
    written = {
        **({"sum": total} if "residual" in norm.has else {}), "y": y, **({"mean": mean} if norm.kind == "layer" else {}),
        "rstd": rstd, **({"bits": bits} if mask is not None else {}),
    }  # fmt: skip
    pointers: list[Tensor] = []
    made: list[Tensor] = []
    for stores in (constants["STORES_INPUT"], constants["STORES_OUTPUT"]):
        written_planes = kernel_planes(fmt, numel) if stores else []
        planes = [x.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in written_planes]
        pointers += plane_arguments(planes, fmt, x)[:_N_PLANES] if stores else [x] * _N_PLANES
        made += stored_planes(planes, fmt) if stores else ()
    given = (x if t is None else aligned(t) for t in (inputs[-1], mask, weight, bias))
    outputs = (written.get(name, x) for name in ("sum", "y", "mean", "rstd", "bits"))
    _launch_rows((x, *given, *outputs, *pointers, n_rows), constants)
    return [*written.values(), *made]


def compile_norm_for(target: GPUTarget, norm: Norm, stored: str, fmt: BFPFormat, dtype: str, n_rows: int) -> Any:
    """The compiled kernel for ``target``; ``stored`` may be ``none`` here, for the norm alone. See ``launch.compile_for``."""
    constants = norm.constants(fmt, dtype, stored, n_rows, packs=target.backend == "cuda")
    types = PLANE_POINTERS | {f"y_{name}": type_ for name, type_ in PLANE_POINTERS.items()} | _FLOATS
    types |= dict.fromkeys(
        ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "y_ptr"), VALUE_POINTERS[dtype]
    )
    types |= {"mask_ptr": "*i1", "bits_ptr": "*u8", "n_rows": "i32"}
    signature = {name: types.get(name, "constexpr") for name in norm_kernel.arg_names}
    by_16 = [name for name in types if name != "n_rows" or n_rows % 16 == 0]
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(norm_kernel.arg_names) if name in by_16
    }
    source = triton.compiler.ASTSource(norm_kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": n_warps(constants)})


def n_warps(constants: dict[str, Any]) -> int:
    """Of a program: so many that a thread holds one run of groups."""
    return max(1, int(constants["ROWS"] * constants["PADDED"]) // _values_of_warp(constants["C"]))


def _values_of_warp(c: Codec) -> int:
    """Of which a thread holds one run of groups: 32 threads on NVIDIA, 64 elsewhere."""
    return (32 if c.packs else 64) * 8 * c.run


def _launch_rows(arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """A program for each ``ROWS`` rows, the last of the arguments."""
    first, n_programs = arguments[0], (arguments[-1] + constants["ROWS"] - 1) // constants["ROWS"]
    if is_fake(first):
        torch.library.wrap_triton(norm_kernel)[(n_programs,)](*arguments, **constants, num_warps=n_warps(constants))
    elif not statically_known_true(first.numel() == 0):
        with on_device(first):
            norm_kernel[(n_programs,)](*arguments, **constants, num_warps=n_warps(constants))
