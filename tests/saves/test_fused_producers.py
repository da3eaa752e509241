"""Activations fused with the storing of their inputs or outputs: the rewrite, the operator, Inductor's code."""

import operator
from dataclasses import replace

import pytest
import torch
from kernels.inputs import classes_in_turn, every_class, same
from stages import lowered
from test_inline_kernels import calls, inlined
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from without_gpu import an_h100, generated, kernel_calls, to_gpu

from fxpipe.graph_module import copy_graph_module, returned
from fxpipe.inline_kernels import with_inlined_kernels
from fxpipe.ir.compression import CompressionPlan
from fxpipe.ir.stage_graphs import Binding, LoweredStages
from fxpipe.passes.compress import ChooseSavePoints, compress_halves
from fxpipe.printing import listing, operator_name
from fxpipe.runtime import stage_runner
from fxpipe.saves.fused_producers import fuse_producers
from fxpipe.triton_kernels.fused import ACTIVATIONS

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

aten, fxp = torch.ops.aten, torch.ops.fxpipe
FUSED = fxp.produce_and_compress.default
X = torch.randn(64, 32)


def graph_of(function, *inputs: torch.Tensor, mode: str = "fake", gpu: bool = True) -> fx.GraphModule:
    module = make_fx(function, tracing_mode=mode)(*inputs)
    if gpu:
        to_gpu(module.graph)
    return module


def fused(module: fx.GraphModule, exact: bool = False) -> list[fx.Node]:
    fuse_producers(module.graph, exact=exact)
    module.graph.lint()
    module.recompile()
    return module.graph.find_nodes(op="call_function", target=FUSED)


def layer(activation: str = "relu", stored: str = "output", text: str = "bfp4b32", columns: bool = False):
    """A matrix product, its activation, and one of them stored."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = aten.mm(x, aten.permute(x, [1, 0]))
        y = ACTIVATIONS[activation](aten.permute(z, [1, 0]) if columns else z)
        kept = y if stored == "output" else z
        return y, *fxp.bfp_compress(kept, text, [1, 0] if columns and stored == "output" else [0, 1])

    return function


@pytest.mark.parametrize("stored", ["input", "output"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_stored_value_become_one_node(activation, stored):
    module = graph_of(layer(activation, stored), X)
    names = [n.name for n in module.graph.output_node().args[0]]
    (node,) = fused(module)
    (source,), text, order, *rest = node.args
    assert (operator_name(source), text, order, rest) == ("aten.mm", "bfp4b32", [0, 1], [activation, stored])
    assert [n.name for n in module.graph.output_node().args[0]] == names  # nothing is renamed
    assert [n.args for n in module.graph.output_node().args[0]] == [(node, i) for i in range(len(names))]
    assert all(n.target is operator.getitem for n in node.users)
    for n in module.graph.output_node().args[0]:
        assert n.meta["val"].shape == node.meta["val"][n.args[1]].shape


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("stored", ["input", "output"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_rewrite_changes_no_bit(activation, stored, columns, monkeypatch):
    monkeypatch.setattr("fxpipe.saves.fused_producers.DEVICES", ("cpu",))
    function = layer(activation, stored, columns=columns)
    module = graph_of(function, X, gpu=False)
    assert len(fused(module)) == (0 if columns and stored == "input" else 1)  # of a transposed value another order
    assert all(map(same, module(X), function(X)))
    assert [t.stride() for t in module(X)] == [t.stride() for t in function(X)]


@pytest.mark.parametrize("stored", ["input", "output"])
def test_through_the_views_of_a_linear_layer(stored, monkeypatch):
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = aten.mm(x.view(-1, 32), w)
        y = aten.gelu(z.view(4, 16, 32)).view(64, 32)
        kept = y if stored == "output" else z
        return y, *fxp.bfp_compress(kept, "bfp4b32", [0, 1])

    monkeypatch.setattr("fxpipe.saves.fused_producers.DEVICES", ("cpu",))
    x, w = torch.randn(4, 16, 32), torch.randn(32, 32)
    module = graph_of(function, x, w, gpu=False)
    (node,) = fused(module)
    assert node.args[2:] == ([0, 1, 2], "gelu", stored)
    assert all(map(same, module(x, w), function(x, w)))


def after_addition(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.relu(x @ x.t() + 1)
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def a_part(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.relu(x @ x.t())
    return y, *fxp.bfp_compress(y[:8], "bfp4b32", [0, 1])


def plus_twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = aten.add(x, x @ x.t(), alpha=2)
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def plus_a_row(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x + x[0]
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def plus_a_transposed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x[:32] + x[:32].t()
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def plus_another_dtype(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x + x.bfloat16()
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def plus_a_number(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = aten.add(x, 1.0)
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def another_operator(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.tanh(x @ x.t())
    return y, *fxp.bfp_compress(y, "bfp4b32", [0, 1])


def seeded(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.relu(x @ x.t())
    return y, *fxp.bfp_compress(y, "bfp4b32+sr", [0, 1], fxp.seed_of(y, 0))


LEFT = {
    "what Inductor computes with the activation": after_addition,
    "a part of the output": a_part,
    "another operator": another_operator,
    "a seed from the value": seeded,
    "tiles of rows": layer(text="bfp4b4x8"),
    "levels of the values' own": layer(text="bfp4b32:learned"),
}


SUMS_LEFT = (plus_twice, plus_a_row, plus_a_transposed, plus_another_dtype, plus_a_number)


def residual(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A residual sum that is stored, and read on."""
    y = x + aten.mm(x, x.t()[:, :32])
    return y * 2, *fxp.bfp_compress(y.view(-1), "bfp4b32", [0])


def test_a_residual_sum_and_its_storing_become_one_node(monkeypatch):
    monkeypatch.setattr("fxpipe.saves.fused_producers.DEVICES", ("cpu",))
    module = graph_of(residual, X, gpu=False)
    (node,) = fused(module, exact=True)
    assert node.args[1:] == ("bfp4b32", [0, 1], "add", "output")
    assert all(map(same, module(X), residual(X)))


def test_a_residual_sum_is_left_to_inductor_where_that_follows():
    assert not fused(graph_of(residual, X))


def test_a_relu_of_anything_is_fused_where_every_operator_is_a_kernel():
    assert len(fused(graph_of(after_addition, X), exact=True)) == 1


@pytest.mark.parametrize("function", SUMS_LEFT)
def test_other_sums_are_left_as_they_are(function):
    module = graph_of(function, torch.randn(64, 64) if function is plus_twice else X)
    before = str(module.graph)
    assert not fused(module, exact=True)
    assert str(module.graph) == before


@pytest.mark.parametrize("function", LEFT.values(), ids=LEFT)
def test_left_as_it_is(function):
    module = graph_of(function, X)
    before = str(module.graph)
    assert not fused(module)
    assert str(module.graph) == before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_rounds_otherwise_is_left_where_forward_must_be_exact(activation):
    assert len(fused(graph_of(layer(activation), X), exact=True)) == (activation == "relu")


def test_on_the_cpu_nothing_changes():
    module = graph_of(layer(), X, gpu=False)
    before = str(module.graph)
    assert not fused(module)
    assert str(module.graph) == before


@pytest.mark.parametrize("text", ["bfp4b32", "bfp3b16:gauss+e5m3", "bfp4b4x8", "bfp4b32+o2"])
@pytest.mark.parametrize("stored", ["input", "output"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_operator_is_the_pair(activation, stored, text):
    x = every_class(40, torch.bfloat16).view(8, -1)
    y, *planes = fxp.produce_and_compress([x], text, [1, 0], activation, stored)
    expected = ACTIVATIONS[activation](x)
    assert same(y, expected)
    assert all(map(same, planes, fxp.bfp_compress(x if stored == "input" else expected, text, [1, 0])))
    torch.library.opcheck(FUSED, ([torch.randn(8, 32)], text, [0, 1], activation, stored))


@pytest.mark.parametrize(("activation", "stored"), [("elu", "input"), ("relu", "both")])
def test_unknown_arguments(activation, stored):
    message = (
        r"unknown producer 'elu'; known: relu, silu, gelu, gelu_tanh, add|unknown stored 'both'; known: input, output"
    )
    with pytest.raises(ValueError, match=message):
        fxp.produce_and_compress([X], "bfp4b32", [0, 1], activation, stored)


@pytest.mark.parametrize("text", ["bfp4b32", "bfp3b16:gauss+e5m3", "bfp4b32+o2"])
def test_the_operator_is_the_pair_for_a_sum(text):
    g = torch.Generator().manual_seed(1)
    x, z = (classes_in_turn(960, torch.bfloat16, seed).view(8, -1) for seed in (1, 2))
    y, *planes = fxp.produce_and_compress([x, z], text, [1, 0], "add", "output")
    assert same(y, x + z)
    assert all(map(same, planes, fxp.bfp_compress(x + z, text, [1, 0])))
    pair = [torch.randn(8, 32, generator=g) for _ in range(2)]
    torch.library.opcheck(FUSED, (pair, text, [0, 1], "add", "output"))


@pytest.mark.parametrize(
    ("inputs", "producer", "stored", "message"),
    [
        ([X], "add", "output", r"add takes 2 of one dtype and shape; found torch.float32 \[64, 32\]"),
        ([X, X.bfloat16()], "add", "output", r"found torch.float32 \[64, 32\], torch.bfloat16 \[64, 32\]"),
        ([X, X], "relu", "output", r"relu takes 1 of one dtype and shape"),
        ([X, X], "add", "input", r"unknown stored 'input'; known: output"),
    ],
)
def test_inputs_that_the_producer_does_not_take(inputs, producer, stored, message):
    with pytest.raises(ValueError, match=message):
        fxp.produce_and_compress(inputs, "bfp4b32", [0, 1], producer, stored)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("columns", [False, True])
def test_inductor_inlines_one_kernel_for_both(columns, mode):
    module = graph_of(layer("relu", "output", columns=columns), X.bfloat16(), mode=mode)
    assert len(fused(module)) == 1
    source = generated(module, **with_inlined_kernels())
    product, kernel = kernel_calls(source)
    assert product == "extern_kernels.mm"
    assert kernel == "fused_kernel_0.run"
    assert "torch.ops.fxpipe" not in source


def test_what_the_fused_kernel_writes():
    module = graph_of(layer("silu", "input"), X.bfloat16())
    fused(module)
    (call,) = calls(inlined(module))
    assert call.kwargs["tensors_to_clone"] == ["y_ptr", "code32_ptr", "scale_ptr"]


def test_a_stage_of_a_plan_on_a_gpu():
    """The rewrite of stages uses it, its listing shows it, and Inductor inlines it."""
    program = ChooseSavePoints(format="bfp4b32", min_bytes=0).run(lowered("mlp", 1))
    (stage,) = program.fact(LoweredStages).stages
    halves = [copy_graph_module(half.graph_module) for half in (stage.forward, stage.backward)]
    for half in halves:
        to_gpu(half.graph)
    n_outputs = sum(b.kind != "saved" for b in stage.forward.outputs)
    points = program.fact(CompressionPlan).of_stage(0)
    compress_halves(*halves, n_outputs, points)
    nodes = halves[0].graph.find_nodes(op="call_function", target=FUSED)
    relus = [p.name for p in points if p.operator == "aten.relu.default" and p.decision == "compress"]
    assert [n.name for n in nodes] == [f"compress_{name}" for name in relus] != []
    assert "fxpipe.produce_and_compress(" in listing(halves[0].graph)
    saved = tuple(Binding("saved", n.name) for n in returned(halves[0].graph)[n_outputs:])
    forward = replace(stage.forward, graph_module=halves[0], outputs=(*stage.forward.outputs[:n_outputs], *saved))
    with an_h100() as sources:
        stage_runner.inductor(forward)
    found = kernel_calls(sources[0])
    assert sum(call.startswith("fused_kernel") for call in found) == len(relus)
    assert not any("fxpipe" in call for call in found)
