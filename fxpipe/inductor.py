"""What Inductor does with values that are stored: the layout that it gives them, and the loops around bools.

Its C++ reads and writes a bool value by value: where a mask is made or used, that takes ten times as long as the rest.
Between its loops and ``fxpipe::pack_bools`` or ``fxpipe::unpack_bools`` a bool is therefore a byte that is made from, or made,
a float, which it does in vectors.
"""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.fx as fx

from fxpipe.triton_kernels import exact  # noqa: F401  (registers the operators)

SETTINGS = {"realize_reads_threshold": 8}
"""Of Inductor. A batch norm reads five tensors for each value, one more than what Inductor rather computes twice by default:
the ReLU after it would be written to memory where a mean and the bits of its sign need it, and that takes longer than both."""

_PACK, _UNPACK = torch.ops.fxpipe.pack_bools.default, torch.ops.fxpipe.unpack_bools.default


def channels_last(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The values that Inductor will keep channels-last although they are contiguous here: of convolutions, and what follows.

    A guess that costs a copy where it is wrong, and nothing else.
    """
    from torch._inductor.graph import GraphLowering

    found: set[fx.Node] = set()
    if not GraphLowering.decide_layout_opt(graph_module, is_inference=False):
        return found
    for node in graph_module.graph.nodes:
        follows = node.target is torch.ops.aten.convolution.default or not found.isdisjoint(node.all_input_nodes)
        if follows and node.op == "call_function" and _is_contiguous_image(node.meta.get("val")):
            found.add(node)
    return found


def _is_contiguous_image(val: object) -> bool:
    return isinstance(val, torch.Tensor) and val.dim() == 4 and val.is_contiguous()


@cache
def register() -> None:
    """Tell Inductor; it is not loaded before."""
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype

    pack, unpack = fallback_handler(_PACK), fallback_handler(_UNPACK)

    @register_lowering(_PACK, type_promotion_kind=None)
    def _lower_pack(x: Any) -> Any:
        return pack(_bytes(x) if x.get_device().type == "cpu" else x)

    @register_lowering(_UNPACK, type_promotion_kind=None)
    def _lower_unpack(packed: Any, shape: Sequence[Any], as_bytes: bool = False) -> Any:
        if packed.get_device().type != "cpu" or as_bytes:
            return unpack(packed, shape, as_bytes)
        values = to_dtype(unpack(packed, shape, True), torch.float32)
        return lowerings[torch.ops.aten.gt.Scalar](values, 0.0)


def _bytes(x: Any) -> Any:
    """Of a bool that a loop of Inductor's makes, or a permutation of it: the same as bytes in row-major order.

    That loop then makes those instead.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import permute, to_dtype

    dims = list(range(len(x.get_size())))
    if isinstance(x.data, ir.PermuteView):
        x, dims = ir.TensorBox(x.data.data), list(x.data.dims)
    if not (isinstance(x.data, ir.StorageBox) and isinstance(x.data.data, ir.Pointwise | ir.ComputedBuffer)):
        return permute(x, dims)
    from_fastest = [len(dims) - 1 - dims.index(dim) for dim in range(len(dims))]
    made = to_dtype(to_dtype(x, torch.float32), torch.uint8)
    return permute(ir.ExternKernel.require_stride_order(made, from_fastest), dims)
