"""canonicalize: what goes, what stays, and that no number and no random draw changes."""

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from stages import SEED, inputs_of, loss_of, traced
from torch import nn

from fxpipe.pass_manager import Pipeline
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.trace import trace

aten = torch.ops.aten
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def cleaned(function, *args):
    program = trace(Function(function), args)
    return program, Pipeline((Canonicalize(),)).run(program)


def operators(program):
    return [str(n.target).removeprefix("aten.") for n in program.graph.nodes if n.op == "call_function"]


def test_assertions_about_metadata_go():
    before, after = cleaned(lambda x: x.to(torch.float64).relu(), X)
    assert operators(before) == ["_assert_tensor_metadata.default", "to.dtype", "relu.default"]
    assert operators(after) == ["to.dtype", "relu.default"]


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.contiguous(),
        lambda x: x.to("cpu", torch.float32),
        lambda x: x.to(torch.float32).contiguous().to("cpu"),
    ],
)
def test_a_conversion_that_converts_nothing_goes(convert):
    before, after = cleaned(lambda x: convert(x).relu(), X)
    assert operators(after) == ["relu.default"]
    assert torch.equal(after.graph_module(X)[0], before.graph_module(X)[0])


@pytest.mark.parametrize(
    ("convert", "operator"),
    [
        (lambda x: x.to(torch.float64), "to.dtype"),
        (lambda x: x.t().contiguous(), "contiguous.default"),
        (lambda x: x.to(torch.float32, copy=True), "to.dtype"),
        (lambda x: x.to("cpu", torch.float32, copy=True), "to.device"),
        (lambda x: x.clone(), "clone.default"),
    ],
)
def test_a_conversion_that_does_something_stays(convert, operator):
    before, after = cleaned(lambda x: convert(x).relu(), X)
    assert operator in operators(after)
    found, expected = after.graph_module(X)[0], before.graph_module(X)[0]
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_a_copy_that_is_written_stays():
    _, after = cleaned(lambda x: x.to(torch.float32, copy=True).add_(1.0), X)
    x = X.clone()
    assert torch.equal(after.graph_module(x)[0], X + 1.0)
    assert torch.equal(x, X)


def test_dead_nodes_go_but_writes_and_random_draws_stay():
    def function(x, y):
        x.exp().sin()  # dead
        F.dropout(x, 0.5)  # dead, but it draws
        y.add_(1.0)  # a write
        return F.dropout(x, 0.5)

    before, after = cleaned(function, X, X.clone())
    assert operators(after) == ["dropout.default", "add_.Tensor", "dropout.default"]
    y, other = X.clone(), X.clone()
    torch.manual_seed(0)
    expected = before.graph_module(X, other)[0]
    torch.manual_seed(0)
    assert torch.equal(after.graph_module(X, y)[0], expected)
    assert torch.equal(y, other)
    assert not torch.equal(y, X)


def test_inputs_and_unused_parameters():
    _, after = cleaned(lambda x, y: x.relu(), X, X)
    assert [n.name for n in after.graph.find_nodes(op="placeholder")] == ["args_0", "args_1"]  # the calling convention
    model = nn.Sequential(nn.Linear(6, 6))
    model.unused = nn.Parameter(torch.zeros(1))
    after = Canonicalize().run(trace(model, (X,)))
    assert {n.target for n in after.graph.find_nodes(op="get_attr")} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_to_do_the_second_time(name):
    once = Pipeline((Canonicalize(),)).run(traced(name))
    twice = Pipeline((Canonicalize(),)).run(once)
    assert [n.format_node() for n in once.graph.nodes] == [n.format_node() for n in twice.graph.nodes]
    assert aten._assert_tensor_metadata.default not in {n.target for n in once.graph.nodes}


@pytest.mark.parametrize("name", ["cnn", "bert", "t5"])
def test_models_that_draw_random_numbers_give_the_same(name):
    results = []
    for program in (traced(name), Pipeline((Canonicalize(),)).run(traced(name))):
        torch.manual_seed(SEED)
        results.append(loss_of(program.graph_module(*inputs_of(name))))
    assert torch.equal(*results)
