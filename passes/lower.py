"""lower-stages: a forward and a backward graph per stage."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

from fxpipe.errors import OptionError, VerifyError, unknown
from fxpipe.graph_module import copy_graph_module, returned, set_returned
from fxpipe.ir.partition import Partition
from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.pass_base import Pass
from fxpipe.save_points import save_relus, share_storages

JointPartitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
PARTITIONERS: dict[str, JointPartitioner] = {
    "min-cut": min_cut_rematerialization_partition,
    "default": default_partition,
}


@dataclass(frozen=True)
class LowerStages(Pass):
    """Traces each stage's forward and backward into one joint graph and cuts it in two.

    ``partitioner`` decides what crosses from forward to backward: ``min-cut`` recomputes what is cheap, ``default`` saves what
    eager autograd would. Neither changes a number.

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
        for stage in partition.stages:
            module = program.graph_module.get_submodule(f"stage_{stage.index}")
            assert isinstance(module, fx.GraphModule)
            last = stage.index == partition.n_stages - 1
            needs_grad = lowered[-1].output_needs_grad if lowered else ()
            loss_index = program.signature.loss_index if last else None
            lowered.append(
                lower_stage(module, stage.index, stage.received, needs_grad, self.partitioner, loss_index, last)
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
) -> StageGraphs:
    """Lowers one stage module whose first placeholders are ``received``.

    In the last stage only the output at ``loss_index`` is differentiated; the others are detached.
    """
    if last:
        module = copy_graph_module(module)
        _detach_outputs(module, keep=loss_index)
    placeholders = module.graph.find_nodes(op="placeholder")
    flags = (*needs_grad, *[False] * (len(placeholders) - len(received)))
    examples = tuple(n.meta["val"].detach().requires_grad_(f) for n, f in zip(placeholders, flags, strict=True))
    with contextlib.ExitStack() as stack:
        joint, metadata = _joint_graph(stack, module, examples)
        meanings = _output_meanings(joint)
        save_relus(joint.graph)
        forward, backward = PARTITIONERS[partitioner](joint, None, num_fwd_outputs=metadata.num_forward)
    share_storages(forward.graph, backward.graph, metadata.num_forward)
    forward.recompile()
    backward.recompile()
    outputs: Any = module.graph.output_node().args[0]
    names = tuple(n.name for n in outputs)
    forward_half = _forward_half(forward, meanings[: metadata.num_forward])
    return StageGraphs(
        index=index,
        forward=forward_half,
        backward=_backward_half(backward, forward_half, meanings[metadata.num_forward :]),
        received=received,
        inputs=tuple(n.name for n in placeholders[len(received) :]),
        outputs=names,
        output_needs_grad=tuple(bool(o.requires_grad) for o in metadata.output_info),
        received_needs_grad=tuple(needs_grad),
        example_outputs=tuple(n.meta["val"] for n in outputs),
    )


def _joint_graph(
    stack: contextlib.ExitStack, module: fx.GraphModule, examples: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, ViewAndMutationMeta]:
    """Forward and backward in one graph that writes nothing in place.

    Functionalization takes a sixth of the time and leaves a graph without writes as it is, so it is used only where it must be.
    """
    plain = not _writes(module.graph)
    exported = aot_export_joint_with_descriptors(
        stack, module, examples, disable_functionalization=plain, _disable_torch_fn_metadata_mode=True
    )
    metadata = exported._aot_state.fw_metadata
    if plain and (_writes(exported.graph_module.graph) or metadata.num_mutated_inp_runtime_indices):
        exported = aot_export_joint_with_descriptors(stack, module, examples, _disable_torch_fn_metadata_mode=True)
    return exported.graph_module, exported._aot_state.fw_metadata


def _writes(graph: fx.Graph) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


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


def _output_meanings(joint: fx.GraphModule) -> tuple[Binding, ...]:
    return tuple(_meaning(d) for d in joint.graph.output_node().meta["desc"])


def _meaning(descriptor: Any) -> Binding:
    match descriptor:
        case None:
            return Binding("none")
        case ParamAOTInput(target=name):
            return Binding("parameter", name)
        case BufferAOTInput(target=name):
            return Binding("buffer", name)
        case PlainAOTInput(idx=i):
            return Binding("input", str(i))
        case PlainAOTOutput(idx=i):
            return Binding("output", str(i))
        case InputMutationAOTOutput(mutated_input=BufferAOTInput(target=name)):
            return Binding("mutation", name)
        case GradAOTOutput(grad_of=ParamAOTInput(target=name)):
            return Binding("gradient", name)
        case GradAOTOutput(grad_of=PlainAOTInput(idx=i)):
            return Binding("gradient", f"input {i}")
        case TangentAOTInput(output=PlainAOTOutput(idx=i)):
            return Binding("output", str(i))
    raise VerifyError(
        f"the joint graph holds {descriptor}, which fxpipe cannot run; a stage may not write to its own inputs "
        "or return a value that aliases one"
    )


def _forward_half(forward: fx.GraphModule, meanings: tuple[Binding, ...]) -> HalfGraph:
    inputs = tuple(_meaning(n.meta["desc"]) for n in forward.graph.find_nodes(op="placeholder"))
    returned: Any = forward.graph.output_node().args[0]
    saved = tuple(Binding("saved", n.name) for n in returned[len(meanings) :])
    return HalfGraph(forward, inputs, (*meanings, *saved))


def _backward_half(backward: fx.GraphModule, forward: HalfGraph, meanings: tuple[Binding, ...]) -> HalfGraph:
    saved = tuple(b for b in forward.outputs if b.kind == "saved")
    tangents = backward.graph.find_nodes(op="placeholder")[len(saved) :]
    inputs = (*saved, *(_meaning(n.meta["desc"]) for n in tangents))
    returned: Any = backward.graph.output_node().args[0]
    bound = tuple(Binding("none") if value is None else m for value, m in zip(returned, meanings, strict=True))
    return HalfGraph(backward, inputs, bound)
