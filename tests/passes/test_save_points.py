"""choose-save-points: what is compressed, what never is, and the reason that is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpipe.errors import FormatError, OptionError, VerifyError
from fxpipe.ir.compression import CompressionPlan, SavePoint
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.pass_manager import Pipeline
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.compress import ChooseSavePoints
from fxpipe.passes.lower import LowerStages
from fxpipe.passes.partition import PartitionStages
from fxpipe.passes.split import SplitStages
from fxpipe.pipeline import Options, default_pipeline
from fxpipe.trace import trace

INF = float("inf")
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
MASK = torch.full((16, 16), -INF).triu(1)
LABELS = torch.arange(16)


class Function(nn.Module):
    """A function over a linear layer that takes gradients, and inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(64, 64)

    def forward(self, *args):
        return self.function(self.layer, *args)


def plan(function, *args, model=None, n_ranks=1, **options):
    """The save points of a function of a layer and ``X``, however small."""
    options = {"format": "bfp4b32", "min_bytes": 0, "partitioner": "default", "n_ranks": n_ranks, **options}
    program = trace(model or Function(function), args or (X,))
    return default_pipeline(Options(**options)).run(program).fact(CompressionPlan).save_points


def of(points, operator):
    """The points of values that this operator computed."""
    return [p for p in points if p.operator.removeprefix("aten.").removesuffix(".default") == operator]


def attention(layer, x, mask=None):
    q = layer(x).view(1, 16, 4, 16).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum()


def drop(layer, x):
    return (F.dropout(layer(x), 0.5) * 2).sin().sum()


def batch_norm(layer, x):
    return F.batch_norm(layer(x), torch.zeros(64), torch.ones(64), training=True).sin().sum()


KEPT = {  # function, inputs, operator, reason
    "indices of a max-pool": (
        lambda layer, x: F.max_pool1d(layer(x).tanh(), 2).sin().sum(), (), "max_pool2d_with_indices", "integer or bool",
    ),
    "mask of a dropout": (drop, (), "native_dropout", "integer or bool"),
    "random integers": (
        lambda layer, x: (layer(x) * torch.randint(0, 9, (16, 64))).sum(), (), "randint.low", "integer or bool",
    ),
    "mask of a choice": (lambda layer, x: torch.where(x > 0, layer(x), 0.0).sum(), (), "gt.Scalar", "integer or bool"),
    "log-sum-exp": (lambda layer, x: layer(x).logsumexp(-1).sin().sum(), (), "logsumexp", "statistic"),
    "scores under it": (lambda layer, x: layer(x).logsumexp(-1).sum(), (), "addmm", "exponentiated in backward"),
    "deviation": (lambda layer, x: layer(x).std(-1).sin().sum(), (), "std.correction", "statistic"),
    "largest of a row": (lambda layer, x: layer(x).max(-1)[0].sin().sum(), (), "max.dim", "statistic"),
    "batch norm's": (batch_norm, (), "_native_batch_norm_legit_functional", "statistic"),
    "layer norm's": (lambda layer, x: F.layer_norm(layer(x), [64]).sum(), (), "native_layer_norm", "statistic"),
    "log-softmax": (lambda layer, x: F.cross_entropy(layer(x), LABELS), (), "_log_softmax", "log-softmax"),
    "mask of attention": (
        lambda layer, x, m: attention(layer, x, m + MASK), (X, X[:, :16]), "add.Tensor", "exponentiated in backward",
    ),
    "scores with infinities": (
        lambda layer, x: F.gelu(layer(x).masked_fill(x > 0, -INF)).sum(), (), "masked_fill.Scalar", "may hold infinities",
    ),
    "maximum without indices": (lambda layer, x: layer(x).amax(-1).sum(), (), "addmm", "compared in backward"),
    "relu6": (lambda layer, x: F.relu6(layer(x)).sin().sum(), (), "addmm", "compared in backward"),
    "leaky relu": (lambda layer, x: F.leaky_relu(layer(x)).sin().sum(), (), "addmm", "compared in backward"),
    "denominator": (lambda layer, x: (x / layer(x)).sum(), (), "addmm", "divided by in backward"),
    "logarithm": (lambda layer, x: layer(x).softmax(-1).log().sum(), (), "_softmax", "divided by in backward"),
    "four numbers": (lambda layer, x: F.linear(x[:1], layer.weight[:4]).sin().sum(), (), "mm", "no gain"),
    "a cast parameter": (
        lambda layer, x: F.linear(x.bfloat16(), layer.weight.bfloat16()).float().sum(),
        (), "_to_copy", "copy of a parameter or input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    function, args, operator, reason = KEPT[name]
    points = [p for p in of(plan(function, *args, exact_forms=False), operator) if p.reason == reason]
    assert {(p.decision, p.format) for p in points} == {("keep", "")}
    assert all(p.stored_bytes == p.raw_bytes for p in points)


COMPRESSED = {
    "linear": (lambda layer, x: layer(x).sin().sum(), "addmm", "bfp4b32", "floating activation"),
    "relu": (lambda layer, x: (layer(x).relu() * x).sum(), "relu", "bfp4b32+unsigned", "non-negative"),
    "softmax": (lambda layer, x: layer(x).softmax(-1).sin().sum(), "_softmax", "bfp4b32+unsigned", "non-negative"),
    "attention": (attention, "_scaled_dot_product_flash_attention_for_cpu", "bfp4b32", "floating activation"),
    "gelu": (lambda layer, x: layer(F.gelu(layer(x))).sum(), "gelu", "bfp4b32", "floating activation"),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed(name):
    function, operator, format, reason = COMPRESSED[name]
    model = Function(function)
    points = (
        default_pipeline(Options(format="bfp4b32", min_bytes=0, exact_forms=False, partitioner="min-cut"))
        .run(trace(model, (X,)))
        .fact(CompressionPlan)
        .save_points
    )
    (point,) = [p for p in points if operator in p.operator and len(p.shape) > 1 and p.reason != "statistic"]
    assert (point.decision, point.format, point.reason) == ("compress", format, reason)
    assert point.raw_bytes == 4 * torch.Size(point.shape).numel()
    assert point.stored_bytes == torch.Size(point.shape).numel() // 32 * 17


def test_parameters_and_inputs_are_not_listed():
    found = plan(lambda layer, x, y: (layer(layer(x)) * y).sum(), X, X)
    assert [p.operator for p in found] == ["aten.addmm.default"]


def test_another_dtype():
    (found,) = plan(None, X.double(), model=Function(lambda layer, x: layer(x).sin().sum()).double())
    assert found.reason == "dtype without a format"
    for dtype in (torch.bfloat16, torch.float16):
        (found,) = plan(None, X.to(dtype), model=Function(lambda layer, x: layer(x).sin().sum()).to(dtype))
        assert (found.format, found.dtype) == ("bfp4b32", str(dtype).removeprefix("torch."))


def test_small_values_and_no_format():
    def function(layer, x):
        return layer(x).sin().sum()

    assert plan(function, min_bytes=4096)[0].reason == "floating activation"
    assert plan(function, min_bytes=4097)[0].reason == "small"
    assert plan(function, format=None)[0].reason == "no format asked"


def test_what_is_also_returned_is_kept():
    program = trace(Function(lambda layer, x: ((y := layer(x)).sin().sum(), y.tanh(), (y * 2).relu().t())), (X,))
    steps = (AnnotateCosts(), PartitionStages(), SplitStages(), LowerStages("default"), ChooseSavePoints("bfp4b32", 0))
    done = Pipeline(steps).run(program)
    points = {p.operator: p.reason for p in done.fact(CompressionPlan).save_points}
    assert points["aten.addmm.default"] == "floating activation"
    model = Function(lambda layer, x: ((y := layer(x).tanh()).sum(), y))
    done = Pipeline(steps).run(trace(model, (X,)))
    points = {p.operator: p.reason for p in done.fact(CompressionPlan).save_points}
    assert points == {"aten.tanh.default": "also returned"}


def test_what_goes_to_the_next_stage_is_not_kept():
    """The next stage compresses what it was given; this one drops what it has sent."""
    program = default_pipeline(Options(n_ranks=2, format="bfp4b32", min_bytes=0)).run(
        trace(Function(lambda layer, x: layer(layer(x).tanh()).tanh().sum()), (X,))
    )
    points = program.fact(CompressionPlan).save_points
    assert {p.reason for p in points} == {"floating activation"}
    assert [p.stage_index for p in points if p.operator == "placeholder"] == [1]


class Masked(nn.Module):
    """Attention whose mask depends on a value that is computed, so that it is sent from stage to stage."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)

    def forward(self, x):
        y = self.first(x)
        with torch.no_grad():
            mask = torch.where(y[:, :16] > 0, 0.0, -INF).masked_fill(torch.eye(16, dtype=torch.bool), 0.0)
        for _ in range(3):
            q = self.second(y).view(1, 16, 2, 32).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).reshape(16, 64)
        return y.sum()


def test_a_mask_from_another_stage_is_known_to_hold_infinities():
    options = Options(n_ranks=3, format="bfp4b32", min_bytes=0, exact_forms=False)
    program = default_pipeline(options).run(trace(Masked(), (X,)))
    masks = [p for p in program.fact(CompressionPlan).save_points if p.shape[-2:] == (16, 16)]
    received = [p for p in masks if p.operator == "placeholder"]
    assert {p.stage_index for p in received} == {1, 2}
    assert {p.reason for p in masks} == {"may hold infinities"}
    assert len(program.fact(LoweredStages).stages[2].received) == 2


def test_a_part_of_a_storage_counts_as_all_of_it():
    model = Function(lambda layer, x: (layer(x)[:2] * x[:2]).sin().sum())
    done = default_pipeline(Options(partitioner="default")).run(trace(model, (X,)))
    points = {p.shape: p.raw_bytes for p in done.fact(CompressionPlan).save_points}
    assert points == {(2, 64): 4 * 2 * 64}  # the product: the slice itself is not saved
    model = Function(lambda layer, x: layer(x)[:2].sin().sum())
    done = default_pipeline(Options(partitioner="default")).run(trace(model, (X,)))
    points = {p.shape: p.raw_bytes for p in done.fact(CompressionPlan).save_points}
    assert points == {(2, 64): 4 * 16 * 64}


def test_wrong_options():
    with pytest.raises(FormatError, match="bfp4"):
        ChooseSavePoints(format="bfp4")
    with pytest.raises(OptionError, match="min_bytes is -1; expected at least 0"):
        ChooseSavePoints(min_bytes=-1)


def test_records_check_themselves():
    point = SavePoint(0, "x", "aten.relu.default", "float32", (4,), 16, 16, "keep", "", "small")
    with pytest.raises(VerifyError, match="unknown save point decision 'drop'; known: compress, keep, pack, recompute"):
        SavePoint(**{**vars(point), "decision": "drop"})
    for decision, format in (("keep", "bfp4b32"), ("compress", "")):
        with pytest.raises(VerifyError, match=f"save point x: decision '{decision}' with format '{format}'"):
            SavePoint(**{**vars(point), "decision": decision, "format": format})
    found = CompressionPlan((point, SavePoint(**{**vars(point), "stage_index": 1, "stored_bytes": 4})))
    assert (found.raw_bytes, found.stored_bytes) == (32, 20)
    assert found.of_stage(1) == found.save_points[1:]
