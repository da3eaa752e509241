"""lower-stages: both halves together are eager PyTorch, bit for bit; what their inputs and outputs mean."""

import pytest
import torch
from models import MODELS
from stages import assert_same, compressed, eager, lowered, relative_error, run, traced
from torch import nn

from fxpipe.errors import OptionError, VerifyError
from fxpipe.ir.partition import Partition
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.passes.lower import LowerStages
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.trace import trace

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A function over a layer, a norm, a counter and inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, *args):
        return self.function(self, *args)


def stages(function, *args, n_ranks=1, **options):
    program = trace(Function(function), args or (X,))
    return default_pipeline(Options(n_ranks=n_ranks, **options)).run(program).fact(LoweredStages).stages


def texts(bindings):
    return [str(b) for b in bindings]


SEVERAL_USES = {"t5": ["shared.weight"]}  # three uses in two stages: the gradients are added in another order


CUTS = [(1, "default"), (2, "min-cut"), (2, "min-bytes"), (2, "recompute-attention")]


@pytest.mark.parametrize(("n_stages", "partitioner"), CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_both_halves_equal_eager_bitwise(name, n_stages, partitioner):
    found, runners = run(name, lowered(name, n_stages, partitioner))
    expected = eager(name)
    assert len(runners) == n_stages
    assert relative_error(found, expected) < 1e-7
    for several in SEVERAL_USES.get(name, ()) if n_stages > 1 else ():
        found.grads[several] = expected.grads[several]
    assert_same(found, expected)


def test_the_partitioners_in_order_of_what_they_save():
    names = ("recompute-attention", "min-bytes", "min-cut", "default")
    runs = (run("gpt", lowered("gpt", 2, name))[1] for name in names)
    least, less, more, most = (sum(r.saved_bytes for r in runners) for runners in runs)
    assert least < 0.95 * less < 0.95 * 0.75 * more < 0.95 * 0.75 * most


def test_bindings_of_one_stage():
    def function(self, x, scale):
        self.count.add_(1.0)
        return (self.norm(self.layer(x)).relu() * scale * self.count).sum()

    (stage,) = stages(function, X, X + 1)
    parameters = ["layer.weight", "layer.bias", "norm.weight", "norm.bias"]
    buffers = ["count", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    assert texts(stage.forward.inputs) == [
        *(f"parameter {n}" for n in parameters), *(f"buffer {n}" for n in buffers), "input 0", "input 1",
    ]  # fmt: skip
    assert texts(stage.forward.outputs)[:5] == [*(f"mutation {n}" for n in buffers), "output 0"]
    saved = texts(stage.forward.outputs)[5:]
    assert all(t.startswith("saved ") for t in saved)
    assert "saved relu" in saved
    assert texts(stage.backward.inputs) == [*saved, "output 0"]
    assert texts(stage.backward.outputs) == [*(f"gradient {n}" for n in parameters), *["none"] * 6]
    assert (stage.index, stage.received, stage.outputs) == (0, (), ("sum_1",))
    assert stage.inputs == ("args_0", "args_1")
    assert stage.output_needs_grad == (True,)
    assert [tuple(x.shape) for x in stage.example_outputs] == [()]


def test_bindings_between_stages():
    first, second = stages(lambda self, x, y: (self.layer(self.layer(x).relu()) * y).sum(), X, X, n_ranks=2)
    assert first.received == ()
    assert second.received == first.outputs
    assert second.received_needs_grad == first.output_needs_grad == (True,)
    assert second.inputs == ("args_1",)
    assert "gradient input 0" in texts(second.backward.outputs)
    assert "gradient input 0" not in texts(first.backward.outputs)
    assert {"gradient layer.weight"} == {t for t in texts(first.backward.outputs) if t.endswith("weight")}


def test_a_value_without_gradient_between_stages():
    def function(self, x):
        sign = self.layer(x).argmax(-1, keepdim=True)
        return (self.layer(self.layer(x)) * sign).sum()

    program = default_pipeline(Options(n_ranks=2)).run(trace(Function(function), (X,)))
    first, second = program.fact(LoweredStages).stages
    needs = dict(zip(first.outputs, first.output_needs_grad, strict=True))
    integers = {n for n, x in zip(first.outputs, first.example_outputs, strict=True) if not x.is_floating_point()}
    assert integers == {n for n, needed in needs.items() if not needed} != set()
    assert len([t for t in texts(first.backward.inputs) if t.startswith("output")]) == sum(needs.values())
    assert second.received_needs_grad == tuple(needs[n] for n in second.received)


VIEWS = {
    "two views": lambda y: y.view(2, 12).sin().sum() + y.t().cos().sum(),
    "three, one of a view": lambda y: y.view(2, 12).sin().sum() + y.t().cos().sum() + y.t()[1:].tanh().sum(),
    "itself and a view": lambda y: y.sin().sum() + y.t().cos().sum(),
    "all parts": lambda y: sum(part.sin().sum() for part in y.split(2, dim=1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_one_storage_is_saved_once(name):
    def function(self, x):
        return VIEWS[name](self.layer(x))

    (stage,) = stages(function, partitioner="default")
    graph = stage.forward.graph_module.graph
    saved = [n for n, b in zip(graph.output_node().args[0], stage.forward.outputs, strict=True) if b.kind == "saved"]
    made = [n.name for n in saved if n.op == "call_function"]
    assert made[0] == "addmm"
    assert [n for n in made if n in ("view", "t", "slice_1", "getitem", "split")] == []
    model, eager_model = Function(function), Function(function)
    eager_model.load_state_dict(model.state_dict())
    eager_model(X).backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = [X if b.kind == "input" else tensors[b.name] for b in stage.forward.inputs]
    with torch.no_grad():
        loss, *kept = stage.forward.graph_module(*inputs)
        grads = stage.backward.graph_module(*kept, torch.ones(()))
    assert torch.equal(loss, eager_model(X))
    for binding, grad in zip(stage.backward.outputs, grads, strict=True):
        if binding.kind == "gradient":
            assert torch.equal(grad, eager_model.get_parameter(binding.name).grad)


def test_a_lone_part_is_saved_as_it_is():
    (stage,) = stages(lambda self, x: self.layer(x)[1:2].sin().sum(), partitioner="default")
    saved = [b.name for b in stage.forward.outputs if b.kind == "saved"]
    assert "addmm" not in saved


def refusal(function, *args):
    with pytest.raises(VerifyError) as caught:
        stages(function, *args)
    return str(caught.value)


def test_a_model_that_writes_to_its_input():
    message = refusal(lambda self, x: (x.add_(1.0) * self.layer(x)).sum(), X.clone())
    assert message.startswith("the joint graph holds InputMutationAOTOutput(mutated_input=PlainAOTInput(idx=0))")
    assert message.endswith("a stage may not write to its own inputs or return a value that aliases one")


def test_a_model_that_writes_to_a_parameter():
    def function(self, x):
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        return self.layer(x).sum()

    assert "ParamAOTInput(target='layer.weight')" in refusal(function)


@pytest.mark.parametrize("function", [lambda self, x: x.sum(), lambda self, x: self.layer(x).detach().sum()])
def test_a_loss_without_gradient(function):
    assert refusal(function).startswith(
        "the loss has no gradient: it depends on no parameter that requires one; unfreeze"
    )


def test_a_frozen_first_stage_is_fine():
    first, second = stages(lambda self, x: self.layer(self.layer(x).detach()).sum(), n_ranks=2)
    assert first.output_needs_grad == second.received_needs_grad
    assert "gradient layer.weight" in texts(second.backward.outputs)


def test_wrong_options_and_missing_facts():
    known = "default, min-bytes, min-cut, recompute-attention"
    with pytest.raises(OptionError, match=f"unknown partitioner 'max-cut'; known: {known}"):
        LowerStages("max-cut")
    with pytest.raises(VerifyError, match=f"the program has no {Partition.__name__}"):
        LowerStages().run(traced("mlp"))


def test_bindings_are_text():
    for text in ("parameter layer.weight", "none", "gradient input 0", "saved x", "output 3"):
        assert str(Binding.parse(text)) == text
    assert Binding.parse("gradient input 0") == Binding("gradient", "input 0")
    with pytest.raises(
        VerifyError, match="unknown kind of binding 'weight'; known: buffer, gradient, input, mutation, none"
    ):
        Binding.parse("weight w")


def test_halves_check_themselves():
    stage = lowered("mlp").fact(LoweredStages).stages[0]
    half = stage.forward
    n = len(half.inputs)
    with pytest.raises(VerifyError, match=f"graph has {n} placeholders but {n - 1} bindings"):
        HalfGraph(half.graph_module, half.inputs[1:], half.outputs)
    with pytest.raises(VerifyError, match=f"graph returns .* but has {len(half.outputs) + 1} output bindings"):
        HalfGraph(half.graph_module, half.inputs, (*half.outputs, Binding("none")))
    other = compressed("mlp").fact(LoweredStages).stages[0]
    fields = {**vars(stage), "backward": other.backward}
    with pytest.raises(VerifyError, match=r"stage 0: forward saves \['saved primals.* but backward takes \["):
        StageGraphs(**fields)
