"""``launch.compress`` and ``launch.decompress`` as the PTX that they would run does it, for devices that are not here."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from kernels.emulator import Memory, emulate
from kernels.ptx import Kernel, parse
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fxpipe.triton_kernels import BFPFormat, kernel_arguments, launch, learned, norm_launch, packing

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


@cache
def kernel(target: int, kind: launch.Kind, fmt: BFPFormat, dtype: torch.dtype, numel: int) -> Kernel:
    """Compiled for ``target``, 90 for sm_90."""
    name = str(dtype).removeprefix("torch.")
    compiled = launch.compile_for(GPUTarget("cuda", target, 32), kind, fmt, name, numel)
    return parse(compiled.asm["ptx"])


def compiled_for(target: int, kind: launch.Kind, fmt: BFPFormat, dtype: torch.dtype, numel: int) -> Kernel:
    """The same for sizes that compile alike."""
    alike = launch.TILE * (1 if numel < 2**31 else 2**31)
    odd = 0 if numel % launch.TILE == 0 else 16 if numel % 16 == 0 else 1
    return kernel(target, kind, fmt, dtype, alike + odd)


def compress(ptx: Kernel, x: Tensor, fmt: BFPFormat, before: int = 0, fuse: bool = False) -> list[Tensor]:
    """The planes of ``x``, which follow ``before`` whole tiles of other values, but for the levels."""
    memory, numel = Memory(), x.numel()
    behind = before * launch.TILE
    source = memory.place(_bytes(x)) - behind * x.itemsize
    planes = [plane for plane in kernel_arguments.kernel_planes(fmt, numel) if plane.name != "level"]
    at = [memory.place(_bytes(_empty(plane)), writable=True) for plane in planes]
    pointers = _pointers(at, fmt, behind)
    if fmt.codebook == "learned":
        levels = [level & 255 for level in learned.levels_of(x, fmt)]
        pointers[-1] = memory.place(_bytes(torch.tensor(levels, dtype=torch.uint8)))
    arguments = [source, *pointers, memory.place(_bytes(SEED.view(1))), behind + numel]
    emulate(ptx, memory, arguments, _programs(numel, before), fuse)
    stored = [_tensor(memory.at(a, p.n_bytes), getattr(torch, p.dtype)) for a, p in zip(at, planes, strict=True)]
    n_codes = len(fmt.group_planes)
    return [*stored[:n_codes], *packing.pack_scales(stored[n_codes], fmt), *stored[n_codes + 1 :]]


def produce_and_compress(
    target: int, producer: str, stored: str, inputs: Sequence[Tensor], fmt: BFPFormat, fuse: bool = False
) -> list[Tensor]:
    """The producer's output of ``inputs`` and the planes, as ``fused_kernel`` compiled for ``target`` makes them."""
    x = inputs[0]
    memory, numel, name = Memory(), x.numel(), str(x.dtype).removeprefix("torch.")
    compiled = launch.compile_fused_for(GPUTarget("cuda", target, 32), producer, stored, fmt, name, numel)
    sources = [memory.place(_bytes(i)) for i in inputs]
    y = memory.place(_bytes(torch.empty_like(x)), writable=True)
    planes = kernel_arguments.kernel_planes(fmt, numel)
    at = [memory.place(_bytes(_empty(plane)), writable=True) for plane in planes]
    arguments = [sources[0], sources[-1], y, *_pointers(at, fmt, 0), numel]
    emulate(parse(compiled.asm["ptx"]), memory, arguments, _programs(numel, 0), fuse)
    return [
        _tensor(memory.at(y, x.nbytes), x.dtype),
        *kernel_arguments.stored_planes(
            [_tensor(memory.at(a, p.n_bytes), getattr(torch, p.dtype)) for a, p in zip(at, planes, strict=True)], fmt
        ),
    ]


def norm_and_compress(
    target: int, norm: norm_launch.Norm, stored: str, inputs: dict[str, Any], fmt: BFPFormat, fuse: bool = False
) -> list[Tensor]:
    """What ``norms.by_definition`` returns, flat, as ``norm_kernel`` compiled for ``target`` makes it."""
    x, memory = inputs["x"], Memory()
    n_rows, name = x.numel() // norm.width, str(x.dtype).removeprefix("torch.")
    ptx = parse(norm_launch.compile_norm_for(GPUTarget("cuda", target, 32), norm, stored, fmt, name, n_rows).asm["ptx"])
    read = [memory.place(_bytes(inputs[i])) if i in inputs else 0 for i in ("x", "residual", "mask", "weight", "bias")]
    statistics = torch.empty(n_rows)
    written = {
        "sum": torch.empty_like(x) if "residual" in inputs else None, "y": torch.empty_like(x),
        "mean": statistics if norm.kind == "layer" else None, "rstd": statistics,
        "bits": torch.empty(x.numel() // 8, dtype=torch.uint8) if "mask" in inputs else None,
    }  # fmt: skip
    at = {name: 0 if t is None else memory.place(_bytes(t), writable=True) for name, t in written.items()}
    planes = kernel_arguments.kernel_planes(fmt, x.numel())
    of_planes = [
        [memory.place(_bytes(_empty(plane)), writable=True) for plane in planes] if stored in (which, "both") else []
        for which in ("input", "output")
    ]
    pointers = [pointer for places in of_planes for pointer in _pointers(places, fmt, 0)[:-1]]
    constants = norm.constants(fmt, name, stored, n_rows, packs=True)
    programs = range(-(-n_rows // constants["ROWS"]))
    emulate(ptx, memory, [*read, *at.values(), *pointers, n_rows], programs, fuse)
    found = [_tensor(memory.at(at[name], t.nbytes), t.dtype) for name, t in written.items() if t is not None]
    for places in filter(None, of_planes):
        content = [
            _tensor(memory.at(a, p.n_bytes), getattr(torch, p.dtype)) for a, p in zip(places, planes, strict=True)
        ]
        found += kernel_arguments.stored_planes(content, fmt)
    return found


def decompress(
    ptx: Kernel, planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype,
    before: int = 0, fuse: bool = False,
) -> Tensor:  # fmt: skip
    """The values that ``planes`` store; ``before`` as above."""
    memory, n_codes = Memory(), len(fmt.group_planes)
    behind = before * launch.TILE
    scales = packing.unpack_scales(planes[n_codes:], fmt, fmt.n_blocks(numel)).to(torch.uint8)
    behind_scales = planes[len(planes) - kernel_arguments.n_ancillary(fmt) :]
    at = [memory.place(_bytes(plane)) for plane in (*planes[:n_codes], scales, *behind_scales)]
    y = memory.place(_bytes(torch.empty(numel, dtype=dtype)), writable=True)
    seed = memory.place(_bytes(SEED.view(1)))
    arguments = [*_pointers(at, fmt, behind), y - behind * dtype.itemsize, seed, behind + numel, launch.PLACE_BITS]
    emulate(ptx, memory, arguments, _programs(numel, before), fuse)
    return _tensor(memory.at(y, numel * dtype.itemsize), dtype)


def _programs(numel: int, before: int) -> range:
    return range(before, before + -(-numel // launch.TILE))


def _pointers(at: Sequence[int], fmt: BFPFormat, behind: int) -> list[int]:
    """The planes' addresses in the order of the kernels' arguments, as if ``behind`` values came first; 0 for none."""
    planes = kernel_arguments.kernel_planes(fmt, behind)
    by_name = {
        plane.name: address - plane.n_bytes * (plane.name != "level")
        for plane, address in zip(planes, at, strict=False)
    }
    return [by_name.get(name, 0) for name in ("code32", "code16", "code8", "scale", "outlier", "level")]


def _empty(plane) -> Tensor:
    return torch.empty(plane.length, dtype=getattr(torch, plane.dtype))


def _bytes(x: Tensor):
    return x.contiguous().view(-1).view(torch.uint8).numpy()


def _tensor(content, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(content).view(dtype)
