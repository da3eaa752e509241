"""compress-save-points on single values: zeros of a ReLU, views, layouts, NaN and infinity, nothing at all."""

import pytest
import torch
import torch.nn.functional as F
from stages import SEED, constants_of, run_on
from torch import nn

from fxpipe.ir.compression import CompressionPlan, SavePoint
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.passes.compress import compress_halves
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.saves.value_facts import memory_order
from fxpipe.trace import trace
from fxpipe.triton_kernels import ops  # noqa: F401  (registers the operators)

COMPRESS = torch.ops.fxpipe.bfp_compress.default
INF = float("inf")


class Shifted(nn.Module):
    """``function(x + shift)`` with a parameter for every value, whose gradient is that of the value."""

    def __init__(self, x, function):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(x))
        self.function = function

    def forward(self, x):
        return self.function(x + self.shift)


def gradients(x, function, format="bfp4b32", partitioner="default", **options):
    """The gradient of every value of ``x``: as eager finds it, and from compressed values; and the program."""
    model = Shifted(x, function)
    torch.manual_seed(SEED)
    loss = model(x)
    loss.backward()
    expected, model.shift.grad = model.shift.grad, None
    traced = trace(model, (x,))
    options = {"format": format, "min_bytes": 0, "partitioner": partitioner, **options}
    program = default_pipeline(Options(**options)).run(traced)
    found, _ = run_on(model, program, [x], constants_of(traced, model))
    assert torch.equal(found.loss, loss.detach()) or not loss.isfinite()
    return expected, found.grads["shift"], program


def wide(*shape):
    """Values of all magnitudes side by side: a block's largest says nothing of its smallest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-30, 4, shape, generator=generator)
    x[..., ::7] = 0.0
    return x


WEIGHT = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def through_relu(x):
    return (x.relu() * WEIGHT).sum()


RELUS = {
    "relu": through_relu,
    "relu in place": lambda x: (F.relu(x.clone(), inplace=True) * WEIGHT).sum(),
    "relu, then something that needs it": lambda x: (x.relu().square() * WEIGHT).sum(),
    "relu beside another user": lambda x: (x.relu() * WEIGHT).sum() + x.tanh().detach().sum(),
    "relu of a relu": lambda x: ((x.relu() - 1e-3).relu() * WEIGHT).sum(),
    "relu of a view": lambda x: (x.view(64, 8).t().relu() * WEIGHT.view(8, 64)).sum(),
    "relu6": lambda x: (F.relu6(x) * WEIGHT).sum(),
    "dropout's zeros too": lambda x: (F.dropout(x.relu(), 0.5).square() * WEIGHT).sum(),
    "max-pool": lambda x: (F.max_pool1d(x.relu(), 2).square() * WEIGHT[:, ::2]).sum(),
}


@pytest.mark.parametrize("exact_forms", [False, True])
@pytest.mark.parametrize("format", ["bfp2b128", "bfp4b32", "bfp8b8"])
@pytest.mark.parametrize("partitioner", ["default", "min-cut"])
@pytest.mark.parametrize("name", RELUS)
def test_zeros_of_a_relu_stay_exactly_its_zeros(name, partitioner, format, exact_forms):
    expected, found, _ = gradients(wide(8, 64), RELUS[name], format, partitioner, exact_forms=exact_forms)
    zeros = expected == 0
    assert 50 < zeros.sum() < 500
    assert torch.equal(found == 0, zeros)


def test_a_relu_is_compressed_and_still_exact():
    expected, found, program = gradients(wide(8, 64), through_relu, exact_forms=False)
    (point,) = program.fact(CompressionPlan).save_points
    assert (point.decision, point.format) == ("compress", "bfp4b32+unsigned")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("partitioner", ["default", "min-cut"])
@pytest.mark.parametrize(
    "kink", [F.leaky_relu, F.relu6, F.hardtanh, torch.abs, lambda x: x.clamp(-0.5, 0.5), lambda x: x.amax(1, True)]
)
def test_no_other_kink_is_taken_the_wrong_way(kink, partitioner):
    expected, found, _ = gradients(wide(8, 64), lambda x: (kink(x) * WEIGHT).sum(), partitioner=partitioner)
    assert torch.equal(found, expected)


VIEWS = {
    "two views": lambda x: (y := x * 2).view(64, 8).sin().sum() + (y.t() * WEIGHT.t()).cos().sum(),
    "a view of a view": lambda x: (y := (x * 2).t()).sin().sum() + y.reshape(-1)[:256].cos().sum() + y.t().tanh().sum(),
    "all of its parts": lambda x: sum(part.sin().sum() for part in (x * 2).chunk(4, dim=1)),
    "itself and a view": lambda x: (y := x * 2).sin().sum() + y.t().cos().sum(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_one_storage_seen_twice_is_compressed_once(name):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected, found, program = gradients(x, VIEWS[name])
    graph = program.fact(LoweredStages).stages[0].forward.graph_module.graph
    compressed = [n.args[0].name for n in graph.find_nodes(op="call_function", target=COMPRESS)]
    assert compressed.count("mul") == 1
    assert not any(n.startswith(("view", "t", "split", "getitem")) and n != "tanh" for n in compressed)
    assert (found - expected).norm() < 0.3 * expected.norm()


LAYOUTS = {
    "channels last": torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(64, 8).t(),
    "permuted": torch.randn(3, 5, 8, 4).permute(3, 1, 0, 2),
    "every second": torch.randn(16, 128)[::2, ::2],
    "expanded": torch.randn(8, 1).expand(8, 64),
    "one number": torch.randn(()),
    "one row": torch.randn(1, 77),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    torch.manual_seed(0)
    x = LAYOUTS[name]
    model = Shifted(x, lambda y: y.sin().sum())
    model.shift = nn.Parameter(
        torch.empty_strided(x.size(), x.stride()).zero_() if name != "expanded" else torch.zeros(8, 64)
    )
    program = default_pipeline(Options(partitioner="default")).run(trace(model, (x,)))
    stage = program.fact(LoweredStages).stages[0]
    forward, backward = stage.forward.graph_module, stage.backward.graph_module
    (saved,) = [n for n in forward.graph.output_node().args[0] if n.op == "call_function" and n.name != "sum_1"]
    point = SavePoint(0, saved.name, "", "float32", (), 1, 1, "compress", "bfp8b32", "")
    compress_halves(forward, backward, 1, [point])
    (node,) = forward.graph.find_nodes(op="call_function", target=COMPRESS)
    (back,) = backward.graph.find_nodes(op="call_function", target=torch.ops.fxpipe.bfp_decompress.default)
    assert node.args[2] == back.args[3] == memory_order(saved.meta["val"])
    with torch.no_grad():
        _, *planes = forward(*([model.shift, x] if stage.forward.inputs[0].kind == "parameter" else [x, model.shift]))
        decoded = torch.ops.fxpipe.bfp_decompress(planes, "bfp8b32", list(x.shape), node.args[2], torch.float32)
    assert decoded.stride() == back.meta["val"].stride()
    torch.testing.assert_close(decoded, x, rtol=0, atol=float(x.abs().max()) / 120)


def test_dense_layouts_are_stored_in_the_order_of_their_memory():
    assert memory_order(LAYOUTS["channels last"]) == [0, 2, 3, 1]
    assert memory_order(LAYOUTS["transposed"]) == [1, 0]
    assert memory_order(LAYOUTS["permuted"]) == [2, 1, 3, 0]
    assert memory_order(torch.zeros(2, 3, 4)) == [0, 1, 2]
    assert memory_order(torch.zeros(())) == []


def test_channels_last_in_a_network():
    conv = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    expected, found, _ = gradients(x, lambda y: conv(y).square().mean())
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize(
    "function", [lambda x: (x * 1.0).sin().sum(), lambda x: (x.relu() * x.relu()).sum(), lambda x: (x * x * x).sum()]
)
def test_what_is_not_finite_never_comes_back_finite(function, bad):
    x = torch.randn(8, 64)
    x[3, 40] = bad
    x[5, :] = bad
    expected, found, program = gradients(x, function)
    assert any(p.decision == "compress" for p in program.fact(CompressionPlan).save_points)
    lost = ~expected.isfinite()
    assert lost.sum() >= (0 if bad == -INF else 65)
    assert not found[lost].isfinite().any()


def test_a_block_with_a_nan_comes_back_as_nan_and_its_neighbours_do_not():
    x = torch.randn(4, 64)
    x[1, 40] = float("nan")
    _, found, _ = gradients(x, lambda y: (y * 1.0).sin().sum())
    nan = found.isnan()
    assert nan[1, 32:].all()
    assert nan.sum() == 32


def test_an_empty_tensor():
    x = torch.zeros(0, 64)
    expected, found, program = gradients(x, lambda y: (y * 2).sin().sum())
    assert found.shape == expected.shape == (0, 64)
    assert [p.reason for p in program.fact(CompressionPlan).save_points] == ["no gain"]
    model = Shifted(x, lambda y: y.sin().sum())
    program = default_pipeline(Options(partitioner="default")).run(trace(model, (x,)))
    stage = program.fact(LoweredStages).stages[0]
    forward, backward = stage.forward.graph_module, stage.backward.graph_module
    point = SavePoint(0, "add", "", "float32", (0, 64), 0, 0, "compress", "bfp4b32", "")
    compress_halves(forward, backward, 1, [point])
    with torch.no_grad():
        loss, *planes = forward(x, x)
        grads = backward(*planes, torch.ones(()))
    assert loss == 0.0
    assert {g.shape for g in grads if g is not None} == {(0, 64)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 64, dtype=dtype)
    for function in (lambda y: (y * 2).sin().sum(), lambda y: (y.relu() * y.relu()).sum()):
        expected, found, program = gradients(x, function, "bfp8b32")
        assert found.dtype == dtype
        assert any(p.decision == "compress" for p in program.fact(CompressionPlan).save_points)
        assert 0 < (found - expected).float().norm() < 0.05 * expected.float().norm()
