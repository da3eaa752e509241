"""``launch.compress`` and ``launch.decompress`` as the PTX that they would run does it, for devices that are not here."""

from collections.abc import Sequence
from functools import cache

import torch
from kernels.emulator import Memory, emulate
from kernels.ptx import Kernel, parse
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fxpipe.triton_kernels import BFPFormat, launch


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
    """The planes of ``x``, which follow ``before`` whole tiles of other values."""
    memory, numel = Memory(), x.numel()
    behind = before * launch.TILE
    source = memory.place(_bytes(x)) - behind * x.itemsize
    planes = {plane.name: plane for plane in fmt.planes(numel)}
    at = {name: memory.place(_bytes(_empty(plane)), writable=True) for name, plane in planes.items()}
    emulate(ptx, memory, [source, *_pointers(at, fmt, behind), behind + numel], _programs(numel, before), fuse)
    return [_tensor(memory.at(at[name], plane.n_bytes), getattr(torch, plane.dtype)) for name, plane in planes.items()]


def decompress(
    ptx: Kernel, planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype,
    before: int = 0, fuse: bool = False,
) -> Tensor:  # fmt: skip
    """The values that ``planes`` store; ``before`` as above."""
    memory = Memory()
    behind = before * launch.TILE
    names = [plane.name for plane in fmt.planes(numel)]
    at = {name: memory.place(_bytes(plane)) for name, plane in zip(names, planes, strict=True)}
    y = memory.place(_bytes(torch.empty(numel, dtype=dtype)), writable=True)
    arguments = [*_pointers(at, fmt, behind), y - behind * dtype.itemsize, behind + numel, launch.PLACE_BITS]
    emulate(ptx, memory, arguments, _programs(numel, before), fuse)
    return _tensor(memory.at(y, numel * dtype.itemsize), dtype)


def _programs(numel: int, before: int) -> range:
    return range(before, before + -(-numel // launch.TILE))


def _pointers(at: dict[str, int], fmt: BFPFormat, behind: int) -> list[int]:
    """The planes' addresses in the order of the kernels' arguments, as if ``behind`` values came first; 0 for none."""
    sizes = {plane.name: plane.n_bytes for plane in fmt.planes(behind)}
    return [at[name] - sizes[name] if name in at else 0 for name in ("code32", "code16", "code8", "exponent")]


def _empty(plane) -> Tensor:
    return torch.empty(plane.length, dtype=getattr(torch, plane.dtype))


def _bytes(x: Tensor):
    return x.contiguous().view(torch.uint8).numpy()


def _tensor(content, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(content).view(dtype)
