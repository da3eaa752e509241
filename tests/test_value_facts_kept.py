"""value_facts: what makes a value stay as it is: statistics, infinities, log-softmax; across stages too."""

import pytest
import torch
import torch.nn.functional as F
from graphs import X, graph_of, result

from fxpipe.saves.value_facts import holds_infinities, is_log_softmax, is_statistic

aten = torch.ops.aten
INF = float("inf")
WEIGHT = torch.ones(8)
Q = X.reshape(1, 1, 4, 8)

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
