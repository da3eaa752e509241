"""Costs measured by running a graph node by node on this machine, and the file that keeps them.

The model is left as it was: buffers and whatever the graph writes in place are copies, the random state is put back,
and no gradient is accumulated.
"""

import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from fxpipe.costs.cost_model import cost_table, operator_name
from fxpipe.costs.devices import processor_name
from fxpipe.costs.probe import LeafCall, tensors_of
from fxpipe.costs.storages import Call, Walk, argument_nodes, attribute_of, walk
from fxpipe.errors import InputError, PlanError
from fxpipe.graph_module import copy_graph_module
from fxpipe.ir.cost import CostTable

VERSION = 1
MIN_REPEATS = 3
WHOLE_REPEATS = 5

Progress = Callable[[int, int, str], None]  # calls done, calls in all, name of the node


def measured_costs(
    graph_module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    seconds_per_call: float = 0.02,
    progress: Progress | None = None,
) -> CostTable:
    """The cost table of a graph with seconds measured on the device that ``inputs`` and the model are on.

    Each call runs once for its value, then forward and backward alone. Equal calls (same operator, shapes, strides and
    types) share their samples, at least three, of which the median counts, and the time that is spent on them, about
    ``seconds_per_call``. Backward is the time of ``torch.autograd.grad`` from random gradients of the outputs to every
    differentiable argument, less what that costs on an empty graph. At the end all times are scaled, forward and backward
    by a factor each, so that their sums are what the graph takes as a whole: a call that runs again and again finds its
    operands in the cache. Counts are those of ``modelled_costs``; dynamic dimensions take the sizes of ``inputs``.

    Raises:
        InputError: ``inputs`` do not fit the graph's placeholders in number, type or shape.
        VerifyError: the graph cannot be walked (see ``fxpipe.costs.storages.walk``).
    """
    sizes = _bind_sizes(graph_module, inputs)
    found = walk(graph_module)
    with _random_state_kept(), torch.set_grad_enabled(True):
        runner = _Runner(graph_module, found, seconds_per_call, progress)
        samples = runner.run(inputs)
        whole = runner.whole(inputs)
    seconds = {key: (statistics.median(s.forward), statistics.median(s.backward)) for key, s in samples.items()}
    sums = [sum(seconds[call.key][i] for call in found.calls) for i in range(2)]
    factors = [w / s if w and s else 1.0 for w, s in zip(whole, sums, strict=True)]
    scaled = {key: (f * factors[0], b * factors[1]) for key, (f, b) in seconds.items()}
    table = cost_table(graph_module, found, lambda call: scaled[call.key], device_name(inputs), "measured")
    return table.at(sizes) if sizes else table


@dataclass
class _Samples:
    """Seconds of the runs of one call and of those equal to it."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


class _Runner:
    """Runs the nodes in order, keeping each value until its last reader."""

    def __init__(
        self, graph_module: fx.GraphModule, found: Walk, budget_seconds: float, progress: Progress | None
    ) -> None:
        self.graph_module, self.found = graph_module, found
        self.budget_seconds, self.progress = budget_seconds, progress
        self.calls = {call.node: call for call in found.calls}
        self.equal_calls = Counter(call.key for call in found.calls)
        self.values: dict[fx.Node, Any] = {}
        self.samples: dict[Hashable, _Samples] = {key: _Samples() for key in self.equal_calls}

    def run(self, inputs: Sequence[torch.Tensor]) -> dict[Hashable, _Samples]:
        """Forward and backward seconds by the key of the call."""
        done, remaining = 0, iter(inputs)
        self.engine_seconds = _engine_seconds()
        done_with = _last_readers(self.graph_module.graph)
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._own(node, next(remaining))
            elif node.op == "get_attr":
                self.values[node] = self._own(node, attribute_of(self.graph_module, node))
            elif node in self.calls:
                self._call(self.calls[node])
                done += 1
                if self.progress:
                    self.progress(done, len(self.calls), node.name)
            for dead in done_with.get(node, ()):
                del self.values[dead]
        return self.samples

    def whole(self, inputs: Sequence[torch.Tensor]) -> tuple[float, float]:
        """Forward and backward seconds of the whole graph under autograd; backward 0 where nothing needs a gradient."""
        module = copy_graph_module(self.graph_module)
        for name, buffer in list(module.named_buffers()):
            owner, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(owner), own_name, buffer.clone())
        leaves = [p for p in module.parameters() if p.requires_grad]
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        forward, backward = [], []
        for _ in range(1 + WHOLE_REPEATS):
            values = [self._own(n, x) for n, x in zip(placeholders, inputs, strict=True)]
            wait_for_device()
            start = time.perf_counter()
            outputs = [t for t in tensors_of(module(*values)) if t.requires_grad]
            wait_for_device()
            forward.append(time.perf_counter() - start)
            if outputs and leaves:
                received = [torch.ones_like(t) for t in outputs]
                start = time.perf_counter()
                torch.autograd.grad(outputs, leaves, received, allow_unused=True)
                wait_for_device()
                backward.append(time.perf_counter() - start)
        return statistics.median(forward[1:]), statistics.median(backward[1:]) if backward else 0.0

    def _own(self, node: fx.Node, value: Any) -> Any:
        """The value itself, or a copy where some node may write it (batch_norm updates buffers without saying so)."""
        if not isinstance(value, torch.Tensor):
            return value
        written = any(v.storage.mutated for v in self.found.values[node])
        is_buffer = node.op == "get_attr" and not isinstance(value, nn.Parameter)
        return value.detach().clone() if written or is_buffer else value.detach()

    def _call(self, call: Call) -> None:
        args, kwargs = fx.node.map_arg((call.node.args, call.node.kwargs), self.values.__getitem__)
        with torch.set_grad_enabled(call.grad_enabled):
            self._time(call, args, kwargs)
        with torch.no_grad():
            assert callable(call.node.target)  # call_function
            self.values[call.node] = call.node.target(*args, **kwargs)

    def _time(self, call: Call, args: Any, kwargs: Any) -> None:
        flags = [a.requires_grad for a in call.arguments]
        equal, samples = self.equal_calls[call.key], self.samples[call.key]
        limits = math.ceil(MIN_REPEATS / equal), self.budget_seconds / 2 / equal

        def fresh() -> LeafCall:
            assert callable(call.node.target)  # call_function
            return LeafCall(call.node.target, args, kwargs, flags)

        samples.forward += _time(fresh, LeafCall.run, *limits)
        alone = fresh()
        outputs = [t for t in tensors_of(alone.run()) if t.requires_grad]
        if not outputs or not alone.leaves:
            samples.backward.append(0.0)
            return
        received = [torch.randn_like(t) for t in outputs]
        backward = _time(lambda: alone, lambda a: a.gradients(outputs, received), *limits)
        samples.backward += [max(0.0, s - self.engine_seconds) for s in backward]


def _time(
    prepare: Callable[[], Any], action: Callable[[Any], object], at_least: int, budget_seconds: float
) -> list[float]:
    """Seconds of each run of ``action(prepare())``, only the action timed, after one that is not counted."""
    action(prepare())
    samples: list[float] = []
    end = time.perf_counter() + budget_seconds
    while len(samples) < at_least or time.perf_counter() < end:
        prepared = prepare()
        wait_for_device()
        start = time.perf_counter()
        result = action(prepared)
        wait_for_device()
        samples.append(time.perf_counter() - start)
        del result
    return samples


def _engine_seconds() -> float:
    """What starting autograd's engine costs, on the smallest graph there is."""
    leaf = torch.zeros(1).requires_grad_()
    outputs, received = [leaf.view(1)], [torch.ones(1)]
    samples = _time(
        lambda: leaf, lambda x: torch.autograd.grad(outputs, [x], received, retain_graph=True), MIN_REPEATS, 1e-3
    )
    return statistics.median(samples)


def save_profile(costs: CostTable, graph_module: fx.GraphModule, path: Path) -> None:
    """Writes the costs and the digest of the graph that they belong to, as JSON."""
    content = {"fxpipe_profile": VERSION, "graph": graph_digest(graph_module), "costs": json.loads(costs.to_json())}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_profile(path: Path, graph_module: fx.GraphModule) -> CostTable:
    """The costs that ``save_profile`` wrote; raises PlanError for a file that is damaged, or of another version or
    graph."""
    try:
        content = json.loads(path.read_text())
        version, graph, costs = content["fxpipe_profile"], content["graph"], content["costs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise PlanError(f"cannot read profile {path}: {type(e).__name__}: {e}; measure it again") from e
    if version != VERSION:
        raise PlanError(
            f"profile {path} is of version {version!r}; this fxpipe reads version {VERSION}; measure it again"
        )
    here = graph_digest(graph_module)
    if graph != here:
        raise PlanError(
            f"profile {path} is of another graph ({graph!r:.14}, this one is {here!r:.14}); measure it again"
        )
    table = CostTable.from_json(json.dumps(costs))
    missing = {n.name for n in graph_module.graph.nodes if _is_call(n)} ^ set(table)
    if missing:
        raise PlanError(
            f"profile {path} does not fit its own graph: node {min(missing)} is in one only; measure it again"
        )
    return table


def graph_digest(graph_module: fx.GraphModule) -> str:
    """A SHA-256 over every node's name, operator, arguments, shape and type: equal for graphs that cost the same."""
    lines = hashlib.sha256()
    for node in graph_module.graph.nodes:
        target = operator_name(node) if node.op == "call_function" else node.target
        tensors = [(str(tuple(t.shape)), str(t.dtype)) for t in tensors_of(node.meta.get("val"))]
        lines.update(f"{node.op} {node.name} {target} {node.args} {node.kwargs} {tensors}\n".encode())
        if node.op == "get_attr" and isinstance(inner := attribute_of(graph_module, node), fx.GraphModule):
            lines.update(graph_digest(inner).encode())
    return lines.hexdigest()


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not torch._C._set_grad_enabled


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for argument in argument_nodes(node):
            last[argument] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if reader.op != "output" and value.target is not torch._C._set_grad_enabled:
            dead.setdefault(reader, []).append(value)
    return dead


def _bind_sizes(graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """The value of each dynamic dimension in these inputs; raises InputError where they do not fit the placeholders."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        raise InputError(f"{len(inputs)} inputs were given; the graph takes {len(placeholders)}")
    sizes: dict[str, int] = {}
    for node, given in zip(placeholders, inputs, strict=True):
        expected = node.meta["val"]
        found, wanted = f"{given.dtype} {list(given.shape)}", f"{expected.dtype} {list(expected.shape)}"
        fits = given.dtype == expected.dtype and given.ndim == expected.ndim
        for here, there in zip(given.shape, expected.shape, strict=False):
            if isinstance(there, int):
                fits = fits and here == there
            elif there.node.expr.is_symbol:
                fits = fits and sizes.setdefault(str(there.node.expr), here) == here
        if not fits:
            raise InputError(f"input {node.name} is {found}; the graph takes {wanted}")
    return sizes


def _random_state_kept() -> Any:
    devices = range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.random.fork_rng(devices, device_type=kind.type if kind else "cuda")


def wait_for_device() -> None:
    """Until an accelerator, if there is one, has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device_name(inputs: Sequence[torch.Tensor]) -> str:
    """Of the device that the inputs are on."""
    where = inputs[0].device if inputs else torch.device("cpu")
    return processor_name() if where.type == "cpu" else str(torch.get_device_module(where).getdevice_name(where))
