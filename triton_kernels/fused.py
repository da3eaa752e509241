"""The operator ``fxpipe::produce_and_compress``: an activation or a sum, and what it reads or writes stored, as one node.

Importing this module registers it. What it is, on every device: the producer in torch's own operator, then
``fxpipe::bfp_compress``. CUDA and HIP tensors go to one Triton kernel for both: the stored planes are those of the values that
it reads or writes, bit for bit; ReLU and the sum are exact, SiLU and GELU are within a rounding of torch's.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch.library has no types)

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .codec import why_not_fused
from .format import BFPFormat

_LIBRARY = torch.library.Library("fxpipe", "FRAGMENT")
_LIBRARY.define(
    "produce_and_compress(Tensor[] inputs, str format, int[] order, str producer, str stored) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)

_aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _aten.relu.default,
    "silu": _aten.silu.default,
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda x: _aten.gelu.default(x, approximate="tanh"),
}
PRODUCERS: dict[str, Callable[..., Tensor]] = {**ACTIVATIONS, "add": _aten.add.Tensor}
STORED = ("input", "output")


def stored_by(producer: str) -> tuple[str, ...]:
    """What the fused kernel can store of a producer: one of its inputs only where it has no other."""
    return STORED if producer in ACTIVATIONS else STORED[1:]


def by_definition(
    inputs: Sequence[Tensor], format: str, order: Sequence[int], producer: str, stored: str
) -> list[Tensor]:
    """The producer's output, then the planes of that or of its input in ``format``.

    ``inputs``: float32, bfloat16 or float16, of one dtype and shape: two for ``add``, else one. ``order`` is that of
    ``fxpipe::bfp_compress``. ``producer``: one of ``PRODUCERS``; ``stored``: one of ``stored_by(producer)``.

    Raises:
        ValueError: ``producer`` or ``stored`` is another, or the inputs are.
    """
    _check(inputs, producer, stored)
    y = PRODUCERS[producer](*inputs)
    return [y, *torch.ops.fxpipe.bfp_compress(inputs[0] if stored == "input" else y, format, order)]


def on_gpu(inputs: Sequence[Tensor], format: str, order: Sequence[int], producer: str, stored: str) -> list[Tensor]:
    """The same in one pass over memory; by definition where the format has no such kernel."""
    from . import launch

    _check(inputs, producer, stored)
    fmt = BFPFormat.parse(format)
    if why_not_fused(fmt):
        return by_definition(inputs, format, order, producer, stored)
    permuted = [x.permute(list(order)) for x in inputs]
    y, *planes = launch.produce_and_compress([x.reshape(-1) for x in permuted], fmt, producer, stored)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return [y.view(permuted[0].shape).permute(inverse), *planes]


def _check(inputs: Sequence[Tensor], producer: str, stored: str) -> None:
    for name, found, known in (("producer", producer, tuple(PRODUCERS)), ("stored", stored, stored_by(producer))):
        if found not in known:
            raise ValueError(f"fxpipe::produce_and_compress: unknown {name} {found!r}; known: {', '.join(known)}")
    n_inputs, kinds = 1 if producer in ACTIVATIONS else 2, [(x.dtype, tuple(x.shape)) for x in inputs]
    if len(kinds) != n_inputs or any(kind != kinds[0] for kind in kinds):
        found = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds)
        raise ValueError(
            f"fxpipe::produce_and_compress: {producer} takes {n_inputs} of one dtype and shape; found {found or 'none'}"
        )


_LIBRARY.impl("produce_and_compress", by_definition, "CPU")
_LIBRARY.impl("produce_and_compress", on_gpu, "CUDA")
torch.library.register_fake("fxpipe::produce_and_compress", by_definition, lib=_LIBRARY)
