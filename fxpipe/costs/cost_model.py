"""The cost of every call in a graph: counts from one walk over fakes, seconds from a roofline."""

from collections.abc import Callable, Hashable, Iterable

import sympy
import torch
import torch.fx as fx
import torch.nn as nn

from fxpipe.costs.probe import element_bytes, tensors_of, total
from fxpipe.costs.storages import Call, Walk, argument_nodes, attribute_of, value_of, walk
from fxpipe.ir.cost import CostTable, Device, NodeCost, Size, Time

# Operators that read one element of their first tensor for each element they write, however large that tensor is.
GATHERS = frozenset(
    {
        torch.ops.aten.embedding.default,
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_select.default,
        torch.ops.aten.gather.default,
    }
)


def modelled_costs(graph_module: fx.GraphModule, on: Device) -> CostTable:
    """The cost of every call in the graph, in program order, on the device ``on``.

    Seconds are the larger of arithmetic at the device's peak for the type of the result and traffic at its memory
    bandwidth, and a launch on top: one for a call that writes anything, one for each gradient that its backward writes.
    Calls that only look at memory in another way (view, transpose, split, no-op ``to``) cost nothing.
    Dynamic dimensions stay symbols. Raises VerifyError where the graph cannot be walked (see ``fxpipe.costs.storages.walk``).
    """
    known: dict[Hashable, tuple[Time, Time]] = {}

    def seconds(call: Call) -> tuple[Time, Time]:
        if call.key not in known:
            known[call.key] = roofline(call, on)
        return known[call.key]

    return cost_table(graph_module, walk(graph_module), seconds, on.name, "modelled")


def cost_table(
    graph_module: fx.GraphModule,
    found: Walk,
    seconds: Callable[[Call], tuple[Time, Time]],
    device_name: str,
    source: str,
) -> CostTable:
    """A row for each call of the walk, with forward and backward seconds from ``seconds``."""
    parameters = _parameter_bytes(graph_module)
    saved = _saved_bytes(found)
    rows = []
    for call in found.calls:
        read, written = traffic(call)
        forward, backward = seconds(call)
        rows.append(
            NodeCost(
                name=call.node.name,
                operator=operator_name(call.node),
                flops=call.probe.flops,
                backward_flops=call.probe.backward_flops,
                bytes_read=read,
                bytes_written=written,
                output_bytes=total(map(element_bytes, tensors_of(value_of(graph_module, call.node)))),
                parameter_bytes=parameters.get(call.node, 0),
                saved_bytes=saved.get(call.node, 0),
                forward_seconds=forward,
                backward_seconds=backward,
            )
        )
    return CostTable(tuple(rows), device_name, source)


def traffic(call: Call) -> tuple[Size, Size]:
    """Bytes that forward reads and writes: arguments once; new outputs, arguments written in place, and what is kept
    inside."""
    if not _writes(call):
        return 0, 0
    new = [m for m in call.probe.makes if m.alias is None]
    reads = list(call.probe.read_bytes)
    if call.node.target in GATHERS:
        reads[0] = new[0].bytes
    in_place = total(call.probe.read_bytes[i] for i in call.probe.mutated)
    return total(reads), total(m.bytes for m in new) + in_place + call.probe.saved_inside_bytes


def roofline(call: Call, on: Device) -> tuple[Time, Time]:
    """Forward and backward seconds of a call at the peak rates of a device."""
    p = call.probe
    peak = on.peak_flops_per_second(_type_name(call))
    moved = p.backward_read_bytes + total(p.gradient_bytes)
    forward = _seconds(p.flops, total(traffic(call)), int(_writes(call)), peak, on)
    return forward, _seconds(p.backward_flops, moved, len(p.gradient_bytes), peak, on)


def operator_name(node: fx.Node) -> str:
    """``aten.linear.default``, or the name of a plain function such as ``getitem``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def _seconds(flops: Size, moved: Size, launches: int, peak: float, on: Device) -> Time:
    if isinstance(flops, int) and isinstance(moved, int):
        return max(flops / peak, moved / on.memory_bytes_per_second) + launches * on.launch_seconds
    peak, bandwidth, launch = map(_exact, (peak, on.memory_bytes_per_second, on.launch_seconds))
    busy = sympy.Max(flops / peak, moved / bandwidth) if flops != 0 else moved / bandwidth  # Max is slow to build
    return busy + launches * launch


def _exact(number: float) -> sympy.Rational:
    """The decimal that the number is written as, so that printing and reading an expression changes nothing."""
    return sympy.Rational(str(number))


def _writes(call: Call) -> bool:
    return bool(call.probe.mutated) or any(m.alias is None for m in call.probe.makes)


def _type_name(call: Call) -> str:
    floating = [m.dtype for m in call.probe.makes if m.dtype.is_floating_point]
    return str(floating[0] if floating else torch.float32).removeprefix("torch.")


def _parameter_bytes(graph_module: fx.GraphModule) -> dict[fx.Node, Size]:
    """Each parameter's bytes at the first call that reads it; a tied parameter, under two names, counts once."""
    found: dict[fx.Node, Size] = {}
    seen: set[int] = set()
    for node in graph_module.graph.nodes:
        for argument in _get_attrs(argument_nodes(node)) if node.op == "call_function" else ():
            parameter = attribute_of(graph_module, argument)
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[node] = found.get(node, 0) + element_bytes(parameter)
    return found


def _get_attrs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if n.op == "get_attr"]


def _saved_bytes(found: Walk) -> dict[fx.Node, Size]:
    """What autograd keeps, by the call that made it; what came with the program (parameters, buffers, inputs) is not
    counted."""
    bytes_of: dict[fx.Node, Size] = {c.node: c.probe.saved_inside_bytes for c in found.calls}
    for storage in found.storages:
        if storage.saved and storage.owner in bytes_of:
            bytes_of[storage.owner] += storage.bytes
    return bytes_of
