"""A plan run in one process, against eager PyTorch."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from models import MODELS, build
from runtime.eager import eager, grads_of, relative, small, small_without_dropout, unequal
from torch import nn
from torch.nn import functional as F

import fxpipe
from fxpipe.errors import InputError, RuntimeFailure
from fxpipe.passes.schedule_orders import order
from fxpipe.runtime.local import LocalPipe
from fxpipe.verify_schedule import verify_schedule

SEVERAL_USES = {"t5": ["shared.weight"]}  # a weight of three uses, whose gradients are added in another order


@pytest.mark.parametrize("n_stages", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_eager_computes_bit_for_bit(name, n_stages):
    model, args, kwargs = small(name)
    torch.manual_seed(1)
    loss, twin = eager(model, args, kwargs)
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": n_stages}).pipe()
    torch.manual_seed(1)
    found = pipe.step(*args, **kwargs)
    assert torch.equal(found, loss)
    assert not found.requires_grad
    assert set(unequal(grads_of(model), grads_of(twin))) <= set(SEVERAL_USES.get(name, ()))
    assert relative(grads_of(model), grads_of(twin)) < 1e-6
    assert unequal(dict(model.named_buffers()), dict(twin.named_buffers())) == []


@pytest.mark.parametrize("name", MODELS)
def test_microbatches_add_up_to_the_batch_in_every_order(name):
    model, args, kwargs = small_without_dropout(name)
    plan = fxpipe.compile(model, (args, kwargs), {"n_ranks": 4, "n_microbatches": 8})
    n_parts = 8 if name == "cnn" else 1  # BatchNorm sees one microbatch at a time
    loss, twin = eager(model, args, kwargs, n_parts)
    for kind in ("1f1b", "gpipe"):
        trained = copy.deepcopy(model)
        found = LocalPipe(replace(plan.spec(), schedule=order(kind, 4, 8)), trained).step(*args, **kwargs)
        assert relative({"loss": found}, {"loss": loss}) < 1e-5
        assert relative(grads_of(trained), grads_of(twin)) < 1e-5
        assert unequal(dict(trained.named_buffers()), dict(twin.named_buffers())) == []


def test_gradients_add_up_over_steps_and_an_optimizer_takes_them():
    model, args, kwargs = small("tied")
    twin = copy.deepcopy(model)
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2, "n_microbatches": 1}).pipe()
    ours = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for _ in range(3):
        for _ in range(2):
            pipe.step(*args, **kwargs)
            twin(*args, **kwargs).backward()
        assert unequal(grads_of(model), grads_of(twin)) == []
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert unequal(dict(model.named_parameters()), dict(twin.named_parameters())) == []


def test_pipe_names_each_parameter_once():
    model, args, kwargs = small("tied")
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2}).pipe()
    assert [n for n, _ in pipe.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [id(p) for p in pipe.parameters()] == [id(p) for p in model.parameters()]
    pipe.synchronize_model()


class Frozen(nn.Module):
    """One table at both ends, which is not trained, and a layer that is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return (self.layers(x @ self.table) @ self.table).square().mean()


def test_what_is_frozen_stays_without_a_gradient():
    model, x = Frozen(), torch.randn(4, 8)
    loss, twin = eager(model, (x,), {})
    pipe = fxpipe.compile(model, (x,), {"n_ranks": 2}).pipe()
    assert torch.equal(pipe.step(x), loss)
    assert model.table.grad is None
    assert unequal(grads_of(model), grads_of(twin)) == []


def test_a_loss_function_and_a_sum_over_the_batch():
    model, x, target = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 6), torch.randn(8, 3)

    def loss_fn(output, expected):
        return F.mse_loss(output, expected, reduction="sum")

    options = {"n_ranks": 2, "n_microbatches": 4, "loss_reduction": "sum"}
    pipe = fxpipe.compile(model, x, options, loss_fn=loss_fn, target=target).pipe()
    twin = copy.deepcopy(model)
    loss = loss_fn(twin(x), target)
    loss.backward()
    assert relative({"loss": pipe.step(x, target=target)}, {"loss": loss.detach()}) < 1e-6
    assert relative(grads_of(model), grads_of(twin)) < 1e-5


def test_no_more_is_in_flight_than_the_schedule_says():
    model, args, kwargs = small("mlp")
    plan = fxpipe.compile(model, (args, kwargs), {"n_ranks": 4, "n_microbatches": 8})
    for kind in ("1f1b", "gpipe"):
        schedule = order(kind, 4, 8)
        pipe = LocalPipe(replace(plan.spec(), schedule=schedule), model)
        pipe.step(*args, **kwargs)
        in_flight = verify_schedule(schedule).peak_in_flight_by_stage
        assert [r.peak_saved_bytes for r in pipe.runners] == [
            n * r.saved_bytes for n, r in zip(in_flight, pipe.runners, strict=True)
        ]
        assert {e.action for e in pipe.events} == {a for _, _, a in schedule.actions()}


@pytest.mark.parametrize("n_microbatches", [8, 32])
def test_what_a_stage_receives_lives_no_longer_than_its_backward(n_microbatches):
    model, args, kwargs = build("mlp", batch=32, n_layers=3)
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2, "n_microbatches": n_microbatches}).pipe()
    runner = pipe.runners[1]
    alive, most = weakref.WeakSet(), 0
    inner = runner.forward

    def forward(microbatch, received, inputs):
        nonlocal most
        alive.update(received)
        most = max(most, len(alive))
        return inner(microbatch, received, inputs)

    runner.forward = forward
    pipe.step(*args, **kwargs)
    assert most <= 2


def test_saved_bytes_leave_out_the_inputs_and_the_model():
    """Two linear layers and a ReLU, 4 x 6 floats each: the ReLU's result (96 bytes) is all that must be held."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(4, 6)
    pipe = fxpipe.compile(model, x, loss_fn=lambda y, _: y.sum()).pipe()
    pipe.step(x)
    assert pipe.runners[0].saved_bytes == 4 * 6 * 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # within Inductor
def test_compiled_stages_agree_with_eager():
    model, args, kwargs = build("cnn", batch=4, size=8, channels=4, n_blocks=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, twin = eager(model, args, kwargs)
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2, "stage_compiler": "inductor"}).pipe()
    assert relative({"loss": pipe.step(*args, **kwargs)}, {"loss": loss}) < 1e-5
    assert relative(grads_of(model), grads_of(twin)) < 1e-4
    assert (
        relative({n: b.float() for n, b in model.named_buffers()}, {n: b.float() for n, b in twin.named_buffers()})
        < 1e-5
    )


class Scaled(nn.Module):
    """Takes a nested input and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, scale, *, weight=None):
        loss = (self.layer(batch["x"]) - batch["y"][0]).square().mean() * scale
        return loss if weight is None else (loss * weight).mean()


@pytest.fixture(scope="module")
def nested_pipe():
    example = ({"x": torch.randn(4, 4), "y": [torch.randn(4, 4)]}, 0.5)
    return fxpipe.compile(Scaled(), example, {"n_microbatches": 2}).pipe()


def nested(x=None, y=None, scale=0.5):
    return {"x": torch.randn(4, 4) if x is None else x, "y": [torch.randn(4, 4)] if y is None else y}, scale


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            nested(x=torch.randn(6, 4)),
            {},
            r"input \"0\['x'\]\" has 6 rows; the plan was made for a batch of 4 in 2 micro",
        ),
        (nested(x=torch.randn(4, 5)), {}, r"\"0\['x'\]\" has torch.float32 \[2, 5\] in a microbatch; .* \[2, 4\]"),
        (nested(x=torch.randn(4, 4).double()), {}, r"has torch.float64 \[2, 4\] .* made for torch.float32 \[2, 4\]"),
        (nested(x=torch.tensor(1.0)), {}, "has no rows; the plan was made for a batch of 4"),
        (nested(x=3.0), {}, "is float; expected a tensor, as when traced"),
        (nested(scale=0.25), {}, "was the constant 0.5 when traced, now 0.25; compile again for it"),
        (nested(scale=torch.tensor(0.5)), {}, "was the constant 0.5 when traced, now tensor"),
        (nested(y=[torch.randn(4, 4)] * 2), {}, "nested differently from the traced ones"),
        (nested()[:1], {}, r"step takes 2 positional inputs and \[\] by keyword; found 1 positional"),
        (nested(), {"weight": torch.ones(4)}, r"unknown \['weight'\]"),
    ],
)
def test_inputs_that_do_not_fit(nested_pipe, args, kwargs, message):
    with pytest.raises(InputError, match=message):
        nested_pipe.step(*args, **kwargs)


def test_missing_keyword_and_a_batch_that_does_not_divide():
    model, args, kwargs = small("multi")
    pipe = fxpipe.compile(model, (args, kwargs)).pipe()
    with pytest.raises(InputError, match=r"missing \['right'\]"):
        pipe.step(left=kwargs["left"])
    with pytest.raises(InputError, match=r"3 microbatches do not divide the batch of 16.* or one of 1, 2, 4, 8, 16"):
        fxpipe.compile(model, (args, kwargs), {"n_microbatches": 3})


def test_a_layout_other_than_the_traced_one_is_taken():
    model, args, kwargs = small("unet")
    loss, _ = eager(model, args, kwargs)
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2}).pipe()
    image, target = args
    assert torch.equal(
        pipe.step(image.to(memory_format=torch.channels_last), target.transpose(2, 3).contiguous().mT), loss
    )


def test_an_error_says_in_which_action_it_happened():
    model, args, kwargs = small("mlp")
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2, "n_microbatches": 2}).pipe()
    with pytest.raises(
        RuntimeFailure, match=r"stage 1: backward of microbatch 0 before its forward; .* in flight: none"
    ) as e:
        pipe.runners[1].backward(0, [torch.ones(())])
    assert e.value.__notes__ == ["fxpipe: in 1B0, backward of microbatch 0 on stage 1"]
