"""The operators ``fxpipe::bfp_compress`` and ``fxpipe::bfp_decompress``, each one visible node in every graph.

CUDA and HIP tensors go to the Triton kernels, CPU tensors to ``cpu``; fake tensors get their shapes, symbolic ones too.
Importing this module registers the operators. Neither is differentiable, and both leave their inputs alone.

``order`` is a permutation of the dimensions: values are stored in the row-major order of ``x.permute(order)``, and the
decompressed tensor's memory runs in that order. With the order in which the memory of a dense ``x`` runs (transposed or
channels-last, say) nothing is copied; any other order is as right, by way of a copy. Tiles are of the permuted tensor.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch.library has no types)

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu, exact, fused, norms, open_decoding, tiling  # noqa: F401  (some register operators of their own)
from .format import BFPFormat
from .plane_layout import plane_layouts
from .reference import checked_seed, dtype_name

_LIBRARY = torch.library.Library("fxpipe", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_LIBRARY.define("bfp_compress(Tensor x, str format, int[] order, Tensor? seed=None) -> Tensor[]", tags=_TAGS)
_LIBRARY.define(
    "bfp_decompress(Tensor[] planes, str format, SymInt[] shape, int[] order, ScalarType dtype, Tensor? seed=None)"
    " -> Tensor",
    tags=_TAGS,
)


def compress(x: Tensor, format: str | BFPFormat, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """Store ``x`` (any shape; float32, bfloat16 or float16) in ``format``, row-major: its planes, one-dimensional.

    ``seed``: an int64 tensor of one value on the device of ``x``, for formats that round by one (``+sr``).

    Raises:
        FormatError: ``format`` names no format.
        TypeError: the dtype of ``x`` is another.
        ValueError: the seed is missing, or is none.
    """
    return tuple(torch.ops.fxpipe.bfp_compress(x, str(format), list(range(x.dim())), seed))


def decompress(
    packed: Sequence[Tensor],
    format: str | BFPFormat,
    shape: Sequence[int],
    dtype: torch.dtype,
    seed: Tensor | None = None,
) -> Tensor:
    """The tensor of ``shape`` and ``dtype`` that ``compress`` stored as ``packed`` in the same ``format``.

    ``seed``: an int64 tensor of one value, for formats that decode at random (``+dither``); any, not that of ``compress``.

    Raises:
        FormatError: ``format`` names no format.
        TypeError: ``dtype`` is not float32, bfloat16 or float16.
        ValueError: ``packed`` does not hold the planes of that format for so many values, or the seed is missing.
    """
    order = list(range(len(shape)))
    value: Tensor = torch.ops.fxpipe.bfp_decompress(list(packed), str(format), list(shape), order, dtype, seed)
    return value


def _compress_with(encode: Callable[..., Sequence[Tensor]]) -> Callable[..., list[Tensor]]:
    """The operator on a device where ``encode(values, format, seed)`` makes the planes."""

    def compress(x: Tensor, format: str, order: Sequence[int], seed: Tensor | None = None) -> list[Tensor]:
        fmt = _checked(format, x.dtype, order, x.dim())
        return list(encode(_stored(x, fmt, order), fmt, checked_seed(seed, fmt, fmt.compress_needs_seed)))

    return compress


def _decompress_with(decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator on a device where ``decode(planes, format, numel, dtype, seed)`` makes the values."""

    def decompress(
        planes: Sequence[Tensor],
        format: str,
        shape: Sequence[int],
        order: Sequence[int],
        dtype: torch.dtype,
        seed: Tensor | None = None,
    ) -> Tensor:
        fmt = _checked(format, dtype, order, len(shape))
        planes, numel = _checked_planes(planes, fmt, shape, order)
        stored = decode(planes, fmt, numel, dtype, checked_seed(seed, fmt, fmt.decompress_needs_seed))
        return _shaped(stored, fmt, shape, order)

    return decompress


def _encode_gpu(values: Tensor, fmt: BFPFormat, seed: Tensor | None) -> Sequence[Tensor]:
    from . import launch

    return launch.compress(values, fmt, seed)


def _decode_gpu(
    planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, seed: Tensor | None
) -> Tensor:
    from . import launch

    return launch.decompress(planes, fmt, numel, dtype, seed)


def _compress_fake(x: Tensor, format: str, order: Sequence[int], seed: Tensor | None = None) -> list[Tensor]:
    fmt = _checked(format, x.dtype, order, x.dim())
    checked_seed(seed, fmt, fmt.compress_needs_seed)
    numel = fmt.stored_numel([x.shape[dim] for dim in order])
    return [x.new_empty(plane.length, dtype=getattr(torch, plane.dtype)) for plane in fmt.planes(numel)]


def _decompress_fake(
    planes: Sequence[Tensor],
    format: str,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
    seed: Tensor | None = None,
) -> Tensor:
    fmt = _checked(format, dtype, order, len(shape))
    _check_plane_kinds(planes, fmt)
    checked_seed(seed, fmt, fmt.decompress_needs_seed)
    permuted = [shape[dim] for dim in order]
    return planes[0].new_empty(permuted, dtype=dtype).permute(_inverse(order))


def _checked(format: str, dtype: torch.dtype, order: Sequence[int], n_dims: int) -> BFPFormat:
    fmt = _format(format, dtype)
    if not _is_identity(order, n_dims) and sorted(order) != list(range(n_dims)):
        raise ValueError(
            f"format '{fmt}': order {list(order)} is not a permutation of the {n_dims} dimensions {list(range(n_dims))}"
        )
    return fmt


@lru_cache(maxsize=256)
def _format(format: str, dtype: torch.dtype) -> BFPFormat:
    fmt = BFPFormat.parse(format)
    dtype_name(dtype, fmt)
    return fmt


def _is_identity(order: Sequence[int], n_dims: int) -> bool:
    return len(order) == n_dims and all(map(operator.eq, order, range(n_dims)))


def _check_plane_kinds(planes: Sequence[Tensor], fmt: BFPFormat) -> None:
    """Count and dtypes of the planes: what is known of fake tensors too."""
    expected = plane_layouts(fmt)
    found = [plane.dtype for plane in planes]
    if found != [plane.dtype for plane in expected]:
        legal = ", ".join(f"{plane.name} {_name(plane.dtype)}" for plane in expected)
        raise ValueError(f"format '{fmt}' has the planes {legal}; found {', '.join(map(_name, found)) or 'none'}")


def _checked_planes(
    planes: Sequence[Tensor], fmt: BFPFormat, shape: Sequence[int], order: Sequence[int]
) -> tuple[list[Tensor], int]:
    """The planes, contiguous, and how many values they store."""
    _check_plane_kinds(planes, fmt)
    numel = fmt.stored_numel([shape[dim] for dim in order] if fmt.rows else shape)
    n_blocks = fmt.n_blocks(numel)
    for plane, expected in zip(planes, plane_layouts(fmt), strict=True):
        if plane.dim() != 1 or plane.numel() != expected.length(n_blocks):
            raise ValueError(
                f"format '{fmt}': plane {expected.name} of {numel} values, shape {list(shape)}, has the shape "
                f"[{expected.length(n_blocks)}], not {list(plane.shape)}"
            )
    return [plane.contiguous() for plane in planes], numel


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored(x: Tensor, fmt: BFPFormat, order: Sequence[int]) -> Tensor:
    return tiling.to_stored(x if _is_identity(order, x.dim()) else x.permute(list(order)), fmt)


def _shaped(stored: Tensor, fmt: BFPFormat, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    if _is_identity(order, len(shape)):
        return tiling.from_stored(stored, fmt, shape)
    return tiling.from_stored(stored, fmt, [shape[dim] for dim in order]).permute(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


compress_on_gpu = _compress_with(_encode_gpu)
"""``fxpipe::bfp_compress`` as CUDA and HIP tensors have it."""
decompress_on_gpu = _decompress_with(_decode_gpu)
"""``fxpipe::bfp_decompress``, likewise."""
decompress_in_operators = _decompress_with(open_decoding.decompress)
"""The same in operators that loops can take in, for formats that ``open_decoding.why_not_open`` says nothing against."""

_LIBRARY.impl("bfp_compress", _compress_with(cpu.compress), "CPU")
_LIBRARY.impl("bfp_decompress", _decompress_with(cpu.decompress), "CPU")
_LIBRARY.impl("bfp_compress", compress_on_gpu, "CUDA")
_LIBRARY.impl("bfp_decompress", decompress_on_gpu, "CUDA")
torch.library.register_fake("fxpipe::bfp_compress", _compress_fake, lib=_LIBRARY)
torch.library.register_fake("fxpipe::bfp_decompress", _decompress_fake, lib=_LIBRARY)
