"""lower-stages: a forward and a backward graph per stage."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxpipe.errors import OptionError, VerifyError, unknown
from fxpipe.graph_module import copy_graph_module, returned, set_returned
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.lowering.joint import PARTITIONERS, Halves, mark_calls, trace_halves
from fxpipe.lowering.splice import Templates, spliced_halves
from fxpipe.pass_base import Pass
from fxpipe.saves.save_points import share_storages


@dataclass(frozen=True)
class LowerStages(Pass):
    """Traces each stage's forward and backward into one joint graph and cuts it in two.

    ``partitioner`` decides what crosses from forward to backward: ``min-cut`` recomputes what is cheap, ``min-bytes`` also
    where that takes another pass over memory, ``recompute-attention`` fused attention too (``fxpipe.lowering.attention``),
    ``default`` saves what eager autograd would. None changes a number.

    Before::

        stage_1(received, labels) -> (loss)

    After::

        stage_1.forward (parameters, received, labels) -> (loss, saved ...)
        stage_1.backward(saved ..., gradient of loss)  -> (gradients of parameters, gradient of received)
    """

    name: ClassVar[str] = "lower-stages"
    requires: ClassVar[tuple[type, ...]] = (Partition,)
    provides: ClassVar[tuple[type, ...]] = (LoweredStages,)
    partitioner: str = "min-cut"

    def __post_init__(self) -> None:
        if self.partitioner not in PARTITIONERS:
            raise OptionError(unknown("partitioner", self.partitioner, PARTITIONERS))

    def run(self, program: Program) -> Program:
        partition = program.fact(Partition)
        lowered: list[StageGraphs] = []
        templates: Templates = {}
        for stage in partition.stages:
            module = program.graph_module.get_submodule(f"stage_{stage.index}")
            assert isinstance(module, fx.GraphModule)
            last = stage.index == partition.n_stages - 1
            needs_grad = lowered[-1].output_needs_grad if lowered else ()
            loss_index = program.signature.loss_index if last else None
            lowered.append(
                lower_stage(
                    module, stage.index, stage.received, needs_grad, self.partitioner, loss_index, last, templates
                )
            )
        index = program.signature.loss_index
        if index is not None and not lowered[-1].output_needs_grad[index]:
            raise VerifyError(
                "the loss has no gradient: it depends on no parameter that requires one; unfreeze some, or look for a "
                "detach() or no_grad() on the way"
            )
        return program.with_facts(LoweredStages(tuple(lowered)))


def lower_stage(
    module: fx.GraphModule,
    index: int,
    received: tuple[str, ...],
    needs_grad: tuple[bool, ...],
    partitioner: str,
    loss_index: int | None,
    last: bool,
    templates: Templates,
) -> StageGraphs:
    """Lowers one stage module whose first placeholders are ``received``; ``templates`` as in ``spliced_halves``.

    In the last stage only the output at ``loss_index`` is differentiated; the others are detached.
    """
    module = copy_graph_module(module)
    if last:
        _detach_outputs(module, keep=loss_index)
    mark_calls(module.graph)
    placeholders = module.graph.find_nodes(op="placeholder")
    flags = (*needs_grad, *[False] * (len(placeholders) - len(received)))
    examples = tuple(n.meta["val"].detach().requires_grad_(f) for n, f in zip(placeholders, flags, strict=True))
    halves = spliced_halves(module, examples, partitioner, templates) or trace_halves(module, examples, partitioner)
    forward, backward = halves.forward, halves.backward
    share_storages(forward.graph, backward.graph, len(halves.outputs))
    forward.recompile()
    backward.recompile()
    outputs: Any = module.graph.output_node().args[0]
    names = tuple(n.name for n in outputs)
    forward_half = _forward_half(halves)
    return StageGraphs(
        index=index,
        forward=forward_half,
        backward=_backward_half(halves, forward_half),
        received=received,
        inputs=tuple(n.name for n in placeholders[len(received) :]),
        outputs=names,
        output_needs_grad=halves.needs_grad,
        received_needs_grad=tuple(needs_grad),
        example_outputs=tuple(n.meta["val"] for n in outputs),
    )


def _detach_outputs(module: fx.GraphModule, keep: int | None) -> None:
    values = returned(module.graph)
    for i, value in enumerate(values):
        if i != keep and value.meta["val"].is_floating_point():
            with module.graph.inserting_before(module.graph.output_node()):
                values[i] = module.graph.call_function(
                    torch.ops.aten.detach.default, (value,), name=f"{value.name}_detached"
                )
            values[i].meta = dict(value.meta)
    set_returned(module.graph, values)
    module.recompile()


def _forward_half(halves: Halves) -> HalfGraph:
    values = returned(halves.forward.graph)[len(halves.outputs) :]
    saved = tuple(Binding("saved", n.name) for n in values)
    return HalfGraph(halves.forward, halves.inputs, (*halves.outputs, *saved))


def _backward_half(halves: Halves, forward: HalfGraph) -> HalfGraph:
    saved = tuple(b for b in forward.outputs if b.kind == "saved")
    values = returned(halves.backward.graph)
    bound = tuple(Binding("none") if value is None else m for value, m in zip(values, halves.gradients, strict=True))
    return HalfGraph(halves.backward, (*saved, *halves.tangents), bound)
