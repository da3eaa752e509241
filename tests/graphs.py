"""Small functional ATen graphs, for tests of what is read off a graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    """The graph of a function of these inputs, its shapes in ``meta["val"]``; tensors that it closes over are constants."""
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs).graph


def result(function: Callable[..., Any], *inputs: Tensor) -> fx.Node:
    """The node that a function of ``X`` (or of these inputs) returns."""
    (value,) = graph_of(lambda *given: (function(*given),), *(inputs or (X,))).output_node().args[0]
    assert isinstance(value, fx.Node)
    return value
