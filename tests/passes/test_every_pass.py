"""Every pass of the default pipeline on every test model: what says it is exact is so bitwise, what says it is bounded is near.

And the listings of a small MLP after each pass, as golden files (``pytest --golden`` writes them anew), which are run too.
"""

import functools

import pytest
import torch
from models import MODELS
from stages import (
    SEED,
    attribute,
    constants_of,
    eager,
    inputs_of,
    left_behind,
    loss_of,
    relative_error,
    run_on,
    small,
    traced,
)

from fxpipe.demos.plain import mlp
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.pass_base import parse_pass
from fxpipe.pipeline import PASSES, Options, default_pipeline
from fxpipe.printing import program_listing
from fxpipe.trace import trace

OPTIONS = Options(n_ranks=2, n_microbatches=2, format="bfp4b32", min_bytes=0)
BOUND = 0.25  # of all gradients together, for 4 bits
STEPS = [step.name for step in default_pipeline(OPTIONS).passes]
SEVERAL_USES = {"t5": "shared.weight"}  # three uses in two stages: gradients are added in another order


@functools.cache
def history(name):
    """The program before the first and after each pass, with the pass."""
    seen = [(None, traced(name))]
    default_pipeline(OPTIONS, observers=(lambda step, before, after: seen.append((step, after)),)).run(traced(name))
    return seen


def step_of(program, name):
    """One step of a program at any point of the pipeline, on a fresh model."""
    model, _, _ = small(name)
    if LoweredStages in program.facts:
        return run_on(model, program, inputs_of(name), constants_of(traced(name), model))[0]
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {n: attribute(traced(name).graph_module, n) for n in own if has(traced(name).graph_module, n)}
    with torch.no_grad():  # these programs read the tensors of the model that was traced
        before = {n: t.clone() for n, t in held.items()}
        for n, t in held.items():
            t.copy_(own[n])
            t.grad = None
    torch.manual_seed(SEED)
    loss = loss_of(program.graph_module(*inputs_of(name)))
    loss.backward()
    with torch.no_grad():
        for n, t in held.items():
            own[n].grad, t.grad = t.grad, None
            own[n].copy_(t)
            t.copy_(before[n])
    return left_behind(model, loss)


def has(module, name):
    try:
        attribute(module, name)
    except AttributeError:
        return False
    return True


def test_the_pipeline_runs_every_registered_pass():
    assert set(STEPS) | {"use-costs"} == set(PASSES)  # use-costs stands for annotate-costs, and changes no node
    assert [step.name for step, _ in history("mlp")[1:]] == STEPS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("at", range(1, len(STEPS) + 1), ids=STEPS)
def test_a_pass_keeps_its_promise(at, name):
    step, program = history(name)[at]
    found, expected = step_of(program, name), eager(name)
    assert torch.equal(found.loss, expected.loss)
    assert found.buffers.keys() == expected.buffers.keys()
    assert [n for n, b in found.buffers.items() if not torch.equal(b, expected.buffers[n])] == []
    assert found.grads.keys() == expected.grads.keys()
    changed = {n for n, g in found.grads.items() if not torch.equal(g, expected.grads[n])}
    if step.exact:
        assert changed <= ({SEVERAL_USES.get(name)} if LoweredStages in program.facts else set())
        assert relative_error(found, expected) < 1e-6
    else:
        assert 0 < relative_error(found, expected) < BOUND


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_leaves_the_program_before_it_alone(name):
    """Every program of the history still is what it was when the next pass began."""
    nodes = [record.n_nodes for record in history(name)[-1][1].log]
    assert [len(program.graph.nodes) for _, program in history(name)[1:]] == nodes
    assert [r.text for r in history(name)[-1][1].log] == [str(step) for step, _ in history(name)[1:]]


GOLDEN_OPTIONS = Options(n_ranks=2, format="bfp4b32", min_bytes=0)


@functools.cache
def golden_history():
    model, inputs = mlp(batch=4, width=16, n_layers=2)
    seen = []
    watch = lambda step, before, after: seen.append((step, after))  # noqa: E731
    default_pipeline(GOLDEN_OPTIONS, observers=(watch,)).run(trace(model, inputs))
    return model, inputs, seen


@pytest.mark.parametrize("at", range(len(STEPS)), ids=STEPS)
def test_golden_listing(at, golden):
    _, _, seen = golden_history()
    step, program = seen[at]
    golden(f"mlp-{at + 1:02d}-{step.name}.txt", f"# after {step}\n{program_listing(program)}")
    assert parse_pass(str(step), PASSES) == step


@pytest.mark.parametrize("at", range(len(STEPS)), ids=STEPS)
def test_the_program_of_each_listing_runs(at):
    model, inputs, seen = golden_history()
    step, program = seen[at]
    model.zero_grad(set_to_none=True)
    loss = model(*inputs)
    loss.backward()
    expected = left_behind(model, loss)
    model.zero_grad(set_to_none=True)
    if LoweredStages in program.facts:
        found, _ = run_on(model, program, list(inputs))
    else:
        (loss,) = program.graph_module(*inputs)
        loss.backward()
        found = left_behind(model, loss)
    assert torch.equal(found.loss, expected.loss)
    assert (relative_error(found, expected) == 0) == step.exact
