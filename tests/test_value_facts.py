"""value_facts: what a forward graph proves, one small graph for each rule, and its neighbour that proves nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fxpipe.value_facts import (
    holds_infinities,
    is_floating,
    is_log_softmax,
    is_non_negative,
    is_statistic,
    original_of,
    storage_of,
    view_source,
)

aten = torch.ops.aten
INF = float("inf")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IMAGE = X.reshape(1, 2, 4, 4)
WEIGHT = torch.ones(8)
Q = X.reshape(1, 1, 4, 8)


def graph_of(function, *inputs):
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs).graph


def result(function, *inputs):
    """The node that a function of ``X`` (or of these inputs) returns."""
    (value,) = graph_of(lambda *given: (function(*given),), *(inputs or (X,))).output_node().args[0]
    return value


NON_NEGATIVE = {
    "relu": torch.relu,
    "relu of anything": lambda x: (x - 5).relu(),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "safe softmax": lambda x: aten._safe_softmax(x, -1),
    "exp": torch.exp,
    "abs": torch.abs,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "fourth power": lambda x: x**4,
    "cube of relu": lambda x: x.relu() ** 3,
    "scaled and shifted by scalars": lambda x: aten.add.Scalar(aten.mul.Scalar(x.relu(), 2.0), 1.0),
    "itself times itself": lambda x: (y := x + 1) * y,
    "clamped from 0": lambda x: aten.clamp(x, 0, 6),
    "clamped from above 0": lambda x: aten.clamp_min(x, 0.5),
    "relu6": F.relu6,
    "sum of two": lambda x: x.relu() + x.exp(),
    "and a number": lambda x: x.relu() + 1e-6,
    "product of two": lambda x: x.relu() * x.sigmoid(),
    "quotient": lambda x: x.relu() / (x.exp() + 1),
    "the larger": lambda x: torch.maximum(x.relu(), x.exp()),
    "times a mask": lambda x: x.relu() * (x > 1),
    "chosen": lambda x: torch.where(x > 1, x.relu(), torch.zeros_like(x)),
    "filled with zeros": lambda x: x.relu().masked_fill(x > 1, 0.0),
    "sum with a constant": lambda x: x.relu() + torch.full_like(x, 2.0),
    "max-pool of relu": lambda x: F.max_pool2d(x.relu(), 2),
    "average pool of relu": lambda x: F.avg_pool2d(x.relu(), 2),
    "adaptive pool of relu": lambda x: F.adaptive_avg_pool2d(x.relu(), 2),
    "nearest of relu": lambda x: F.interpolate(x.relu(), scale_factor=2.0, mode="nearest"),
    "dropout of relu": lambda x: aten.native_dropout(x.relu(), 0.5, True)[0],
    "mean of relu": lambda x: x.relu().mean(1),
    "sum of relu": lambda x: x.relu().sum(1),
    "largest of relu": lambda x: x.relu().amax(1),
    "root of relu": lambda x: x.relu().sqrt(),
    "copy of relu": lambda x: x.relu().clone(),
    "cast of relu": lambda x: x.relu().to(torch.bfloat16),
    "view of relu": lambda x: x.relu().flatten(),
    "view of a view of relu": lambda x: x.relu().transpose(0, 1)[1:],
    "part of relu": lambda x: x.relu().split(1, dim=1)[1],
}
IMAGES = {name for name in NON_NEGATIVE if "pool" in name or "nearest" in name}


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_proved_non_negative(name):
    given = IMAGE if name in IMAGES else X
    assert is_non_negative(result(NON_NEGATIVE[name], given))
    assert (NON_NEGATIVE[name](given) >= 0).sum() + NON_NEGATIVE[name](given).isnan().sum() > 0


SIGNED = {
    "an input": lambda x: x,
    "linear": lambda x: x @ x.t(),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu less something": lambda x: x.relu() - 1,
    "relu and a negative number": lambda x: x.relu() + -1.0,
    "relu times a negative number": lambda x: x.relu() * -2,
    "relu less relu, written as a sum": lambda x: torch.add(x.relu(), x.exp(), alpha=-1),
    "one signed summand": lambda x: x.relu() + x,
    "one signed factor": lambda x: x.relu() * x,
    "cube": lambda x: x**3,
    "a broken power": lambda x: x**2.5,
    "negative scalar": lambda x: aten.mul.Scalar(x.relu(), -2.0),
    "clamped from below 0": lambda x: aten.clamp(x, -1, 6),
    "clamped from above only": lambda x: aten.clamp(x, None, 6),
    "leaky relu": F.leaky_relu,
    "chosen from a signed one": lambda x: torch.where(x > 1, x.relu(), x),
    "filled with a negative number": lambda x: x.relu() * torch.full_like(x, -1.0),
    "max-pool": lambda x: F.max_pool2d(x, 2),
    "dropout": lambda x: aten.native_dropout(x, 0.5, True)[0],
    "mean": lambda x: x.mean(1),
    "view": lambda x: x.flatten(),
    "negated relu": lambda x: -x.relu(),
    "relu and a signed value with zeros filled in": lambda x: x.relu() + x.masked_fill(x > 1, 0.0),
    "relu with a negative number filled in": lambda x: x.relu().masked_fill(x > 1, -1.0),
    "log of relu": lambda x: x.relu().log(),
}


@pytest.mark.parametrize("name", SIGNED)
def test_not_proved_non_negative(name):
    assert not is_non_negative(result(SIGNED[name], IMAGE if name == "max-pool" else X))


def test_only_the_values_of_a_dropout_are_non_negative_not_its_mask():
    mask = result(lambda x: aten.native_dropout(x.relu(), 0.5, True)[1])
    assert not is_non_negative(mask)
    assert not is_floating(mask)


STATISTICS = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum of all": torch.sum,
    "variance": lambda x: x.var(-1),
    "standard deviation": lambda x: x.std(-1),
    "both": lambda x: torch.var_mean(x, dim=-1)[1],
    "log-sum-exp": lambda x: x.logsumexp(-1),
    "maximum": lambda x: x.max(-1)[0],
    "minimum": lambda x: x.min(-1)[0],
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "reciprocal deviation": lambda x: torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    "of two": lambda x: x.mean(-1) / x.std(-1),
    "view": lambda x: x.mean(-1).unsqueeze(-1),
    "cast": lambda x: x.mean(-1).to(torch.float64),
    "layer norm's mean": lambda x: aten.native_layer_norm(x, [8], WEIGHT, WEIGHT, 1e-5)[1],
    "layer norm's rstd": lambda x: aten.native_layer_norm(x, [8], WEIGHT, WEIGHT, 1e-5)[2],
    "attention's log-sum-exp": lambda x: aten._scaled_dot_product_flash_attention_for_cpu(Q, Q, Q)[1],
    "loss": lambda x: aten.nll_loss_forward(x, torch.zeros(4, dtype=torch.int64), None, 1, -100)[0],
}
NO_STATISTICS = {
    "an input": lambda x: x,
    "product": lambda x: x @ x.t(),
    "relu": torch.relu,
    "normalised": lambda x: x - x.mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "layer norm's output": lambda x: aten.native_layer_norm(x, [8], WEIGHT, WEIGHT, 1e-5)[0],
    "attention's output": lambda x: aten._scaled_dot_product_flash_attention_for_cpu(Q, Q, Q)[0],
    "constant": lambda x: torch.ones(4) * 2,
    "part of a value": lambda x: x.split(2)[1],
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic(name):
    assert is_statistic(result(STATISTICS[name]))


@pytest.mark.parametrize("name", NO_STATISTICS)
def test_no_statistic(name):
    assert not is_statistic(result(NO_STATISTICS[name]))


WITH_INFINITIES = {
    "masked scores": lambda x: x.masked_fill(x > 0, -INF),
    "a mask": lambda x: torch.where(x > 0, 0.0, -INF),
    "least finite value": lambda x: torch.where(x > 0, x, torch.finfo(torch.float32).min),
    "of float16": lambda x: x.masked_fill(x > 0, -65504.0),
    "a triangle": lambda x: x + torch.full((8, 8), -INF).triu(1)[:4],
    "padded": lambda x: F.pad(x, (1, 1), value=-INF),
    "written": lambda x: x.scatter(0, torch.zeros(1, 8, dtype=torch.int64), -INF).flip(0),
    "looked up": lambda x: torch.full((8, 8), -INF)[torch.zeros(4, dtype=torch.int64)] + x,
    "added": lambda x: x + torch.full_like(x, -INF).triu(),
    "one less the mask, times much": lambda x: (1.0 - (x > 0).to(x.dtype)) * -3.4e38,
    "negated": lambda x: -((x > 0).to(x.dtype) * 1e9),
    "viewed": lambda x: x.masked_fill(x > 0, -INF).view(8, 4).t(),
    "scaled and shifted": lambda x: x.masked_fill(x > 0, -INF) * 0.5 + 1.0,
    "joined": lambda x: torch.cat([x, x.masked_fill(x > 0, -INF)]),
    "cast": lambda x: x.masked_fill(x > 0, -INF).to(torch.bfloat16),
    "the smaller": lambda x: torch.minimum(x, torch.full((8,), -INF)),
}
FINITE = {
    "an input": lambda x: x,
    "softmax of masked scores": lambda x: x.masked_fill(x > 0, -INF).softmax(-1),
    "product after it": lambda x: x.masked_fill(x > 0, -INF).softmax(-1) @ x.t(),
    "filled with zeros": lambda x: x.masked_fill(x > 0, 0.0),
    "tanh of it": lambda x: x.masked_fill(x > 0, -INF).tanh(),
    "a small literal": lambda x: x * 1000 + 9999.0,
    "an integer mask": lambda x: x * ((x > 0).to(torch.int64) * 100000 > 5),
}


@pytest.mark.parametrize("name", WITH_INFINITIES)
def test_may_hold_infinities(name):
    assert holds_infinities(result(WITH_INFINITIES[name]))


@pytest.mark.parametrize("name", FINITE)
def test_holds_none(name):
    assert not holds_infinities(result(FINITE[name]))


def test_log_softmax_whole_or_written_out():
    def by_hand(x):
        shifted = x - x.amax(-1, keepdim=True)
        return shifted - shifted.exp().sum(-1, keepdim=True).log()

    for function in (by_hand, lambda x: x.log_softmax(-1), lambda x: x.log_softmax(-1).view(-1)):
        assert is_log_softmax(result(function))
        assert not is_log_softmax(result(lambda x, f=function: f(x).exp()))
    for function in (lambda x: x, lambda x: x - x.log(), lambda x: x - 1, lambda x: x.softmax(-1).log()):
        assert not is_log_softmax(result(function))


VIEWS = [
    lambda x: x.view(-1),
    lambda x: x.t(),
    lambda x: x[1:],
    lambda x: x[:, ::2],
    lambda x: x.unsqueeze(0).expand(3, 4, 8),
    lambda x: x.detach(),
    lambda x: x.split(2)[1],
    lambda x: x.unbind(0)[2],
    lambda x: x.diagonal(),
    lambda x: aten._unsafe_view(x, [32]),
    lambda x: x.as_strided([2], [1]),
]
COPIES = [
    torch.clone,
    torch.relu,
    lambda x: x.to(torch.float64),
    lambda x: x.t().contiguous(),
    lambda x: x.repeat(2, 1),
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_shows_its_source(view):
    node = result(lambda x: view(x.sin()).transpose(0, -1))
    assert storage_of(node).target is aten.sin.default
    assert view_source(storage_of(node)) is None


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_has_its_own_storage(copy):
    node = result(lambda x: copy(x.sin()))
    assert storage_of(node) is node
    assert view_source(node) is None


def test_outputs_of_an_operator_are_no_views_of_the_tuple():
    node = result(lambda x: x.max(-1)[0])
    assert storage_of(node) is node


def test_an_operator_that_writes_is_no_view():
    node = result(lambda x: aten.relu_(x.clone()))
    assert view_source(node) is None


def test_the_original_is_found_behind_copies_too():
    node = result(lambda x: x.sin().t().contiguous().to(torch.bfloat16).view(-1).clone())
    assert original_of(node).target is aten.sin.default
    assert original_of(original_of(node)) is original_of(node)


def test_facts_reach_across_stages():
    sent = result(lambda x: x.masked_fill(x > 0, -INF))
    mean = result(lambda x: x.mean(-1, keepdim=True))
    graph = graph_of(lambda mask, mean, x: (x + mask, mean * 2), X.clone(), X[:, :1].clone(), X)
    scores, doubled = graph.output_node().args[0]
    placeholders = graph.find_nodes(op="placeholder")
    received = dict(zip(placeholders, (sent, mean), strict=False))
    assert holds_infinities(scores, received)
    assert holds_infinities(placeholders[0], received)
    assert is_statistic(doubled, received)
    assert not holds_infinities(scores)
    assert not is_statistic(doubled)
    assert not is_statistic(scores, received)


def test_deep_networks():
    """As deep as no call stack is."""

    def residual(x):
        for _ in range(1200):
            x = x + x.relu()
        return x

    deep = result(lambda x: residual(x.relu()), X)
    assert is_non_negative(deep)
    assert not is_non_negative(result(residual))
    assert is_statistic(result(lambda x: residual(x.mean(-1))))
    assert not is_statistic(deep)
    assert not holds_infinities(deep)
