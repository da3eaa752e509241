"""Costs measured as the model trains: every node has its share, their sums are those of the stage, nothing is changed."""

import pytest
import torch
from models import build

from fxpipe.api import graph_constants, trace_microbatch
from fxpipe.costs.cost_model import modelled_costs
from fxpipe.costs.devices import device, processor_name
from fxpipe.costs.stage_costs import costs_as_trained
from fxpipe.errors import VerifyError
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.lowering.joint import served_call
from fxpipe.pass_manager import Pipeline
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.keep_loss import KeepLoss
from fxpipe.pipeline import Options, default_pipeline

SECONDS = ("forward_seconds", "backward_seconds")
PRODUCTS = (
    "aten.linear.default",
    "aten.conv2d.default",
    "aten.addmm.default",
    "aten.mm.default",
    "aten.matmul.default",
)


def front(args, kwargs, model, n):
    program, _ = trace_microbatch(model, args, kwargs, n)
    return Pipeline((KeepLoss(), Canonicalize())).run(program)


@pytest.mark.parametrize("name", ["gpt", "cnn", "unet", "tied", "multi", "t5"])
def test_counts_are_those_of_the_model_and_seconds_are_measured(name):
    model, args, kwargs = build(name)
    table = costs_as_trained(model, args, kwargs, 2)
    modelled = modelled_costs(front(args, kwargs, model, 2).graph_module, device("cpu"))
    assert (table.device, table.source) == (processor_name(), "measured")
    assert list(table) == list(modelled)
    for row in table.nodes:
        counts = {k: v for k, v in vars(row).items() if k not in SECONDS}
        assert counts == {k: v for k, v in vars(modelled[row.name]).items() if k not in SECONDS}
    products = [row for row in table.nodes if row.operator in PRODUCTS]
    assert products
    assert all(row.forward_seconds > 0 and row.backward_seconds > 0 for row in products)


@pytest.mark.parametrize("name", ["gpt", "cnn", "multi"])
def test_all_that_is_lowered_serves_a_call_of_the_program(name):
    model, args, kwargs = build(name)
    program, _ = trace_microbatch(model, args, kwargs, 2)
    known = {node.name for node in front(args, kwargs, model, 2).graph.nodes}
    stage = default_pipeline(Options(n_microbatches=2)).run(program).fact(LoweredStages).stages[0]
    for half in (stage.forward, stage.backward):
        calls = [node for node in half.graph_module.graph.nodes if node.op == "call_function"]
        served = [served_call(node) for node in calls]
        assert {call for call in served if call} <= known
        assert sum(call is not None for call in served) >= 0.9 * len(calls)


def test_the_model_is_left_as_it_was():
    model, args, kwargs = build("cnn")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first = next(iter(model.parameters()))
    first.grad = torch.ones_like(first)
    random_state = torch.get_rng_state()
    costs_as_trained(model, args, kwargs, 2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_equal_layers_cost_the_same():
    model, args, kwargs = build("gpt", n_layers=3)
    table = costs_as_trained(model, args, kwargs)
    middle = [row for row in table.nodes if "addmm" in row.operator or "linear" in row.operator]
    by_size = {(row.flops, row.parameter_bytes): set() for row in middle}
    for row in middle:
        by_size[row.flops, row.parameter_bytes].add((row.forward_seconds, row.backward_seconds))
    assert sum(len(found) for found in by_size.values()) < len(middle)


def test_a_model_without_a_loss_is_refused():
    with pytest.raises(VerifyError, match="has no loss to train with"):
        costs_as_trained(torch.nn.Linear(4, 4), (torch.randn(2, 4),), {})


def test_constants_of_the_graph_are_those_that_the_model_does_not_own():
    model, args, kwargs = build("gpt")
    program, _ = trace_microbatch(model, args, kwargs, 1)
    own = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert not own & set(graph_constants(program, model))
