"""On GPUs an activation or a sum and the storing of its input or output become one node: one kernel does both in one pass."""

import operator

import torch
import torch.fx as fx

from fxpipe.graph_module import describe
from fxpipe.saves.in_memory import flat_alike, is_in_memory, is_plain_sum, lie_alike, readers
from fxpipe.saves.value_facts import memory_order, storage_of
from fxpipe.triton_kernels.codec import DEVICES, why_not_fused
from fxpipe.triton_kernels.format import BFPFormat
from fxpipe.triton_kernels.fused import ACTIVATIONS

aten = torch.ops.aten

EXACT = ("relu", "add")
"""What the fused kernel computes as torch does, bit for bit."""


def fuse_producers(forward: fx.Graph, *, exact: bool) -> None:
    """Fuses each activation and residual sum that is stored, or whose input is, where that pays; edits in place.

    With ``exact`` every operator is a kernel of its own, and what is fused must not change a bit: ReLU and sums of two. Bytes
    for each 16-bit value that is stored in 4 bits: a ReLU 6.5 -> 4.5, a residual sum 8.5 -> 6.5.

    Without it Inductor follows, which makes one kernel of what is computed value by value. Only activations of a matrix
    product or convolution pay there; SiLU and GELU are within a rounding of torch's, as they are of Inductor's. A sum is
    left to Inductor, which computes it in one kernel with the norm that reads it (8 bytes, and 2.5 for the storing): the sum
    and its storing in one kernel (6.5), then the norm (4), would move as many, 10.5. With the norm it pays (``fuse_norms``).

    Before::

        silu = aten.silu(mm)
        compress_mm = fxpipe.bfp_compress(mm, 'bfp4b32', [0, 1])
        mm_code32 = compress_mm[0]; mm_exponent = compress_mm[1]

    After::

        compress_mm = fxpipe.produce_and_compress([mm], 'bfp4b32', [0, 1], 'silu', 'input')
        silu = compress_mm[0]
        mm_code32 = compress_mm[1]; mm_exponent = compress_mm[2]
    """
    for compress in forward.find_nodes(op="call_function", target=torch.ops.fxpipe.bfp_compress.default):
        value = compress.args[0]
        assert isinstance(value, fx.Node)
        producers = (p for p in _producers(value) if (_name(p[0]) in EXACT if exact else _name(p[0]) in ACTIVATIONS))
        found = ((producer, stored) for producer, stored in producers if _pays(producer, stored, compress, exact))
        if (chosen := next(found, None)) is not None:
            _fuse(*chosen, compress)


def _producers(value: fx.Node) -> list[tuple[fx.Node, str]]:
    """The producers whose output the value is, or the activations whose input, seen through views."""
    base = storage_of(value)
    if _name(base):
        return [(base, "output")]
    return [(reader, "input") for reader in readers(base) if _name(reader) in ACTIVATIONS]


def _name(node: fx.Node) -> str:
    """Its name for ``fxpipe::produce_and_compress``; empty for other operators."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if is_plain_sum(node):
        return "add"
    names: dict[object, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}
    return names.get(node.target, "")


def _pays(producer: fx.Node, stored: str, compress: fx.Node, exact: bool) -> bool:
    """One pass over one memory: a GPU's, in which inputs, output and what is stored lie alike and without gaps."""
    sources, value = producer.all_input_nodes, compress.args[0]
    assert isinstance(value, fx.Node)
    y = producer.meta["val"]
    return (
        y.device.type in DEVICES
        and all(lie_alike(source.meta["val"], y) for source in sources)
        and bool(y.permute(memory_order(y)).is_contiguous())
        and (value is (producer if stored == "output" else sources[0]) or flat_alike(value.meta["val"], y))
        and not why_not_fused(BFPFormat.parse(str(compress.args[1])))
        and (exact or is_in_memory(sources[0]))
    )


def _fuse(producer: fx.Node, stored: str, compress: fx.Node) -> None:
    planes, value = list(compress.users), compress.args[0]
    assert isinstance(value, fx.Node)
    values = [producer.meta["val"], *compress.meta["val"]]
    order = memory_order(producer.meta["val"])
    compress.args = (list(producer.args), compress.args[1], order, _name(producer), stored)
    compress.target = torch.ops.fxpipe.produce_and_compress.default
    describe(compress, producer, values)
    producer.prepend(compress)
    producer.target, producer.args, producer.kwargs = operator.getitem, (compress, 0), {}
    for plane in planes:
        index = plane.args[1]
        assert isinstance(index, int)
        plane.args = (compress, index + 1)
    if not value.users:
        value.graph.erase_node(value)
