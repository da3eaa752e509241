"""Operators for what is stored exactly: ``fxpipe::pack_bools``, ``fxpipe::unpack_bools``, and seeds from values.

Plain torch operators, so they run on every device; on the CPU bools go to the compiled kernel where there is one.
Importing this module registers them; none is differentiable.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch.library has no types)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

_LIBRARY = torch.library.Library("fxpipe", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("pack_bools(Tensor x) -> Tensor", tags=_TAGS)
_LIBRARY.define("unpack_bools(Tensor packed, SymInt[] shape, bool as_bytes=False) -> Tensor", tags=_TAGS)
_LIBRARY.define("seed_of(Tensor x, int index) -> Tensor", tags=_TAGS)

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1: byte i becomes bit i of the product's top byte, and no two terms meet."""
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)  # as an int64: bit i of byte i
_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
SEED_SAMPLE = 1024
"""A seed looks at no more values than this."""


def _pack_bools(x: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] of bool ``x``, n values, row-major: value 8k + i is bit i of byte k; the last byte is filled with 0.

    ``x`` may also be uint8, of zeros and ones.

    Raises:
        TypeError: ``x`` is neither.
    """
    _check_bools(x)
    flat = x.reshape(-1).view(torch.bool)
    if x.device.type == "cpu" and (packed := native.pack_bools(flat)) is not None:
        return packed
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
        flat = flat.clone() if flat.storage_offset() % 8 else flat
    eights = flat.view(torch.int64)
    return ((eights * _GATHER) >> 56).to(torch.uint8)


def _unpack_bools(packed: Tensor, shape: Sequence[int], as_bytes: bool = False) -> Tensor:
    """bool [*shape], contiguous: what ``pack_bools`` stored as ``packed``; ``as_bytes``: the same as uint8, zeros and ones.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: ``packed`` is not [ceil(n / 8)] for the n values of ``shape``.
    """
    _check_dtype("unpack_bools", packed, torch.uint8)
    numel = math.prod(shape)
    if packed.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"fxpipe::unpack_bools: {numel} values, shape {list(shape)}, take the shape [{(numel + 7) // 8}], "
            f"not {list(packed.shape)}"
        )
    flat = native.unpack_bools(packed, numel) if packed.device.type == "cpu" else None
    values = _unpacked(packed, numel) if flat is None else flat
    return (values.view(torch.uint8) if as_bytes else values).view(list(shape))


def _unpacked(packed: Tensor, numel: int) -> Tensor:
    bytes = torch.arange(256, device=packed.device)
    eights = (
        ((bytes * _SPREAD) & _SELECT).view(torch.uint8).ne(0).view(torch.int64)
    )  # of each byte, eight bools as one number
    values = eights.index_select(0, packed.to(torch.int32)).view(torch.bool)
    return values if len(values) == numel else values[:numel].clone()


def _seed_of(x: Tensor, index: int) -> Tensor:
    """int64 [1]: a seed that changes with the values of ``x`` (any dtype and shape) and with ``index``.

    From the sum over the bytes of up to ``SEED_SAMPLE`` evenly spaced values, each byte with a weight of its own, modulo 2^64:
    the same on every device, whatever the order of the sum. The global generator is left alone.
    """
    step = max(1, math.ceil(x.numel() / SEED_SAMPLE))
    sample = x.take(torch.arange(0, x.numel(), step, device=x.device))
    data = sample.view(torch.uint8).to(torch.int64) + 1
    seed = (data * torch.arange(1, len(data) + 1, device=x.device)).sum(0, keepdim=True) + index
    for shift in (32, 29, 32):  # so that each bit of the sum reaches both halves of the seed
        seed = (seed ^ (seed >> shift)) * _WEYL
    return seed


def _check_dtype(operator: str, x: Tensor, expected: torch.dtype) -> None:
    if x.dtype is not expected:
        raise TypeError(f"fxpipe::{operator} takes {expected}; found {x.dtype} {list(x.shape)}")


def _check_bools(x: Tensor) -> None:
    _check_dtype("pack_bools", x, torch.uint8 if x.dtype is torch.uint8 else torch.bool)


def _pack_bools_fake(x: Tensor) -> Tensor:
    _check_bools(x)
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _unpack_bools_fake(packed: Tensor, shape: Sequence[int], as_bytes: bool = False) -> Tensor:
    _check_dtype("unpack_bools", packed, torch.uint8)
    return packed.new_empty(shape, dtype=torch.uint8 if as_bytes else torch.bool)


def _seed_of_fake(x: Tensor, index: int) -> Tensor:
    return x.new_empty(1, dtype=torch.int64)


for _name, _operator, _fake in (
    ("pack_bools", _pack_bools, _pack_bools_fake),
    ("unpack_bools", _unpack_bools, _unpack_bools_fake),
    ("seed_of", _seed_of, _seed_of_fake),
):
    _LIBRARY.impl(_name, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxpipe::{_name}", _fake, lib=_LIBRARY)
