"""backward_facts: which saved values backward cannot take with an error, and which it can."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxpipe.saves.backward_facts import backward_facts

aten = torch.ops.aten
X = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.5
LSE = X[:, :1].clone()


def facts(function):
    """Facts about ``x`` (and ``s``, a value for each row) in a backward graph; the third placeholder is a gradient."""
    graph = make_fx(function, tracing_mode="fake")(X, LSE, X.clone()).graph
    placeholders = graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, ("x", "s", "g"), strict=True):
        node._rename(name)
    return backward_facts(graph, placeholders[:2])


def attention_backward(g, mask):
    q = g.view(1, 1, 8, 4).transpose(2, 3)
    out = aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    key = torch.cat([q, q], dim=2)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        q, q, key, key, out[0], out[1], 0.0, False, attn_mask=mask
    )[0]


EXPONENTIATED = {
    "softmax from scores": lambda x, s, g: g * (x - s).exp(),
    "scaled scores": lambda x, s, g: g * (x * 0.125 - s).exp(),
    "viewed and cast": lambda x, s, g: g * (x.view(4, 8).to(torch.float64) - s).exp(),
    "an attention's mask": lambda x, s, g: attention_backward(g, x.view(1, 1, 4, 8)),
    "less the maximum, then a sum": lambda x, s, g: g * ((x + 1.0) - s).exp() / 2.0,
}
NOT_EXPONENTIATED = {
    "a plain exponential": lambda x, s, g: g * x.exp(),
    "less a value of the same size": lambda x, s, g: g * (x - g).exp(),
    "not at all": lambda x, s, g: g * x,
}


@pytest.mark.parametrize("name", EXPONENTIATED)
def test_exponentiated(name):
    assert facts(EXPONENTIATED[name]).exponentiated == {"x"}


@pytest.mark.parametrize("name", NOT_EXPONENTIATED)
def test_not_exponentiated(name):
    assert facts(NOT_EXPONENTIATED[name]).exponentiated == set()


COMPARED = {
    "with a number": lambda x, s, g: torch.where(x > 0.5, g, 0.0),
    "with its maximum": lambda x, s, g: torch.where(x == x.amax(-1, keepdim=True), g, 0.0),
    "relu6": lambda x, s, g: aten.hardtanh_backward(g, x, 0.0, 6.0),
    "leaky relu": lambda x, s, g: aten.leaky_relu_backward(g, x, 0.01, False),
    "threshold": lambda x, s, g: aten.threshold_backward(g, x, 0.1),
    "a relu computed again": lambda x, s, g: aten.threshold_backward(g, (x * 2).relu(), 0),
    "a sum with zero": lambda x, s, g: torch.where(x + s <= 0, g, 0.0),
    "a view of a product": lambda x, s, g: torch.where((x @ x.t()).view(-1)[0] > 1, g, 0.0),
    "the sign of a sum": lambda x, s, g: g * (x - 1).sign(),
}


@pytest.mark.parametrize("name", COMPARED)
def test_compared(name):
    found = facts(COMPARED[name])
    assert "x" in found.compared
    assert found.compared_with_zero == set()


WITH_ZERO = {
    "relu": lambda x, s, g: aten.threshold_backward(g, x, 0),
    "relu, detached": lambda x, s, g: aten.threshold_backward(g, x.detach(), 0),
    "relu, written out": lambda x, s, g: torch.where(x <= 0, 0.0, g),
    "the sign": lambda x, s, g: g * x.sign(),
    "a copy": lambda x, s, g: torch.where(x.clone() == 0, 0.0, g),
}


@pytest.mark.parametrize("name", WITH_ZERO)
def test_compared_with_zero_only(name):
    found = facts(WITH_ZERO[name])
    assert found.compared_with_zero == {"x"}
    assert found.compared == set()


NOT_COMPARED = {
    "a gradient": lambda x, s, g: torch.where(g > 0, g, 0.0) * x,
    "what holds a gradient": lambda x, s, g: torch.where(g * x > 0, g, 0.0),
    "positions": lambda x, s, g: torch.where(torch.arange(8) > 3, x, 0.0) * g,
    "nothing": lambda x, s, g: g * x.relu() * (1 - x.tanh() ** 2),
}


@pytest.mark.parametrize("name", NOT_COMPARED)
def test_not_compared(name):
    found = facts(NOT_COMPARED[name])
    assert found.compared | found.compared_with_zero == set()


DIVIDED = {
    "quotient": lambda x, s, g: g / x,
    "square": lambda x, s, g: g / (x * x),
    "reciprocal": lambda x, s, g: g * x.reciprocal(),
    "root": lambda x, s, g: g * x.view(-1).rsqrt().view(4, 8),
    "negative power": lambda x, s, g: g * x**-2,
    "a scaled view": lambda x, s, g: g / (-2 * x.view(4, 8)),
    "a square root": lambda x, s, g: g / (2 * x.sqrt()),
    "a quotient of quotients": lambda x, s, g: g / (x / 2.0),
}
NOT_DIVIDED = {
    "kept off zero": lambda x, s, g: g / (1 + x * x),
    "numerator": lambda x, s, g: x / g,
    "power": lambda x, s, g: g * x**2,
    "by a number": lambda x, s, g: g * (x / 8.0),
    "by a sum over it": lambda x, s, g: g / x.sum(),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_by(name):
    assert facts(DIVIDED[name]).divided == {"x"}


@pytest.mark.parametrize("name", NOT_DIVIDED)
def test_not_divided_by(name):
    assert facts(NOT_DIVIDED[name]).divided == set()


def test_facts_are_of_what_was_saved_only():
    found = facts(lambda x, s, g: x / g + x / s)
    assert found.divided == {"s"}
