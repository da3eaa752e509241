"""Programs of the test models after each part of the pipeline, made once per process, and one step of them without an engine.

Models are rebuilt for every run (the same seed gives the same weights), so that a test may change what it is given.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from models import build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.passes.compress import ChooseSavePoints, CompressSavePoints
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.runtime.stage_runner import StageRunner, named_tensors
from fxpipe.trace import trace

SEED = 7
SIZES = {name: {"batch": 4, "n_layers": 2} for name in ("gpt", "llama", "bert", "vit")} | {
    "t5": {"batch": 4, "n_layers": 1}
}


def small(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A test model, with fewer layers where it is large; equal on every call."""
    return build(name, **SIZES.get(name, {}))


@functools.cache
def traced(name: str) -> Program:
    """The program of a test model as traced."""
    model, args, kwargs = small(name)
    return trace(model, args, kwargs)


@functools.cache
def lowered(name: str, n_stages: int = 2, partitioner: str = "min-cut") -> Program:
    """After the whole default pipeline, without compression."""
    return default_pipeline(Options(n_ranks=n_stages, partitioner=partitioner)).run(traced(name))


@functools.cache
def compressed(name: str, format: str = "bfp4b32", n_stages: int = 2, partitioner: str = "min-cut") -> Program:
    """The same with every value compressed that may be, however small."""
    chosen = ChooseSavePoints(format=format, min_bytes=0).run(lowered(name, n_stages, partitioner))
    return CompressSavePoints().run(chosen)


@dataclass(frozen=True)
class Step:
    """What one step left behind: the loss, and by name every gradient and every buffer."""

    loss: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def inputs_of(name: str) -> list[Tensor]:
    """The tensor leaves of a model's example inputs, in the order of the placeholders."""
    _, args, kwargs = small(name)
    return [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


@functools.cache
def eager(name: str) -> Step:
    """One step of the model itself."""
    model, args, kwargs = small(name)
    torch.manual_seed(SEED)
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    return left_behind(model, loss)


def loss_of(output: object) -> Tensor:
    """The loss among a model's outputs."""
    found = output["loss"] if hasattr(output, "keys") else output[0] if isinstance(output, tuple) else output  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found


def left_behind(model: nn.Module, loss: Tensor) -> Step:
    """The step's traces on the model."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads, {n: b.clone() for n, b in model.named_buffers()})


def run(name: str, program: Program) -> tuple[Step, list[StageRunner]]:
    """One step of a lowered program on a fresh model, one stage after the other."""
    model, _, _ = small(name)
    return run_on(model, program, inputs_of(name), constants_of(traced(name), model))


def run_on(
    model: nn.Module, program: Program, tensors: list[Tensor], constants: dict[str, Tensor] | None = None
) -> tuple[Step, list[StageRunner]]:
    """One step of a lowered program on this model, with these tensors as the program's inputs."""
    torch.manual_seed(SEED)
    runners = [StageRunner(s, model, constants or {}) for s in program.fact(LoweredStages).stages]
    inputs = dict(zip(program.signature.inputs, tensors, strict=True))
    values: tuple[Tensor, ...] = ()
    for runner in runners:
        values = runner.forward(0, values, inputs)
    grads: tuple[Tensor | None, ...] = (torch.ones_like(values[0]),)
    for runner in reversed(runners):
        grads = runner.backward(0, grads)
    return left_behind(model, values[0]), runners


def constants_of(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a traced program that the model does not own, by name."""
    read = {str(n.target) for n in program.graph.find_nodes(op="get_attr")} - named_tensors(model).keys()
    values = {name: attribute(program.graph_module, name) for name in read}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def attribute(module: nn.Module, name: str) -> Any:
    """The attribute of a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def assert_same(found: Step, expected: Step) -> None:
    """Bitwise: the loss, the gradients of the same parameters, the buffers."""
    assert torch.equal(found.loss, expected.loss)
    for a, b in ((found.grads, expected.grads), (found.buffers, expected.buffers)):
        assert a.keys() == b.keys()
        assert [n for n in a if not torch.equal(a[n], b[n])] == []


def relative_error(found: Step, expected: Step) -> float:
    """Of all gradients together."""
    assert found.grads.keys() == expected.grads.keys()
    error = sum((found.grads[n].double() - g).square().sum() for n, g in expected.grads.items())
    return float((error / sum(g.double().square().sum() for g in expected.grads.values())) ** 0.5)
