"""The repeated segments of a graph: a transformer's equal blocks, found from the operators alone.

A graph is parted after a residual sum, or what a random operator made, past which no other differentiable value is alive.
There it costs nothing to choose what backward keeps in each segment by itself: to compute the sum again, both its operands
would have to be kept, and what is random cannot be computed again.
"""

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

Calls = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive calls, what they take from outside in order of first use, and which of their values are used after.

    Segments of equal ``key`` do the same to inputs of the same shapes.
    """

    calls: Calls
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: Hashable


def repeated_segments(graph: fx.Graph, differentiable: Collection[fx.Node]) -> list[Segment]:
    """All calls of the graph in consecutive segments, some of which are equal; empty where none are.

    ``differentiable`` are the placeholders and attributes that need a gradient. Graphs that call anything but operators
    without effects, or have symbolic sizes, are not parted.
    """
    if not all(_is_plain(n) for n in graph.nodes if n.op != "output"):
        return []
    segments = [_segment(calls) for calls in _parts(graph, set(differentiable))]
    return segments if len({s.key for s in segments}) < len(segments) else []


def _is_plain(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is not operator.getitem:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return False
    return all(
        t is None or (isinstance(t, torch.Tensor) and all(type(d) is int for d in t.shape)) for t in _values(node)
    )


def _values(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value if isinstance(value, tuple | list) else (value,)


def _parts(graph: fx.Graph, differentiable: set[fx.Node]) -> Iterator[Calls]:
    """The calls from one value that must be kept anyway, with nothing differentiable alive beside it, to the next."""
    last_user = {argument: node for node in graph.nodes for argument in node.all_input_nodes}
    alive = {n for n in differentiable if n.op == "placeholder" and n in last_user}
    part: list[fx.Node] = []
    for call in (n for n in graph.nodes if n.op == "call_function"):
        part.append(call)
        if _is_floating(call) and not differentiable.isdisjoint(call.all_input_nodes):
            differentiable.add(call)
            alive |= {call} if call in last_user else set()
        alive -= {n for n in call.all_input_nodes if last_user[n] is call}
        if alive == {call} and (_is_residual_sum(call, differentiable) or _is_random(call)):
            yield tuple(part)
            part = []
    if part:
        yield tuple(part)


def _is_floating(call: fx.Node) -> bool:
    return any(t.is_floating_point() for t in _values(call) if t is not None)


def _is_residual_sum(call: fx.Node, differentiable: set[fx.Node]) -> bool:
    if call.target is not torch.ops.aten.add.Tensor:
        return False
    shape = call.meta["val"].shape
    return all(
        isinstance(a, fx.Node) and a.op != "get_attr" and a in differentiable and a.meta["val"].shape == shape
        for a in call.args
    )


def _is_random(call: fx.Node) -> bool:
    return call.target is torch.ops.aten.dropout.default and bool(call.args[1]) and call.args[2] is True


def _segment(calls: Calls) -> Segment:
    places: dict[fx.Node, tuple[str, int]] = {call: ("call", i) for i, call in enumerate(calls)}
    inputs: list[fx.Node] = []
    for argument in (a for call in calls for a in call.all_input_nodes):
        if argument not in places:
            places[argument] = ("input", len(inputs))
            inputs.append(argument)
    inside = set(calls)
    outputs = tuple(call for call in calls if not inside.issuperset(call.users))
    key = (
        tuple(call_token(call, places.__getitem__) for call in calls),
        tuple(_layout(n.meta["val"]) for n in inputs),
        tuple(places[n] for n in outputs),
    )
    return Segment(calls, tuple(inputs), outputs, key)


def _layout(value: torch.Tensor) -> Hashable:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def call_token(call: fx.Node, name: Callable[[fx.Node], Hashable]) -> Hashable:
    """Equal for calls of one operator with equal arguments, where ``name`` tells what an argument that is a node is."""
    return call.target, _token(call.args, name), _token(call.kwargs, name)


def _token(argument: Any, name: Callable[[fx.Node], Hashable]) -> Hashable:
    if isinstance(argument, fx.Node):
        return name(argument)
    if isinstance(argument, tuple | list):
        return tuple(_token(a, name) for a in argument)
    if isinstance(argument, dict):
        return tuple((key, _token(a, name)) for key, a in argument.items())
    return type(argument), argument
