"""The operator ``fxpipe::activate_and_compress``: an activation, and its input or output stored, as one node.

Importing this module registers it. What it is, on every device: the activation in torch's own operator, then
``fxpipe::bfp_compress``. CUDA and HIP tensors go to one Triton kernel for both: the stored planes are those of the values that
it reads or writes, bit for bit; ReLU is exact, SiLU and GELU are within a rounding of torch's.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch.library has no types)

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .format import BFPFormat

_LIBRARY = torch.library.Library("fxpipe", "FRAGMENT")
_LIBRARY.define(
    "activate_and_compress(Tensor x, str format, int[] order, str activation, str stored) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)

_aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _aten.relu.default,
    "silu": _aten.silu.default,
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda x: _aten.gelu.default(x, approximate="tanh"),
}
STORED = ("input", "output")


def why_not_fused(fmt: BFPFormat) -> str:
    """Which part of ``fmt`` the fused kernel does not know."""
    if fmt.compress_needs_seed:
        return "a seed"
    if fmt.codebook == "learned":
        return "levels learned from the values"
    return "tiles of rows" if fmt.rows else ""


def by_definition(x: Tensor, format: str, order: Sequence[int], activation: str, stored: str) -> list[Tensor]:
    """The activation of ``x`` (float32, bfloat16 or float16; any shape), then the planes of its input or output in ``format``.

    ``order`` is that of ``fxpipe::bfp_compress``. ``activation``: one of ``ACTIVATIONS``; ``stored``: one of ``STORED``.

    Raises:
        ValueError: ``activation`` or ``stored`` is another.
    """
    _check(activation, stored)
    y = ACTIVATIONS[activation](x)
    return [y, *torch.ops.fxpipe.bfp_compress(x if stored == "input" else y, format, order)]


def on_gpu(x: Tensor, format: str, order: Sequence[int], activation: str, stored: str) -> list[Tensor]:
    """The same in one pass over memory; by definition where the format has no such kernel."""
    from . import launch

    _check(activation, stored)
    fmt = BFPFormat.parse(format)
    if why_not_fused(fmt):
        return by_definition(x, format, order, activation, stored)
    permuted = x.permute(list(order))
    y, *planes = launch.activate_and_compress(permuted.reshape(-1), fmt, activation, stored)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return [y.view(permuted.shape).permute(inverse), *planes]


def _check(activation: str, stored: str) -> None:
    for name, found, known in (("activation", activation, tuple(ACTIVATIONS)), ("stored", stored, STORED)):
        if found not in known:
            raise ValueError(f"fxpipe::activate_and_compress: unknown {name} {found!r}; known: {', '.join(known)}")


_LIBRARY.impl("activate_and_compress", by_definition, "CPU")
_LIBRARY.impl("activate_and_compress", on_gpu, "CUDA")
torch.library.register_fake("fxpipe::activate_and_compress", by_definition, lib=_LIBRARY)
