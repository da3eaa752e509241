"""Runs the Triton kernels on tensors, or compiles them for a device that is not there.

CUDA and HIP tensors; under ``TRITON_INTERPRET=1`` CPU tensors too, for tests. On fake tensors a launch becomes a node of the
graph that is being traced.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.backends.compiler import GPUTarget

from . import learned, packing
from .codec import FLOAT32, Codec, codec, has_one_outlier
from .format import GROUP, BFPFormat
from .fused_kernels import fused_kernel
from .kernel_arguments import (
    PLANE_POINTERS,
    VALUE_POINTERS,
    aligned,
    kernel_planes,
    n_ancillary,
    on_device,
    on_nvidia,
    plane_arguments,
    stored_planes,
)
from .kernels import compress_kernel, decompress_kernel
from .reference import dtype_name

TILE = 4096
"""Values that one program handles: 32 a thread."""

N_WARPS = 4
_MORE_WARPS = 8
"""With 16 values a thread: where 32 would not fit into the registers, on NVIDIA."""

_REGISTERS = 40
"""Of a thread at most, on NVIDIA: so few are enough, and the compiler takes more where it may."""

_REGISTERS_FOR_MANY_SCALES = 128
"""With ``+search``: for more than five scales, blocks of 8 and 16, errors of more bits, or float32."""

PLACE_BITS = 0x4B000000
"""Bits of the float 2^23, see ``tiles.decode``."""

Kind = Literal["compress", "decompress"]
KERNELS: dict[Kind, Any] = {"compress": compress_kernel, "decompress": decompress_kernel}


def compress(x_flat: Tensor, fmt: BFPFormat, seed: Tensor | None = None, tile: int = TILE) -> tuple[Tensor, ...]:
    """The planes of ``x_flat`` [numel], contiguous. ``tile``: values a program, a power of two of at least a block.

    ``seed``: an int64 tensor of one value on the same device, for formats with ``+sr``.
    """
    numel = x_flat.numel()
    constants = _constants(fmt, dtype_name(x_flat.dtype, fmt), numel, tile, packs=on_nvidia())
    planes = [x_flat.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in kernel_planes(fmt, numel)]
    if fmt.codebook == "learned":
        levels = [level & 255 for level in learned.levels_of(x_flat, fmt)]
        planes[-1] = torch.tensor(levels, dtype=torch.uint8, device=x_flat.device)
    if not statically_known_true(numel == 0):
        x_flat = aligned(x_flat)
        arguments = (x_flat, *plane_arguments(planes, fmt, x_flat), x_flat if seed is None else seed, numel)
        _launch(compress_kernel, arguments, constants, fmt, numel, tile)
    return stored_planes(planes, fmt)


def produce_and_compress(
    inputs: Sequence[Tensor], fmt: BFPFormat, producer: str, stored: str, tile: int = TILE
) -> tuple[Tensor, ...]:
    """The producer's output of ``inputs``, one or two [numel], contiguous, and the planes that are stored; see ``fused``."""
    numel = inputs[0].numel()
    constants = _constants(fmt, dtype_name(inputs[0].dtype, fmt), numel, tile, packs=on_nvidia())
    y = inputs[0].new_empty(numel)
    planes = [y.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in kernel_planes(fmt, numel)]
    if not statically_known_true(numel == 0):
        x, z = map(aligned, (inputs[0], inputs[-1]))
        constants |= {"PRODUCER": producer, "STORED": stored}
        _launch(fused_kernel, (x, z, y, *plane_arguments(planes, fmt, x), numel), constants, fmt, numel, tile)
    return (y, *stored_planes(planes, fmt))


def decompress(
    planes: Sequence[Tensor],
    fmt: BFPFormat,
    numel: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    tile: int = TILE,
) -> Tensor:
    """The values [numel] of ``dtype`` that ``planes``, contiguous, store. ``seed``: as above, for formats with ``+dither``."""
    constants = _constants(fmt, dtype_name(dtype, fmt), numel, tile, packs=on_nvidia())
    y = planes[0].new_empty(numel, dtype=dtype)
    if not statically_known_true(numel == 0):
        planes = [aligned(plane) for plane in planes]
        if fmt.scale_kind.bits < GROUP:
            n_codes = len(fmt.group_planes)
            scales = packing.unpack_scales(planes[n_codes:], fmt, fmt.n_blocks(numel))
            planes = [*planes[:n_codes], scales.to(torch.uint8), *planes[len(planes) - n_ancillary(fmt) :]]
        arguments = (
            *plane_arguments(planes, fmt, planes[0]),
            y,
            planes[0] if seed is None else seed,
            numel,
            PLACE_BITS,
        )
        _launch(decompress_kernel, arguments, constants, fmt, numel, tile)
    return y


def compile_for(target: GPUTarget, kind: Kind, fmt: BFPFormat, dtype: str, numel: int) -> Any:
    """The compiled kernel for ``target``, which need not be present; its ``asm`` has "ptx" and "cubin", or "amdgcn".

    ``numel`` decides what the launch of so many values would: whether all tiles are full, how sizes divide, and
    whether they need 64 bits.
    Does not work under ``TRITON_INTERPRET=1``.
    """
    constants = _constants(fmt, dtype, numel, TILE, packs=target.backend == "cuda")
    return _compiled(target, KERNELS[kind], constants, fmt, dtype, numel)


def compile_fused_for(target: GPUTarget, producer: str, stored: str, fmt: BFPFormat, dtype: str, numel: int) -> Any:
    """The same of ``fused_kernel``; ``stored`` may be ``none`` here, for the producer alone."""
    constants = _constants(fmt, dtype, numel, TILE, packs=target.backend == "cuda")
    constants |= {"PRODUCER": producer, "STORED": stored}
    return _compiled(target, fused_kernel, constants, fmt, dtype, numel)


def _compiled(target: GPUTarget, kernel: Any, constants: dict[str, Any], fmt: BFPFormat, dtype: str, numel: int) -> Any:
    types = {
        **PLANE_POINTERS,
        "x_ptr": VALUE_POINTERS[dtype],
        "z_ptr": VALUE_POINTERS[dtype],
        "y_ptr": VALUE_POINTERS[dtype],
        "numel": "i32" if numel < 2**31 else "i64",
        "place_bits": "i32",
        "seed_ptr": "*i64",
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    by_16 = [name for name in types if name != "numel" or numel % 16 == 0]
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in by_16}
    architecture = int(target.arch) if target.backend == "cuda" else 0
    constants, options = _for_device(kernel, constants, fmt, architecture)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def _constants(fmt: BFPFormat, dtype: str, numel: int, tile: int, packs: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    c = codec(fmt, dtype, packs=packs)
    return {"C": c, "BLOCKS": tile // fmt.block, "EVEN": statically_known_true(numel % tile == 0)}


def _launch(
    kernel: Any, arguments: Sequence[Any], constants: dict[str, Any], fmt: BFPFormat, numel: int, tile: int
) -> None:
    """A program for each tile of ``numel`` values, on the device of the first argument, or recorded where that is fake."""
    first, n_programs = arguments[0], (numel + tile - 1) // tile
    if is_fake(first):  # Inductor, which will compile it, knows no limit of registers
        torch.library.wrap_triton(kernel)[(n_programs,)](*arguments, **constants, num_warps=N_WARPS)
        return
    with on_device(first):
        constants, options = _for_device(kernel, constants, fmt, _architecture(first))
        kernel[(n_programs,)](*arguments, **constants, **options)


def _for_device(
    kernel: Any, constants: dict[str, Any], fmt: BFPFormat, architecture: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The compile-time arguments, and how to compile, for NVIDIA's ``architecture``, 90 for sm_90, or for 0, another device."""
    c = constants["C"]
    many = fmt.outliers > 0 and not has_one_outlier(fmt) if kernel is compress_kernel else fmt.outliers > 1
    slow = fmt.codebook == "learned" or (fmt.codebook and fmt.dither) or many
    if not architecture or slow or kernel is fused_kernel:  # these take the registers that they want
        return constants, {"num_warps": N_WARPS}
    if kernel is decompress_kernel:
        n_warps = _MORE_WARPS if _is_tight_to_decompress(c, architecture) else N_WARPS
        return constants, {"num_warps": n_warps, "maxnreg": _REGISTERS}
    if _is_tight_to_compress(c, architecture):
        tighter = constants | {"C": c._replace(run=min(c.run, TILE // (_MORE_WARPS * 32 * GROUP)))}
        return tighter, {"num_warps": _MORE_WARPS, "maxnreg": _REGISTERS}
    return constants, {"num_warps": N_WARPS, "maxnreg": _registers(c)}


def _is_tight_to_compress(c: Codec, architecture: int) -> bool:
    """As compiled for blocks of every size."""
    if len(c.search) > 0:
        return architecture >= 100 and c.codebook and c.unsigned and _registers(c) == _REGISTERS
    return c.dtype == FLOAT32 or (architecture >= 100 and c.codebook and (c.block < 32 or c.width == 5))


def _is_tight_to_decompress(c: Codec, architecture: int) -> bool:
    return architecture >= 100 and c.codebook and c.width in (3, 5) and c.scale_mantissa_bits > 0


def _registers(c: Codec) -> int:
    """As few as spill none, as compiled for blocks of every size."""
    wide = c.magnitude_bits > 5 and not c.codebook
    many = len(c.search) > 5 or wide or c.dtype == FLOAT32 or c.block < 32
    return _REGISTERS_FOR_MANY_SCALES if len(c.search) > 0 and many else _REGISTERS


def _architecture(x: Tensor) -> int:
    if not on_nvidia():
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
