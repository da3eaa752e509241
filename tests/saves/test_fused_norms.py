"""Norms fused with the storing of what they read or write: the rewrite, the operator, Inductor's code."""

import operator
from collections.abc import Callable

import pytest
import torch
from kernels.inputs import norm_inputs, same
from kernels.norm_oracle import EPS, check
from test_inline_kernels import calls, inlined
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from without_gpu import generated, kernel_calls, to_gpu

from fxpipe.inline_kernels import with_inlined_kernels
from fxpipe.saves.fused_norms import fuse_norms
from fxpipe.triton_kernels.norms import on_gpu

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

aten, fxp = torch.ops.aten, torch.ops.fxpipe
FUSED = fxp.norm_and_compress.default
D = 64
ROWS = [torch.randn(4, 8, D) for _ in range(2)]
WEIGHTS = [torch.randn(D) for _ in range(2)]
PRODUCT = torch.randn(D, D)
Function = Callable[..., tuple[Tensor, ...]]


def block(norm: str = "layer", stored: str = "both", p: float | None = None, text: str = "bfp4b32") -> Function:
    """A residual sum, its norm and a product of that; of (x, residual, weight, bias, product[, mask])."""

    def function(
        x: Tensor, residual: Tensor, w: Tensor, b: Tensor, product: Tensor, *mask: Tensor
    ) -> tuple[Tensor, ...]:
        z = aten.mm(x.view(-1, D), product).view(x.shape)
        bits = []
        if mask:
            z = mask[0] * z * (1 / 0.75)
            bits = [fxp.pack_bools(mask[0])]
        elif p is not None:
            z, drawn = aten.native_dropout(z, p, True)
            bits = [fxp.pack_bools(drawn)]
        total = residual + z
        y, *statistics = normalised(total, norm, w, b)
        values = {"input": [total], "output": [y], "both": [total, y]}[stored]
        planes = [plane for value in values for plane in fxp.bfp_compress(value, text, [0, 1, 2])]
        return aten.mm(y.view(-1, D), product), total * 2, *statistics, *bits, *planes

    return function


def normalised(x: Tensor, norm: str, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    if norm == "layer":
        return aten.native_layer_norm(x, [D], w, b, EPS)
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if norm == "llama":
        return w * (wide * rstd).to(x.dtype), rstd
    return (wide * rstd * w).to(x.dtype), rstd


def inputs(dtype: torch.dtype = torch.float32, mask: bool = False) -> list[Tensor]:
    given = [t.to(dtype) for t in (*ROWS, *WEIGHTS, PRODUCT)]
    return [*given, *([ROWS[0] > -1] if mask else [])]


def graph_of(function: Function, given: list[Tensor], decomposed: bool, gpu: bool = True) -> fx.GraphModule:
    table = select_decomp_table() if decomposed else None
    module = make_fx(function, table, tracing_mode="fake")(*given)
    module.graph.eliminate_dead_code()
    if gpu:
        to_gpu(module.graph)
    return module


def fused(module: fx.GraphModule) -> list[fx.Node]:
    fuse_norms(module.graph)
    module.graph.lint()
    module.recompile()
    return module.graph.find_nodes(op="call_function", target=FUSED)


@pytest.mark.parametrize("stored", ["input", "output", "both"])
@pytest.mark.parametrize(
    ("norm", "decomposed"), [("layer", False), ("layer", True), ("rms", False), ("rms", True), ("llama", True)]
)
def test_sum_norm_and_what_is_stored_become_one_node(norm, decomposed, stored):
    module = graph_of(block(norm, stored), inputs(torch.bfloat16), decomposed)
    names = [n.name for n in module.graph.output_node().args[0]]
    values = [n.meta["val"] for n in module.graph.output_node().args[0]]
    (node,) = fused(module)
    assert [n.name for n in node.args[0]] == ["view_1", "arg1_1"]
    kind = "layer" if norm == "layer" else "rms"
    assert (node.args[1], node.args[4:]) == ("bfp4b32", (None, 1.0, kind, EPS, stored))
    assert (node.args[2] is None, node.args[3] is None) == (False, norm != "layer")
    assert [n.name for n in module.graph.output_node().args[0]] == names  # nothing is renamed
    for n, before in zip(module.graph.output_node().args[0], values, strict=True):
        assert (n.meta["val"].shape, n.meta["val"].dtype) == (before.shape, before.dtype)
        if n.target is operator.getitem:
            assert (node.meta["val"][n.args[1]].shape, node.meta["val"][n.args[1]].dtype) == (
                before.shape,
                before.dtype,
            )
    left = {str(n.target) for n in module.graph.nodes if n.op == "call_function"}
    of_cpu = {"prims.convert_element_type.default"} if norm == "layer" and decomposed else set()  # of statistics
    assert left - of_cpu <= {
        "aten.mm.default", "aten.view.default", "aten.mul.Tensor", "<built-in function getitem>", str(FUSED),
    }  # fmt: skip


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_rewrite_changes_no_more_than_roundings(norm, decomposed, monkeypatch):
    """Nor planes of the sum, at all; float32, so that statistics have that dtype on the CPU too."""
    monkeypatch.setattr("fxpipe.saves.fused_norms.DEVICES", ("cpu",))
    module = graph_of(block(norm, "input"), inputs(), decomposed, gpu=False)
    assert len(fused(module)) == 1
    made, expected = module(*inputs()), block(norm, "input")(*inputs())
    torch.testing.assert_close(made, expected)
    assert all(map(same, made[-2:], expected[-2:]))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_dropout_joins_the_sum_to_the_bit(norm, monkeypatch):
    monkeypatch.setattr("fxpipe.saves.fused_norms.DEVICES", ("cpu",))
    given = inputs(torch.bfloat16, mask=True)
    module = graph_of(block(norm, "input"), given, decomposed=True, gpu=False)
    (node,) = fused(module)
    assert node.args[4].name == "arg5_1"
    made, expected = module(*given), block(norm, "input")(*given)
    assert same(made[1], expected[1])  # the sum, twice
    assert all(map(same, made[-3:], expected[-3:]))  # the mask's bits, the planes of the sum
    torch.testing.assert_close(made[0], expected[0], rtol=0.02, atol=0.1)


def test_the_mask_comes_from_where_it_came_before():
    module = graph_of(block("layer", "both", p=0.25), inputs(torch.bfloat16), decomposed=False)
    (node,) = fused(module)
    mask, kept = node.args[4:6]
    assert (mask.args[0].target, mask.args[1], kept) == (aten.native_dropout.default, 1, 1 / 0.75)
    assert [n.args[1] for n in mask.args[0].users] == [1]  # the dropped values are nowhere written
    assert not module.graph.find_nodes(op="call_function", target=fxp.pack_bools.default)


def test_a_dropout_of_float32_stays_before_the_sum():
    module = graph_of(block("layer", "both", p=0.25), inputs(), decomposed=False)
    (node,) = fused(module)
    assert len(node.args[0]) == 1  # its product is written by none but Inductor's loops, so the sum is left to them
    assert node.args[4] is None


def test_inputs_of_other_loops_pay_for_two_stored_values_only():
    def function(stored: str) -> Function:
        def run(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            z = x * 2
            y, *statistics = aten.native_layer_norm(z, [D], w, b, EPS)
            values = [z, y] if stored == "both" else [z]
            planes = [plane for value in values for plane in fxp.bfp_compress(value, "bfp4b32", [0, 1, 2])]
            return aten.mm(y.view(-1, D), y.view(D, -1)), *statistics, *planes

        return run

    given = [ROWS[0], *WEIGHTS]
    assert not fused(graph_of(function("input"), given, decomposed=False))
    (node,) = fused(graph_of(function("both"), given, decomposed=False))
    assert [n.name for n in node.args[0]] == ["mul"]


def in_other_formats(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    z = residual + aten.mm(x.view(-1, D), product).view(x.shape)
    y, *_ = aten.native_layer_norm(z, [D], w, b, EPS)
    planes = [*fxp.bfp_compress(z, "bfp4b32", [0, 1, 2]), *fxp.bfp_compress(y, "bfp8b32", [0, 1, 2])]
    return aten.mm(y.view(-1, D), product), *planes


def test_of_two_formats_the_first_is_fused():
    module = graph_of(in_other_formats, inputs(), decomposed=False)
    (node,) = fused(module)
    assert (node.args[1], node.args[-1]) == ("bfp4b32", "input")
    assert len(module.graph.find_nodes(op="call_function", target=fxp.bfp_compress.default)) == 1


def read_by_loops_alone(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    y, *_ = aten.native_layer_norm(residual + aten.mm(x.view(-1, D), product).view(x.shape), [D], w, b, EPS)
    return (torch.sin(y),)


def two_dimensions(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    y, *_ = aten.native_layer_norm(x, [8, D], None, None, EPS)
    return aten.mm(y.view(-1, D), product), *fxp.bfp_compress(x, "bfp4b32", [0, 1, 2])


LEFT = {
    "an output that no kernel but Inductor's reads": read_by_loops_alone,
    "a norm over two dimensions": two_dimensions,
    "tiles of rows": block(text="bfp4b4x8"),
    "blocks that rows share": block(text="bfp4b128"),
}


@pytest.mark.parametrize("function", LEFT.values(), ids=LEFT)
def test_left_as_it_is(function):
    module = graph_of(function, inputs(), decomposed=False)
    before = str(module.graph)
    assert not fused(module)
    assert str(module.graph) == before


def test_weights_of_another_dtype_are_left():
    given = inputs(torch.bfloat16)
    given[2:4] = WEIGHTS
    module = graph_of(block("rms", "input"), given, decomposed=True)
    assert not [n for n in fused(module) if n.args[2] is not None]


def test_on_the_cpu_nothing_changes():
    module = graph_of(block(), inputs(), decomposed=False, gpu=False)
    before = str(module.graph)
    assert not fused(module)
    assert str(module.graph) == before


@pytest.mark.parametrize("mask", [False, True])
def test_inductor_inlines_one_kernel_for_all(mask):
    module = graph_of(block("layer", "both"), inputs(torch.bfloat16, mask), decomposed=True)
    assert len(fused(module)) == 1
    source = generated(module, **with_inlined_kernels())
    before, kernel, *after = kernel_calls(source)
    assert (before, kernel) == ("extern_kernels.mm", "norm_kernel_0.run")
    assert "extern_kernels.mm" in after
    assert "torch.ops.fxpipe" not in source


def test_a_batch_of_any_size():
    """Traced once, and no size is guarded."""
    env = ShapeEnv()
    any_batch = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=env)
    given = [mode.from_tensor(t, symbolic_context=any_batch) for t in ROWS]
    with mode:
        x, residual = (torch.empty_like(t, device="cuda") for t in (given[0], given[0]))
        made = make_fx(lambda *inputs: on_gpu(inputs, "bfp4b32", None, None, None, 1.0, "rms", EPS, "both"))(
            x, residual
        )
    assert len([n for n in made.graph.nodes if "triton" in str(n.target)]) == 1
    assert not env.guards
    assert isinstance(made.graph.output_node().args[0][0].meta["val"].shape[0], torch.SymInt)


def test_what_the_kernel_writes():
    module = graph_of(block("rms", "input"), inputs(torch.bfloat16), decomposed=True)
    fused(module)
    (call,) = calls(inlined(module))
    assert call.kwargs["tensors_to_clone"] == ["sum_ptr", "y_ptr", "rstd_ptr", "code32_ptr", "scale_ptr"]


@pytest.mark.parametrize("has", [(), ("residual", "weight"), ("residual", "mask", "weight", "bias")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_operator_by_definition(norm, has):
    given = norm_inputs((3, 5, D), torch.bfloat16, has)
    values = [given[name] for name in ("x", "residual") if name in given]
    parameters = (given.get("weight"), given.get("bias"), given.get("mask"), given.get("kept", 1.0))
    arguments = (values, "bfp4b32", *parameters, norm, EPS, "both")
    check(fxp.norm_and_compress(*arguments), given, norm, "bfp4b32", "both")
    torch.library.opcheck(FUSED, arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({6: "batch"}, "unknown norm 'batch'; known: layer, rms"),
        ({8: "none"}, "unknown stored 'none'; known: input, output, both"),
        ({4: ROWS[0] > 0}, "a mask is for 16-bit values that a residual is added to; found 0 residuals"),
    ],
)
def test_arguments_that_cannot_be(changed, message):
    arguments = [[ROWS[0]], "bfp4b32", None, None, None, 1.0, "layer", EPS, "input"]
    for index, value in changed.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        fxp.norm_and_compress(*arguments)
