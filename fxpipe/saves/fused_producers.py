"""On GPUs an activation and the storing of its input or output become one node, so that one kernel does both in one pass."""

import operator
from collections.abc import Iterator

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpipe.graph_module import describe
from fxpipe.saves.value_facts import memory_order, storage_of, view_source
from fxpipe.triton_kernels.codec import DEVICES
from fxpipe.triton_kernels.format import BFPFormat
from fxpipe.triton_kernels.fused import why_not_fused

aten = torch.ops.aten

IN_MEMORY = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.linear.default,
)  # fmt: skip
"""What computes a value that is in memory anyway. Others may run in one kernel of Inductor's with what reads them."""


def fuse_producers(forward: fx.Graph, *, exact: bool) -> None:
    """Fuses each activation of a matrix product or convolution that is stored, or whose input is; edits in place.

    A residual sum is left to Inductor, which computes it in one kernel with the norm that reads it: the sum and its storing
    in one kernel, then the norm, would move as many bytes, 10.5 for a 16-bit value in 4 bits.

    ReLU is exact. SiLU and GELU are within a rounding of torch's, as they are of Inductor's: with ``exact`` they are left.

    Before::

        silu = aten.silu(mm)
        compress_mm = fxpipe.bfp_compress(mm, 'bfp4b32', [0, 1])
        mm_code32 = compress_mm[0]; mm_exponent = compress_mm[1]

    After::

        compress_mm = fxpipe.activate_and_compress(mm, 'bfp4b32', [0, 1], 'silu', 'input')
        silu = compress_mm[0]
        mm_code32 = compress_mm[1]; mm_exponent = compress_mm[2]
    """
    for compress in forward.find_nodes(op="call_function", target=torch.ops.fxpipe.bfp_compress.default):
        value = compress.args[0]
        assert isinstance(value, fx.Node)
        producers = (p for p in _producers(value) if not exact or _activation(p[0]) == "relu")
        found = ((producer, stored) for producer, stored in producers if _pays(producer, stored, compress))
        if (chosen := next(found, None)) is not None:
            _fuse(*chosen, compress)


def _producers(value: fx.Node) -> list[tuple[fx.Node, str]]:
    """The activations whose output the value is, or whose input, seen through views."""
    base = storage_of(value)
    if _activation(base):
        return [(base, "output")]
    return [(reader, "input") for reader in _readers(base) if _activation(reader)]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _readers(user) if view_source(user) is node else (user,)


def _activation(node: fx.Node) -> str:
    """Its name for ``fxpipe::activate_and_compress``; empty for other operators."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    names: dict[object, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}
    return names.get(node.target, "")


def _pays(producer: fx.Node, stored: str, compress: fx.Node) -> bool:
    """One pass over one memory: a GPU's, in which input, output and what is stored lie alike and without gaps."""
    source, value = producer.args[0], compress.args[0]
    assert isinstance(source, fx.Node) and isinstance(value, fx.Node)  # noqa: PT018
    x, y = source.meta["val"], producer.meta["val"]
    return (
        x.device.type in DEVICES
        and x.dtype == y.dtype
        and x.stride() == y.stride()
        and bool(x.permute(memory_order(x)).is_contiguous())
        and (value is (producer if stored == "output" else source) or _flat_alike(value.meta["val"], y))
        and not why_not_fused(BFPFormat.parse(str(compress.args[1])))
        and _in_memory(source)
    )


def _flat_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whole tensors that are views of each other."""
    return a.is_contiguous() and b.is_contiguous() and statically_known_true(a.numel() == b.numel())


def _in_memory(node: fx.Node) -> bool:
    while (source := view_source(node)) is not None:
        node = source
    return node.op == "placeholder" or node.target in IN_MEMORY


def _fuse(producer: fx.Node, stored: str, compress: fx.Node) -> None:
    planes, value, source = list(compress.users), compress.args[0], producer.args[0]
    assert isinstance(value, fx.Node) and isinstance(source, fx.Node)  # noqa: PT018
    values = [producer.meta["val"], *compress.meta["val"]]
    order = memory_order(source.meta["val"])
    compress.args = (source, compress.args[1], order, _activation(producer), stored)
    compress.target = torch.ops.fxpipe.activate_and_compress.default
    describe(compress, producer, values)
    producer.prepend(compress)
    producer.target, producer.args, producer.kwargs = operator.getitem, (compress, 0), {}
    for plane in planes:
        index = plane.args[1]
        assert isinstance(index, int)
        plane.args = (compress, index + 1)
    if not value.users:
        value.graph.erase_node(value)
