"""Zero compression on the device: CUDA and HIP tensors by the Triton kernels, CPU tensors by the definition.

    planes = fxpipe.compress(x, "bfp4b32+unsigned")
    coded = zero_coding.compress(planes, "bfp4b32+unsigned")    nothing waits: every size is known
    coded = coded.shrunk()                                      waits, and lets the rest go
    planes = zero_coding.decompress(coded, "bfp4b32+unsigned")  the same planes, bit for bit

The layout, and when it pays, is in ``zero_reference``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import zero_reference
from .format import BFPFormat, Plane
from .kernel_arguments import on_device
from .launch import N_WARPS
from .zero_kernels import mask_kernel, payload_kernel, restore_kernel
from .zero_reference import TILE_GROUPS, ZeroCoded, n_tiles, n_words

Kind = Literal["mask", "payload", "restore"]
KERNELS: dict[Kind, Any] = {"mask": mask_kernel, "payload": payload_kernel, "restore": restore_kernel}
_CODE_PLANES = ("code32", "code16", "code8")
_POINTERS = {
    "code32_ptr": "*i32", "code16_ptr": "*i16", "code8_ptr": "*u8", "mask_ptr": "*u8", "words_ptr": "*i64",
    "start_ptr": "*i64", "payload_ptr": "*i32", "n_groups": "i32",
}  # fmt: skip


def compress(planes: Sequence[Tensor], format: str | BFPFormat) -> ZeroCoded:
    """``planes``, as ``fxpipe.compress`` makes them in ``format``, without the codes that are zero.

    Raises:
        FormatError: ``format`` names no format.
        ValueError: ``planes`` are not those of the format.
    """
    fmt = format if isinstance(format, BFPFormat) else BFPFormat.parse(format)
    n_groups = _checked_groups(planes, fmt)
    if not planes[0].is_cuda:
        return zero_reference.compress(planes, fmt)
    return run_compress(planes, fmt, n_groups)


def decompress(coded: ZeroCoded, format: str | BFPFormat) -> tuple[Tensor, ...]:
    """The planes that ``compress`` was given, in the same ``format``, shrunk or not.

    Raises:
        FormatError: ``format`` names no format.
        ValueError: ``coded`` has other planes beside the codes than the format has, or does not fit together.
    """
    fmt = format if isinstance(format, BFPFormat) else BFPFormat.parse(format)
    _check_coded(coded, fmt)
    return run_decompress(coded, fmt) if coded.mask.is_cuda else zero_reference.decompress(coded, fmt)


def run_compress(planes: Sequence[Tensor], fmt: BFPFormat, n_groups: int) -> ZeroCoded:
    """``compress`` by the kernels; on the CPU under ``TRITON_INTERPRET=1``."""
    n_codes, count = len(fmt.group_planes), n_tiles(n_groups)
    codes = [plane.contiguous() for plane in planes[:n_codes]]
    mask = codes[0].new_empty(n_groups, dtype=torch.uint8)
    words = codes[0].new_empty(count, dtype=torch.int64)
    payload = codes[0].new_zeros(n_words(n_groups, fmt.width), dtype=torch.int32)
    with on_device(mask):
        if n_groups:
            mask_kernel[(count,)](*_arguments(codes, fmt), mask, words, n_groups, **_constants(fmt), num_warps=N_WARPS)
        start = torch.nn.functional.pad(words.cumsum(0), (1, 0))
        if n_groups:
            arguments = (*_arguments(codes, fmt), start, payload, n_groups)
            payload_kernel[(count,)](*arguments, **_constants(fmt), num_warps=N_WARPS)
    return ZeroCoded(mask, start, payload, tuple(planes[n_codes:]))


def run_decompress(coded: ZeroCoded, fmt: BFPFormat) -> tuple[Tensor, ...]:
    """``decompress`` by the kernels; on the CPU under ``TRITON_INTERPRET=1``."""
    n_groups = coded.mask.numel()
    codes = [coded.mask.new_empty(p.length * n_groups, dtype=getattr(torch, p.dtype)) for p in fmt.group_planes]
    if n_groups:
        arguments = (coded.mask, coded.start, coded.payload, *_arguments(codes, fmt), n_groups)
        with on_device(coded.mask):
            restore_kernel[(n_tiles(n_groups),)](*arguments, **_constants(fmt), num_warps=N_WARPS)
    return (*codes, *coded.others)


def compile_for(target: GPUTarget, kind: Kind, fmt: BFPFormat) -> Any:
    """The compiled kernel for ``target``, which need not be present. Does not work under ``TRITON_INTERPRET=1``."""
    kernel = KERNELS[kind]
    signature = {name: _POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [place for place, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    attributes = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = triton.compiler.ASTSource(kernel, signature, _constants(fmt), attributes)
    return triton.compile(source, target=target, options={"num_warps": N_WARPS})


def _constants(fmt: BFPFormat) -> dict[str, int]:
    return {"WIDTH": fmt.width, "GROUPS": TILE_GROUPS}


def _arguments(codes: Sequence[Tensor], fmt: BFPFormat) -> list[Tensor]:
    """The planes of codes in the order of the kernels' arguments; the last stands in for those that the width has not."""
    by_name = dict(zip((plane.name for plane in fmt.group_planes), codes, strict=True))
    return [by_name.get(name, codes[-1]) for name in _CODE_PLANES]


def _checked_groups(planes: Sequence[Tensor], fmt: BFPFormat) -> int:
    """How many groups of 8 codes the planes hold."""
    expected = fmt.planes(1)
    lengths = [plane.numel() for plane in planes]
    n_groups = lengths[0] // fmt.group_planes[0].length if planes else 0
    codes = [plane.length * n_groups for plane in fmt.group_planes]
    if not _same_kinds(planes, expected) or lengths[: len(codes)] != codes:
        raise ValueError(f"format '{fmt}' has the planes {_kinds(expected)}; found {_found(planes)}")
    return n_groups


def _check_coded(coded: ZeroCoded, fmt: BFPFormat) -> None:
    expected = fmt.planes(1)[len(fmt.group_planes) :]
    if not _same_kinds(coded.others, expected):
        raise ValueError(
            f"beside its codes format '{fmt}' has the planes {_kinds(expected)}; found {_found(coded.others)}"
        )
    n_groups = coded.mask.numel()
    if coded.start.numel() != n_tiles(n_groups) + 1:
        raise ValueError(
            f"{n_groups} groups are {n_tiles(n_groups)} tiles, whose starts are one more; found {coded.start.numel()}"
        )


def _same_kinds(planes: Sequence[Tensor], expected: Sequence[Plane]) -> bool:
    return [plane.dtype for plane in planes] == [getattr(torch, plane.dtype) for plane in expected]


def _kinds(planes: Sequence[Plane]) -> str:
    return ", ".join(f"{plane.name} {plane.dtype}" for plane in planes)


def _found(planes: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(plane.dtype).removeprefix('torch.')} {list(plane.shape)}" for plane in planes) or "nothing"
