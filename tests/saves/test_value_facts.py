"""value_facts: what is proved non-negative, what shows which storage; for each rule a graph, and one that proves nothing."""

import pytest
import torch
import torch.nn.functional as F
from graphs import X, result

from fxpipe.saves.value_facts import (
    holds_infinities,
    is_floating,
    is_non_negative,
    is_statistic,
    original_of,
    storage_of,
    view_source,
)

aten = torch.ops.aten
INF = float("inf")
IMAGE = X.reshape(1, 2, 4, 4)
WEIGHT = torch.ones(8)
Q = X.reshape(1, 1, 4, 8)


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
