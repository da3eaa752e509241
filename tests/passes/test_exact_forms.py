"""Exact forms through the whole pipeline: which value gets which, gradients equal to the bit, bytes as the plan says."""

import re

import pytest
import torch
import torch.nn.functional as F
from models import build
from stages import SEED, assert_same, constants_of, inputs_of, run_on, small, traced
from torch import nn

import fxpipe
from fxpipe.errors import FormatError
from fxpipe.ir.compression import CompressionPlan
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.saves.exact_forms import ExactForm
from fxpipe.trace import trace

INF = float("inf")


class Shifted(nn.Module):
    """``function(x + shift)`` with a parameter for every value, whose gradient is that of the value."""

    def __init__(self, shape, function, dtype=torch.float32):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.function = function

    def forward(self, x):
        return self.function(x + self.shift)


def step(function, x=None, partitioner="default", **options):
    """The save points of a step, and whether its gradient is that of eager to the bit; what has no exact form is kept."""
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)) if x is None else x
    model = Shifted(x.shape, function, x.dtype)
    torch.manual_seed(SEED)
    loss = model(x)
    loss.backward()
    expected, model.shift.grad = model.shift.grad, None
    program = trace(model, (x,))
    kept = default_pipeline(Options(partitioner=partitioner)).run(program).fact(CompressionPlan).save_points
    done = only_exact(program, partitioner=partitioner, **options)
    found, runners = run_on(model, done, [x], constants_of(program, model))
    points = done.fact(CompressionPlan).save_points
    assert len(points) == len(kept)
    assert runners[0].saved_bytes == sum(p.stored_bytes for p in points)
    assert torch.equal(found.loss, loss.detach())
    assert torch.equal(found.grads["shift"], expected)
    assert found.grads["shift"].dtype == expected.dtype
    return points


def only_exact(program, **options):
    """The program with every value kept that would lose something."""
    options = {"format": "bfp8b32", "min_bytes": 0, **options}
    points = default_pipeline(Options(**options)).run(program).fact(CompressionPlan).save_points
    lossy = {p.name for p in points if p.decision == "compress"}
    options["format"] = {**dict.fromkeys(sorted(lossy), "none"), "default": "bfp8b32"}
    return default_pipeline(Options(**options)).run(program)


def forms(points):
    return sorted(p.format for p in points if p.decision == "pack")


W = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1))
PACKED = {  # function, forms, reasons
    "dropout": (lambda y: F.dropout(y, 0.3).sum(), ["bits"], {"bool"}),
    "a choice": (lambda y: torch.where(y > 0.2, y, y * 3).sum(), ["bits"], {"bool"}),
    "a choice, channels last": (
        lambda y: torch.where((z := y.contiguous(memory_format=torch.channels_last)) > 0.2, z, z * 3).sum(), ["bits"], {"bool"},
    ),
    "max-pool": (lambda y: F.max_pool2d(y, 2).sum(), ["uint8"], {"between 0 and 35"}),
    "adaptive max-pool": (lambda y: F.adaptive_max_pool2d(y, 3).sum(), ["uint8"], {"between 0 and 35"}),
    "maximum": (lambda y: y.flatten(1).max(1)[0].sum(), ["int16"], {"between 0 and 287"}),
    "top": (lambda y: y.topk(3)[0].sum(), ["uint8"], {"between 0 and 5"}),
    "sorted": (lambda y: (y.sort(dim=1)[0] * W).sum(), ["uint8"], {"between 0 and 7"}),
    "argmax": (lambda y: y.gather(1, y.argmax(1, keepdim=True)).sum(), ["uint8"], {"between 0 and 7"}),
    "random numbers": (lambda y: y.gather(3, torch.randint(0, 6, (4, 8, 6, 6))).sum(), ["uint8"], {"between 0 and 5"}),
    "an index that was computed": (
        lambda y: F.embedding((W * 3).long().abs(), y.flatten(1).t()).sum(), ["int16"], {"between -288 and 287"},
    ),
    "relu": (lambda y: (y.relu() * W).sum(), ["signs"], {"backward needs its sign"}),
    "relu of a view": (lambda y: (y.flatten(1).t().relu() * W.flatten(1).t()).sum(), ["signs"], {"backward needs its sign"}),
    "relu under a max-pool": (
        lambda y: F.max_pool2d(y.relu(), 2).sum(), ["signs", "uint8"], {"backward needs its sign", "between 0 and 35"},
    ),
    "a mask": (
        lambda y: F.scaled_dot_product_attention(y, y, y, attn_mask=torch.where(W[..., :1] > 0, 0.0, -INF) + W).sum(),
        [], set(),
    ),
    "a mask of constants": (
        lambda y: F.scaled_dot_product_attention(y, y, y, attn_mask=torch.where(W > -1, 0.0, -INF)).sum(),
        ["either(-inf,0.0)"], {"one of two constants"},
    ),
    "a product with constants": (
        lambda y: (y * torch.zeros(4, 8, 6, 6).masked_fill(W > 0, 0.1).view(4, 8, 36).view(4, 8, 6, 6)).sum(),
        ["either(0.0,0.10000000149011612)"], {"one of two constants"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("partitioner", ["default", "min-cut"])
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, partitioner):
    function, expected, reasons = PACKED[name]
    points = step(function, partitioner=partitioner)
    if partitioner == "default":
        assert forms(points) == expected
        assert {p.reason for p in points if p.decision == "pack"} == reasons
    assert not forms(step(function, partitioner=partitioner, exact_forms=False))


KEPT = {
    "relu that the next layer takes": lambda y: (y.relu() ** 3).sum(),
    "leaky relu": lambda y: (F.leaky_relu(y) * W).sum(),
    "integers of no known range": lambda y: y.flatten().index_select(0, (W.flatten() * 3).long().abs()).sum(),
    "three constants": lambda y: (y * torch.where(W > 1, 0.5, torch.where(W > 0, 0.0, 1.0))).sum(),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    assert set(forms(step(KEPT[name]))) <= {"bits"}


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF, -0.0, 1e-45, -1e-45])
@pytest.mark.parametrize("name", ["relu", "dropout", "a choice", "max-pool"])
def test_values_that_are_not_plain(name, bad):
    """``nan`` passes a ReLU's gradient in torch."""
    x = torch.randn(4, 8, 6, 6)
    x[1, 3] = bad
    x[0, 0, 0, 0] = bad
    model, expected = Shifted(x.shape, PACKED[name][0]), None
    for options in (None, Options(format="bfp8b32", min_bytes=0)):
        model.shift.grad = None
        if options is None:
            torch.manual_seed(SEED)
            model(x).backward()
            expected = model.shift.grad
        else:
            program = trace(model, (x,))
            done = default_pipeline(options).run(program)
            found, _ = run_on(model, done, [x], constants_of(program, model))
            assert forms(done.fact(CompressionPlan).save_points)
            assert torch.equal(found.grads["shift"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x = torch.randn(4, 8, 6, 6).to(dtype)
    assert forms(step(lambda y: (y.relu() * W.to(dtype)).sum(), x)) == ["signs"]
    low = torch.tensor(-0.1, dtype=dtype)
    points = step(lambda y: (y * torch.where(W > 0, torch.full((), 0.0, dtype=dtype), -0.1)).sum(), x)
    assert forms(points) == [f"either({low.item()},0.0)"]


@pytest.mark.parametrize("name", ["cnn", "gpt", "llama", "bert", "vit", "t5"])
@pytest.mark.parametrize("partitioner", ["default", "min-cut"])
def test_models_learn_as_before_to_the_bit(name, partitioner):
    """With every value that would lose something kept: one step is eager's, gradients and buffers."""
    done = only_exact(traced(name), n_ranks=2, partitioner=partitioner)
    plain = default_pipeline(Options(n_ranks=2, partitioner=partitioner, min_bytes=0)).run(traced(name))
    steps = []
    for program in (plain, done):
        model, _, _ = small(name)
        steps.append(run_on(model, program, inputs_of(name), constants_of(traced(name), model))[0])
    assert_same(steps[1], steps[0])
    packed_now = [p for p in done.fact(CompressionPlan).save_points if p.decision == "pack"]
    assert packed_now or name == "vit"
    assert all(p.stored_bytes < p.raw_bytes for p in packed_now)


def test_copies_of_parameters_are_computed_again():
    """Under autocast backward takes bfloat16 copies of the weights; they need not be kept."""
    model, args, kwargs = build("llama", n_layers=1)

    def plan(**options):
        with torch.autocast("cpu", torch.bfloat16):
            return default_pipeline(Options(min_bytes=0, partitioner="min-cut", **options)).run(
                trace(model, args, kwargs)
            )

    done = plan(format="bfp8b32")
    points = done.fact(CompressionPlan).save_points
    again = [p for p in points if p.decision == "recompute"]
    shapes = {tuple(p.shape) for p in model.parameters()}
    assert len(again) >= 8
    assert all({p.shape, p.shape[::-1]} & shapes and p.dtype == "bfloat16" for p in again)
    assert {(p.stored_bytes, p.format, p.reason) for p in again} == {(0, "", "copy of a parameter")}

    def gradients(program):
        fresh, _, _ = build("llama", n_layers=1)
        tensors = (
            [kwargs[name] for name in program.signature.inputs]
            if set(program.signature.inputs) <= set(kwargs)
            else ([t for t in kwargs.values() if isinstance(t, torch.Tensor)])
        )
        return run_on(fresh, program, tensors, constants_of(program, fresh))

    lossy = [p.name for p in points if p.decision == "compress"]
    exact, _ = gradients(plan(format={**dict.fromkeys(lossy, "none"), "default": "bfp8b32"}))
    plain, _ = gradients(plan())
    assert_same(exact, plain)


class Twice(nn.Module):
    """A weight that backward takes as it is, and as two copies of another dtype."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        half = F.linear((x @ self.weight).bfloat16(), self.weight.bfloat16()).float()
        return ((half @ self.weight).double() @ self.weight.double()).sin().sum()


def test_a_parameter_that_is_saved_anyway_is_saved_once():
    model, x = Twice(), torch.randn(16, 64)
    loss = model(x)
    loss.backward()
    expected, model.weight.grad = model.weight.grad, None
    done = only_exact(trace(model, (x,)), partitioner="default")
    found, (runner,) = run_on(model, done, [x])
    assert torch.equal(found.grads["weight"], expected)
    points = done.fact(CompressionPlan).save_points
    assert sum(p.decision == "recompute" for p in points) == 2
    assert runner.saved_bytes == sum(p.stored_bytes for p in points)
    assert [str(b) for b in runner.graphs.forward.outputs].count("saved:primals_1") <= 1


def test_a_format_of_none_keeps_bools_too():
    points = step(lambda y: F.dropout(y, 0.3).sum())
    assert forms(points) == ["bits"]
    program = trace(Shifted((4, 8), lambda y: F.dropout(y, 0.3).sum()), (torch.randn(4, 8),))
    format = {"aten.native_dropout": "none", "default": "bfp8b32"}
    done = default_pipeline(Options(format=format, min_bytes=0, partitioner="default")).run(program)
    assert {(p.decision, p.reason) for p in done.fact(CompressionPlan).save_points} == {("keep", "integer or bool")}


def test_small_values_are_kept():
    program = trace(Shifted((4, 8), lambda y: F.dropout(y, 0.3).sum()), (torch.randn(4, 8),))
    for min_bytes, decision in ((32, "pack"), (33, "keep")):
        done = default_pipeline(Options(format="bfp8b32", min_bytes=min_bytes, partitioner="default")).run(program)
        assert {p.decision for p in done.fact(CompressionPlan).save_points} == {decision}


def test_a_plan_from_its_file_has_them(tmp_path):
    model, args, kwargs = build("gpt", n_layers=1, dropout=0.1)
    format = {"*.mlp.*": "bfp4b32", "default": "bfp8b32"}
    plan = fxpipe.compile(model, (args, kwargs), Options(n_ranks=2, format=format, min_bytes=0))
    plan.save(tmp_path / "plan")
    again = fxpipe.load(tmp_path / "plan", model)
    assert again.options.format == "*.mlp.*=bfp4b32,default=bfp8b32"
    assert again.compression == plan.compression
    assert {p.decision for p in again.compression.save_points} >= {"pack", "compress"}
    assert {p.format for p in again.compression.save_points} >= {"bits", "bfp4b32", "bfp8b32"}


@pytest.mark.parametrize("text", ["bits", "signs", "uint8", "int16", "int32", "either(-inf,0.0)", "either(0.0,1.5)"])
def test_text(text):
    assert str(ExactForm.parse(text)) == text


@pytest.mark.parametrize("text", ["", "bit", "int64", "either", "either(0.0)", "bits(0.0,1.0)", "uint8 "])
def test_text_of_no_form(text):
    message = f"unknown exact form {text!r}; known: bits, signs, uint8, int16, int32, either(LOW,HIGH)"
    with pytest.raises(FormatError, match=re.escape(message)):
        ExactForm.parse(text)


def test_bytes():
    assert [ExactForm.parse(t).stored_bytes(17) for t in ("bits", "signs", "uint8", "int16", "int32")] == [
        3,
        3,
        17,
        34,
        68,
    ]
