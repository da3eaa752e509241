"""Forward and backward of a graph: traced together by AOTAutograd, then cut in two by one of torch's partitioners."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import OutputType, ViewAndMutationMeta
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

from fxpipe.errors import VerifyError
from fxpipe.ir.stage_graphs import Binding
from fxpipe.lowering.attention import recompute_attention
from fxpipe.saves.save_points import save_relus

JointPartitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


def min_bytes_partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Min-cut, which here also computes again what backward must write to memory for a matrix product, say a GELU's output.

    Elsewhere min-cut saves such a value beside the one that it is computed from, since to write it again takes time. A value
    that is saved compressed is written again in any case, so this saves bytes, an operator in each half, and an error.
    """
    with functorch_config.patch(ban_recompute_materialized_backward=False):
        return min_cut_rematerialization_partition(joint, *args, **kwargs)


def recompute_attention_partition(
    joint: fx.GraphModule, *args: Any, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """``min_bytes_partition``, and backward computes fused attention again (``recompute_attention``)."""
    forward, backward = min_bytes_partition(joint, *args, **kwargs)
    recompute_attention(forward.graph, backward.graph, kwargs["num_fwd_outputs"])
    forward.recompile()
    backward.recompile()
    return forward, backward


PARTITIONERS: dict[str, JointPartitioner] = {
    "min-cut": min_cut_rematerialization_partition,
    "min-bytes": min_bytes_partition,
    "recompute-attention": recompute_attention_partition,
    "default": default_partition,
}
AUTO = "auto"


def partitioner_for(name: str, format: str | None) -> str:
    """``auto`` made one of the partitioners: ``min-bytes`` where values are compressed, ``min-cut`` where they are kept."""
    if name != AUTO:
        return name
    return "min-cut" if format is None else "min-bytes"


@dataclass(frozen=True)
class Halves:
    """The two graphs of a module, and what everything but the saved values means.

    ``forward`` takes ``inputs`` and returns ``outputs``, then what it saves; ``backward`` takes that, then ``tangents``, and
    returns ``gradients``. ``needs_grad`` says which of the module's outputs carry a gradient.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    tangents: tuple[Binding, ...]
    gradients: tuple[Binding, ...]
    needs_grad: tuple[bool, ...]
    returns_views: bool = False


def trace_halves(module: fx.GraphModule, examples: tuple[torch.Tensor, ...], partitioner: str) -> Halves:
    """The halves of ``module``, whose placeholders get values like ``examples``: fake tensors with ``requires_grad`` set.

    Raises:
        VerifyError: the module writes to an input, or returns a view of one.
    """
    with contextlib.ExitStack() as stack:
        joint, metadata = _joint_graph(stack, module, examples)
        inputs = [_meaning(n.meta["desc"]) for n in joint.graph.find_nodes(op="placeholder")]
        meanings = tuple(_meaning(d) for d in joint.graph.output_node().meta["desc"])
        save_relus(joint.graph)
        n = metadata.num_forward
        forward, backward = PARTITIONERS[partitioner](joint, None, num_fwd_outputs=n)
    return Halves(
        forward=forward,
        backward=backward,
        inputs=tuple(b for b in inputs if b.kind != "output"),
        outputs=meanings[:n],
        tangents=tuple(b for b in inputs if b.kind == "output"),
        gradients=meanings[n:],
        needs_grad=tuple(bool(o.requires_grad) for o in metadata.output_info),
        returns_views=any(o.output_type is not OutputType.non_alias for o in metadata.output_info),
    )


def mark_calls(graph: fx.Graph) -> None:
    """Names every node in its own ``custom`` entry, which tracing hands on to all that is computed for it (``served_call``)."""
    for node in graph.nodes:
        node.meta["custom"] = {"call": node.name}


def served_call(node: fx.Node) -> str | None:
    """The call of the stage's module for which a node of its forward or backward graph computes; None where none is marked."""
    found: str | None = node.meta.get("custom", {}).get("call")
    return found


def writes(graph: fx.Graph) -> bool:
    """Whether some operator of the graph writes to what it takes."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _joint_graph(
    stack: contextlib.ExitStack, module: fx.GraphModule, examples: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, ViewAndMutationMeta]:
    """Forward and backward in one graph that writes nothing in place.

    Functionalization takes a sixth of the time and leaves a graph without writes as it is, so it is used only where it must be.
    """
    plain = not writes(module.graph)
    exported = aot_export_joint_with_descriptors(
        stack, module, examples, disable_functionalization=plain, _disable_torch_fn_metadata_mode=True
    )
    metadata = exported._aot_state.fw_metadata
    if plain and (writes(exported.graph_module.graph) or metadata.num_mutated_inp_runtime_indices):
        exported = aot_export_joint_with_descriptors(stack, module, examples, _disable_torch_fn_metadata_mode=True)
    return exported.graph_module, exported._aot_state.fw_metadata


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
