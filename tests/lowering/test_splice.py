"""Equal blocks traced once: the graphs compute, bit for bit, what graphs traced as a whole compute, and save as much."""

import pytest
import torch
from models import build
from stages import SEED, assert_same, constants_of, left_behind, loss_of, run_on
from torch import nn
from torch.utils import _pytree as pytree

import fxpipe
from fxpipe.lowering.repeats import repeated_segments
from fxpipe.lowering.splice import spliced_halves
from fxpipe.passes import lower
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.trace import trace


class Residual(nn.Module):
    """``n`` equal residual blocks; ``between`` comes after each, ``end`` makes the loss."""

    def __init__(self, n=3, between=lambda x: x, end=lambda x: x.square().mean()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(n))
        self.between, self.end = between, end

    def forward(self, x):
        for layer in self.layers:
            x = self.between(x + torch.tanh(layer(x)))
        return self.end(x)


def graph_of(model, dynamic=None):
    return trace(model, (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),), dynamic=dynamic).graph_module


def segments_of(module):
    parameters = dict(module.named_parameters())
    wanted = [n for n in module.graph.find_nodes(op="get_attr") if n.target in parameters]
    return repeated_segments(module.graph, wanted)


def spliced(module, partitioner="default"):
    templates = {}
    examples = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    return spliced_halves(module, examples, partitioner, templates), templates


def test_segments_end_at_residual_sums_and_equal_blocks_have_equal_keys():
    first, *equal, loss = segments_of(graph_of(Residual(5)))
    assert {s.calls[-1].target for s in (first, *equal)} == {torch.ops.aten.add.Tensor}
    assert len(first.calls) == 2 * len(equal[0].calls)  # the first sum ends none: it takes an input without a gradient
    assert [s.key == equal[0].key for s in (first, *equal, loss)] == [False, True, True, True, False]
    every = [n for n in loss.calls[0].graph.nodes if n.op == "call_function"]
    assert [n for s in (first, *equal, loss) for n in s.calls] == every


@pytest.mark.parametrize(
    "model",
    [
        Residual(1),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
        Residual(3, between=lambda x: x.relu_()),
    ],
    ids=["one block", "no sums", "written in place"],
)
def test_nothing_is_parted(model):
    assert segments_of(graph_of(model)) == []


def test_symbolic_sizes_are_not_parted():
    assert segments_of(graph_of(Residual(3), dynamic={"0": [0]})) == []


def test_each_of_the_equal_blocks_is_traced_once():
    halves, templates = spliced(graph_of(Residual(8)))
    assert halves is not None
    assert len(templates) == 3
    tanh = halves.forward.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    assert len(tanh) == 8
    layers = [str(n.meta["nn_module_stack"]) for n in halves.forward.graph.nodes if "addmm" in n.name]
    assert [f"layers.{i}" in stack for i, stack in enumerate(layers)] == [True] * 8


def test_names_are_unique_over_both_halves():
    halves, _ = spliced(graph_of(Residual(4)))
    saved = {n.name for n in halves.backward.graph.find_nodes(op="placeholder")}
    computed = [n.name for n in halves.backward.graph.nodes if n.op == "call_function"]
    assert not {n.name for n in halves.forward.graph.nodes} & set(computed)
    assert saved - {"tangents_1"} <= {n.name for n in halves.forward.graph.nodes}


def test_a_gradient_of_another_layout_makes_it_trace_the_whole():
    module = graph_of(Residual(5, end=lambda x: x.sum()))  # the sum's gradient is one number seen as a tensor
    assert len(segments_of(module)) > 1
    assert spliced(module)[0] is None


def program_of(name, partitioner, monkeypatch, whole=False):
    """The lowered program of five layers in two stages, and in how many stages equal blocks were found."""
    model, args, kwargs = build(name, n_layers=5)
    found = []

    def recorded(*arguments):
        found.append(None if whole else spliced_halves(*arguments))
        return found[-1]

    monkeypatch.setattr(lower, "spliced_halves", recorded)
    program = default_pipeline(Options(n_ranks=2, partitioner=partitioner)).run(trace(model, args, kwargs))
    return program, sum(f is not None for f in found)


def step_of(name, program):
    model, args, kwargs = build(name, n_layers=5)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return run_on(model, program, tensors, constants_of(program, model))


@pytest.mark.parametrize("partitioner", ["recompute-attention", "min-bytes", "min-cut", "default"])
@pytest.mark.parametrize("name", ["gpt", "llama", "vit"])
def test_spliced_stages_equal_eager_bitwise_and_save_as_much(name, partitioner, monkeypatch):
    program, n_spliced = program_of(name, partitioner, monkeypatch)
    whole, none = program_of(name, partitioner, monkeypatch, whole=True)
    assert n_spliced > none == 0
    found, runners = step_of(name, program)
    model, args, kwargs = build(name, n_layers=5)
    torch.manual_seed(SEED)
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    assert_same(found, left_behind(model, loss))
    _, all_runners = step_of(name, whole)
    assert sum(r.saved_bytes for r in runners) <= 1.02 * sum(r.saved_bytes for r in all_runners)


class Attending(nn.Module):
    """Equal blocks of attention, whose backward has no derivative: nothing may ask for one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            q = layer(x)
            x = x + nn.functional.scaled_dot_product_attention(q, q, q)
        return x.square().mean()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # within Inductor
def test_spliced_stages_can_be_compiled():
    model, x = Attending(), torch.randn(2, 1, 16, 8)
    plan = fxpipe.compile(model, x, fxpipe.Options(stage_compiler="inductor"))
    loss = plan.pipe().step(x)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(x)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
