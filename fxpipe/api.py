"""``fxpipe.compile``: a model in, a plan out. ``fxpipe.load``: a saved plan back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxpipe.cuts.stage_hints import hints_text, marked, parse_hints, stage_hint
from fxpipe.errors import OptionError
from fxpipe.ir.cost import CostTable
from fxpipe.ir.program import Program
from fxpipe.microbatch import Microbatches
from fxpipe.pass_manager import Observer
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.plans.model_digest import model_digest
from fxpipe.plans.plan import Plan
from fxpipe.trace import LossFn, trace

__all__ = ["compile", "load", "stage_hint"]

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def compile(
    model: nn.Module,
    example_inputs: ExampleInputs,
    options: Options | Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    target: Any = None,
    costs: CostTable | None = None,
    observers: tuple[Observer, ...] = (),
) -> Plan:
    """Turns ``model`` into a pipeline-parallel training program with compressed activations.

    ``example_inputs`` are those of a whole batch: a tensor or a tuple for positional inputs, a mapping for keywords, or a pair
    ``(tuple, mapping)`` for both. Every tensor's dimension 0 is the batch, or 1. With ``loss_fn`` the loss is
    ``loss_fn(model(...), target)``, else the model returns it. ``costs`` are a measured profile for the cut; ``observers`` see
    the program before and after each pass.

    Example::

        plan = fxpipe.compile(model, {"input_ids": ids, "labels": ids}, fxpipe.Options(n_ranks=2, n_microbatches=8))
        pipe = plan.pipe()
        loss = pipe.step(input_ids=ids, labels=ids)

    Raises:
        OptionError, InputError, TraceError, PartitionError: see each; the message says what to do.
    """
    options = options if isinstance(options, Options) else Options.from_mapping(options or {})
    if marks := marked(model):
        options = replace(options, stage_hints={**marks, **parse_hints(hints_text(options.stage_hints))})
    args, kwargs = call_arguments(example_inputs)
    program, microbatches = trace_microbatch(model, args, kwargs, options.n_microbatches, loss_fn, target)
    program = default_pipeline(options, costs, observers).run(program)
    return Plan(program, options, microbatches, model, model_digest(model), graph_constants(program, model))


def trace_microbatch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    n_microbatches: int,
    loss_fn: LossFn | None = None,
    target: Any = None,
) -> tuple[Program, Microbatches]:
    """Traces the model on the first microbatch of a whole batch; raises InputError where the batch cannot be divided."""
    from fxpipe.trace import input_path

    keyed, spec = pytree.tree_flatten_with_path((args, dict(kwargs), target))
    tensors = [(input_path(key), x) for key, x in keyed if isinstance(x, Tensor)]
    cut = Microbatches.of([x for _, x in tensors], [path for path, _ in tensors], n_microbatches)
    first = iter(cut.split([x for _, x in tensors])[0])
    leaves = [next(first).clone() if isinstance(x, Tensor) else x for _, x in keyed]
    part_args, part_kwargs, part_target = pytree.tree_unflatten(leaves, spec)
    return trace(model, part_args, part_kwargs, loss_fn=loss_fn, target=part_target), cut


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """``(args, kwargs)`` of an example: a tensor, a tuple, a mapping, or a pair (tuple, mapping)."""
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if not isinstance(example_inputs, tuple | list):
        raise OptionError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of positional inputs, "
            "a mapping of keyword inputs, or a pair (tuple, mapping)"
        )
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
        return example_inputs[0], example_inputs[1]
    return tuple(example_inputs), {}


def load(path: str | Path, model: nn.Module) -> Plan:
    """Reads a plan that ``Plan.save`` wrote, for the same model. Runs no code from the file.

    Raises:
        PlanError: the file is cut short, altered or of another version, or the model has changed since; says which.
    """
    from fxpipe.plans.plan_file import load_plan

    return Plan(**load_plan(Path(path), model))


def graph_constants(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the program needs and the model does not own, by name."""
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {
        n for n, _ in model.named_buffers(remove_duplicate=False)
    }
    found: dict[str, Tensor] = {}
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                value = _attribute(module, node.target)
                if isinstance(value, Tensor) and node.target not in own:
                    found[node.target] = value
    return found


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
