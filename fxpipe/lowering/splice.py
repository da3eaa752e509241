"""A stage's two graphs put together from those of its segments, so that equal segments are traced once.

Tracing forward and backward takes longer than all other passes; a model of many equal blocks pays for one of them. The
result computes what a trace of the whole would, in the same order: a gradient with several parts gets the last part first.
"""

import builtins
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from fxpipe.graph_module import new_graph_module, returned
from fxpipe.ir.stage_graphs import Binding
from fxpipe.lowering.joint import Halves, trace_halves
from fxpipe.lowering.repeats import Segment, call_token, repeated_segments

Templates = dict[Hashable, Halves]

_PLACES = {"stack_trace": "stack_trace", "nn_module_stack": "nn_module_stack", "fwd_nn_module_stack": "nn_module_stack"}
_NUMBER = re.compile(r"_\d+$")


class Misfit(Exception):
    """The segments of a module do not fit together; it must be traced as a whole."""


def spliced_halves(
    module: fx.GraphModule, examples: Sequence[Tensor], partitioner: str, templates: Templates
) -> Halves | None:
    """What ``trace_halves`` returns, or None where the module has no equal segments or they do not fit together.

    ``templates`` are the halves of segments met before in the same compilation, and receives the new ones.
    """
    given, needs_grad = _given(module), _differentiable(module, examples)
    segments = repeated_segments(module.graph, needs_grad)
    if not segments:
        return None
    try:
        return _Splice(given, needs_grad, partitioner, templates).run(segments, returned(module.graph))
    except Misfit:
        return None


def _given(module: fx.GraphModule) -> dict[fx.Node, Binding]:
    """Parameters, buffers and inputs in the order in which a whole trace takes them, and what each means."""
    attributes = {n.target: n for n in module.graph.find_nodes(op="get_attr")}
    meanings = [Binding("parameter", name) for name, _ in module.named_parameters()]
    meanings += [Binding("buffer", name) for name, _ in module.named_buffers()]
    given = {attributes[b.name]: b for b in meanings if b.name in attributes}
    inputs = enumerate(module.graph.find_nodes(op="placeholder"))
    return given | {node: Binding("input", str(i)) for i, node in inputs}


def _differentiable(module: fx.GraphModule, examples: Sequence[Tensor]) -> set[fx.Node]:
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    nodes = {n for n in module.graph.find_nodes(op="get_attr") if n.target in wanted}
    inputs = zip(module.graph.find_nodes(op="placeholder"), examples, strict=True)
    return nodes | {node for node, example in inputs if example.requires_grad}


@dataclass(frozen=True)
class _Part:
    """One segment in the stage: its halves, and the nodes of the stage's forward graph that it saves."""

    segment: Segment
    halves: Halves
    saved: tuple[fx.Node, ...]


class _Splice:
    def __init__(
        self,
        given: Mapping[fx.Node, Binding],
        needs_grad: set[fx.Node],
        partitioner: str,
        templates: Templates,
    ) -> None:
        self.given, self.needs_grad, self.partitioner, self.templates = given, needs_grad, partitioner, templates
        self.forward, self.backward = fx.Graph(), fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}  # of the stage's module -> of its forward graph
        self.saved: dict[fx.Node, fx.Node] = {}  # of its forward graph -> the placeholder of its backward graph
        self.grads: dict[fx.Node, fx.Node] = {}  # of the stage's module -> its gradient in the backward graph
        self.known: dict[Hashable, fx.Node] = {}
        self.names: Counter[str] = Counter()

    def run(self, segments: Sequence[Segment], outputs: Sequence[fx.Node]) -> Halves:
        for i, node in enumerate(self.given, 1):
            self.values[node] = self.forward.placeholder(f"primals_{i}")
            self.values[node].meta = {"val": node.meta["val"]}
        parts = [self._add_forward(segment) for segment in segments]
        saved = list(dict.fromkeys(n for part in parts for n in part.saved))
        tangents = self._start_backward(saved, outputs)
        for part in reversed(parts):
            self._add_backward(part)
        gradients = [self.grads.get(node) for node in self.given]
        self.forward.output((*(self.values[n] for n in outputs), *saved))
        self.backward.output(tuple(gradients))
        return Halves(
            forward=new_graph_module({}, self.forward, "Forward"),
            backward=new_graph_module({}, self.backward, "Backward"),
            inputs=tuple(self.given.values()),
            outputs=tuple(Binding("output", str(i)) for i in range(len(outputs))),
            tangents=tangents,
            gradients=tuple(map(_gradient_of, self.given.values())),
            needs_grad=tuple(n in self.needs_grad for n in outputs),
        )

    def _add_forward(self, segment: Segment) -> _Part:
        halves = self._halves(segment)
        results = returned(halves.forward.graph)
        placeholders = halves.forward.graph.find_nodes(op="placeholder")
        copies = {p: self.values[n] for p, n in zip(placeholders, segment.inputs, strict=True)}
        self._copy(halves.forward.graph, self.forward, copies, segment)
        n = len(segment.outputs)
        self.values |= {value: copies[r] for value, r in zip(segment.outputs, results[:n], strict=True)}
        self.needs_grad |= {v for v, needed in zip(segment.outputs, halves.needs_grad, strict=True) if needed}
        return _Part(segment, halves, tuple(copies[r] for r in results[n:]))

    def _halves(self, segment: Segment) -> Halves:
        flags = tuple(n in self.needs_grad for n in segment.inputs)
        key = segment.key, flags
        if key not in self.templates:
            examples = tuple(
                n.meta["val"].detach().requires_grad_(flag) for n, flag in zip(segment.inputs, flags, strict=True)
            )
            self.templates[key] = trace_halves(_module(segment), examples, self.partitioner)
        halves = self.templates[key]
        plain = [b.kind for b in halves.outputs] == ["output"] * len(segment.outputs)
        if halves.returns_views or not plain:
            raise Misfit
        return halves

    def _start_backward(self, saved: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[Binding, ...]:
        for node in saved:
            self.saved[node] = self._placeholder(node.name, node)
        tangents: list[Binding] = []
        for i, value in enumerate(outputs):
            if value in self.needs_grad:
                self._add_gradient(value, self._placeholder(f"tangents_{len(tangents) + 1}", value))
                tangents.append(Binding("output", str(i)))
        return tuple(tangents)

    def _add_backward(self, part: _Part) -> None:
        graph = part.halves.backward.graph
        placeholders = graph.find_nodes(op="placeholder")
        n_saved = len(part.saved)
        copies = {p: self.saved[n] for p, n in zip(placeholders[:n_saved], part.saved, strict=True)}
        for placeholder, binding in zip(placeholders[n_saved:], part.halves.tangents, strict=True):
            grad = self.grads.pop(part.segment.outputs[int(binding.name)], None)
            if grad is None or _layout(grad) != _layout(placeholder):
                raise Misfit
            copies[placeholder] = grad
        self._copy(graph, self.backward, copies, part.segment)
        for binding, grad in zip(part.halves.gradients, returned(graph), strict=True):
            if grad is not None:
                self._add_gradient(part.segment.inputs[int(binding.name.removeprefix("input "))], copies[grad])

    def _add_gradient(self, value: fx.Node, grad: fx.Node) -> None:
        before = self.grads.get(value)
        if before is None:
            self.grads[value] = grad
            return
        if _layout(before) != _layout(grad):
            raise Misfit
        total = self.backward.create_node(
            "call_function", torch.ops.aten.add.Tensor, (before, grad), name=self._name("add")
        )
        total.meta = {"val": grad.meta["val"]}
        self.grads[value] = total

    def _copy(self, source: fx.Graph, target: fx.Graph, copies: dict[fx.Node, fx.Node], segment: Segment) -> None:
        """The calls of ``source``, after what ``copies`` holds; where each stands in the model is said anew.

        What was computed before is taken from there (a mask that every block makes for itself), as a trace of the whole would.
        """
        for node in source.nodes:
            if node.op != "call_function":
                continue
            token = target, call_token(node, copies.__getitem__)
            if token in self.known and not _is_random(node):
                copies[node] = self.known[token]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copied = target.create_node("call_function", node.target, args, kwargs, self._name(node.name))
            copied.meta = {k: node.meta[k] for k in ("val", "saved_tensor_with_no_vc_check") if k in node.meta}
            if "custom" in node.meta:
                call = segment.calls[node.meta["custom"]["call"]]
                copied.meta |= {k: call.meta[s] for k, s in _PLACES.items() if k in node.meta and s in call.meta}
                copied.meta["custom"] = {"call": call.name}
            copies[node] = self.known[token] = copied

    def _placeholder(self, name: str, like: fx.Node) -> fx.Node:
        node = self.backward.placeholder(name)
        node.meta = {"val": like.meta["val"]}
        return node

    def _name(self, name: str) -> str:
        """The next free name of its kind in both graphs together, as a trace of the whole would number them."""
        kind = _NUMBER.sub("", name)
        if kind not in self.names and hasattr(builtins, kind):
            self.names[kind] = 1  # fx gives no node the name of a builtin
        number = self.names[kind]
        self.names[kind] += 1
        return f"{kind}_{number}" if number else kind


def _module(segment: Segment) -> fx.GraphModule:
    """The segment by itself; every call's ``custom`` entry, which tracing hands on, says which of the calls it is."""
    graph = fx.Graph()
    copies = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(segment.inputs)}
    for i, call in enumerate(segment.calls):
        copies[call] = graph.node_copy(call, copies.__getitem__)
        copies[call].meta = {**call.meta, "custom": {"call": i}}
    graph.output(tuple(copies[n] for n in segment.outputs))
    return new_graph_module({}, graph, "Segment")


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _gradient_of(binding: Binding) -> Binding:
    return Binding("gradient", str(binding) if binding.kind == "input" else binding.name)


def _layout(node: fx.Node) -> Hashable:
    value: Tensor = node.meta["val"]
    return tuple(value.shape), value.stride(), value.dtype
