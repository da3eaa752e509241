"""Costs measured as the model will train: lowered as one stage, its forward and backward graph timed node by node in place.

An operator alone under autograd (``fxpipe.costs.profile``) is not what runs: lowering writes batch norm without its writes in
place and computes some values again in backward, and in the middle of a step operands come from memory, not from the cache.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxpipe.api import graph_constants, trace_microbatch
from fxpipe.costs.profile import device_name, wait_for_device
from fxpipe.costs.rehearse import restored
from fxpipe.costs.storages import walk
from fxpipe.errors import VerifyError
from fxpipe.ir.action import ComputationType as Type
from fxpipe.ir.cost import CostTable
from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import HalfGraph, LoweredStages, StageGraphs
from fxpipe.lowering.joint import served_call
from fxpipe.pass_base import Pass
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.runtime.stage_runner import BoxedCall, StageRunner, interpreted

ROUNDS = 8
WARM_UP_ROUNDS = 2

Seconds = dict[str, float]  # by the name of a call


def costs_as_trained(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_microbatches: int = 1
) -> CostTable:
    """The cost of every node that ``fxpipe.compile`` cuts between, for one microbatch, its seconds measured.

    The model runs as one stage, as a whole and then node by node. The seconds of a node are those of all that forward, and
    backward, compute for it: medians over rounds, then the mean over equal calls. Both are scaled, by a factor each, so that
    their sums are what the stage takes as a whole. Takes the memory of training with two microbatches in flight; the model is
    left as it was.

    Raises:
        InputError, TraceError, PartitionError: as ``fxpipe.compile``.
        VerifyError: the model has no loss.
    """
    front: list[Program] = []

    def observe(step: Pass, _before: Program, after: Program) -> None:
        if CostTable in step.provides:
            front.append(after)

    traced, microbatches = trace_microbatch(model, args, kwargs, n_microbatches)
    if traced.signature.loss_index is None:
        raise VerifyError("the model has no loss to train with, so nothing can be measured; let it return one")
    program = default_pipeline(Options(n_microbatches=n_microbatches), observers=(observe,)).run(traced)
    tensors = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
    inputs = dict(zip(program.signature.inputs, microbatches.split(tensors)[0], strict=True))
    stage = _Stage(program.fact(LoweredStages).stages[0], model, graph_constants(program, model), inputs)
    with restored(model):
        forward, backward = stage.measure(add_gradients=n_microbatches > 1)
    return _table(front[0], forward, backward, device_name(list(inputs.values())))


class _Stage:
    """The whole model as one stage, to be run as it is and node by node."""

    def __init__(
        self, graphs: StageGraphs, model: nn.Module, constants: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> None:
        self.model, self.inputs = model, inputs
        self.timed: list[_TimedGraph] = []
        self.whole = StageRunner(graphs, model, constants, interpreted)
        self.by_node = StageRunner(graphs, model, constants, self._timed)
        loss = graphs.example_outputs[0]
        device = next((p.device for p in model.parameters()), loss.device)
        self.loss_grad = torch.ones((), dtype=loss.dtype, device=device)

    def _timed(self, half: HalfGraph) -> BoxedCall:
        self.timed.append(_TimedGraph(half.graph_module))
        return self.timed[-1].call

    def measure(self, *, add_gradients: bool) -> tuple[Seconds, Seconds]:
        """Forward and backward seconds of every call, scaled to those of the stage."""
        for runner in (self.whole, self.by_node):
            self._run(runner, add_gradients)
        forward, backward = (graph.by_call() for graph in self.timed)
        return _scaled(forward, self._seconds(Type.F)), _scaled(backward, self._seconds(Type.B))

    def _run(self, runner: StageRunner, add_gradients: bool) -> None:
        """As in a pipeline, the next microbatch goes forward before one goes backward."""
        runner.forward(0, (), self.inputs)
        for microbatch in range(1, WARM_UP_ROUNDS + ROUNDS):
            if not add_gradients:
                self.model.zero_grad()
            runner.forward(microbatch, (), self.inputs)
            runner.backward(microbatch - 1, (self.loss_grad,))

    def _seconds(self, kind: Type) -> float:
        events = [e for e in self.whole.events if e.action.computation_type is kind][WARM_UP_ROUNDS:]
        return statistics.median(e.end_seconds - e.start_seconds for e in events)


class _TimedGraph(fx.Interpreter):
    """A graph that keeps the seconds of each call, every time that it runs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)

    def call(self, values: list[Tensor | None]) -> Sequence[Tensor | None]:
        """Runs the graph and empties ``values``, as ``interpreted`` does."""
        taken = list(values)
        values.clear()
        result: Sequence[Tensor | None] = self.run(*taken, enable_io_processing=False)
        return result

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        wait_for_device()
        start = time.perf_counter()
        value = getattr(self, n.op)(n.target, args, kwargs)
        if n.op == "call_function":
            wait_for_device()
            self.seconds[n].append(time.perf_counter() - start)
        return value

    def by_call(self) -> Seconds:
        """The median of every node, added to the call that it serves; to that of its first argument where none is marked."""
        found: Seconds = defaultdict(float)
        served: dict[fx.Node, str] = {}
        for node, seconds in self.seconds.items():
            known = (served[a] for a in node.all_input_nodes if a in served)
            call = served_call(node) or next(known, None)
            if call is not None:
                served[node] = call
                found[call] += statistics.median(seconds[WARM_UP_ROUNDS:])
        return found


def _scaled(seconds: Seconds, whole: float) -> Seconds:
    total = sum(seconds.values())
    return {call: s * whole / total for call, s in seconds.items()} if total else {}


def _table(program: Program, forward: Seconds, backward: Seconds, device: str) -> CostTable:
    """The program's own counts with these seconds; equal calls get the same."""
    calls: dict[Hashable, list[str]] = defaultdict(list)
    for call in walk(program.graph_module).calls:
        calls[call.key].append(call.node.name)
    means: dict[str, tuple[float, float]] = {}
    for names in calls.values():
        mean = (
            sum(forward.get(n, 0.0) for n in names) / len(names),
            sum(backward.get(n, 0.0) for n in names) / len(names),
        )
        means |= dict.fromkeys(names, mean)
    rows = (
        replace(row, forward_seconds=means[row.name][0], backward_seconds=means[row.name][1])
        for row in program.fact(CostTable).nodes
    )
    return CostTable(tuple(rows), device, "measured")
