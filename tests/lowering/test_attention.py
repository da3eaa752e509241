"""Fused attention that backward computes again: exactly where nothing is compressed, consistently where something is."""

import operator

import pytest
import torch
import torch.fx as fx
from stages import compressed, eager, lowered, run
from torch import nn
from torch.nn import functional as F

from fxpipe.graph_module import returned
from fxpipe.lowering.attention import FUSED_ATTENTION, recompute_attention

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = FUSED_ATTENTION[FORWARD]
SHAPE = (2, 3, 8, 4)


class Attention(nn.Module):
    """Attention alone, with biases whose gradients say how well its backward fits together."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        heads = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(*heads, is_causal=True).square().sum()


def key_bias_gradient(partitioner):
    """The gradient of the bias of the keys, over that of the queries', after a step with 4 bits a value."""
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Attention(), torch.randn(4, 32, 64)
    options = {"format": "bfp4b32", "min_bytes": 0, "partitioner": partitioner}
    torch.compile(model, backend="fxpipe", options=options)(x).backward()
    queries, keys, _ = model.qkv.bias.grad.chunk(3)
    return (keys.norm() / queries.norm()).item()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_bias_of_all_keys_moves_no_probability():
    """It adds the same to all scores of a query, so its gradient is zero, whatever query, key and value are."""
    assert key_bias_gradient("recompute-attention") < 1e-5
    assert key_bias_gradient("min-bytes") > 1e-3


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_gradients_are_nearer_for_fewer_bytes(name):
    exact = eager(name).grads
    errors, saved = [], []
    for partitioner in ("recompute-attention", "min-bytes"):
        found, runners = run(name, compressed(name, "bfp4b32", 1, partitioner))
        squares = [(found.grads[n] - exact[n]).square().sum() for n in exact]
        errors.append(torch.stack(squares).sum())
        saved.append(sum(r.saved_bytes for r in runners))
    assert errors[0] < errors[1]
    assert saved[0] < saved[1]


def test_what_is_saved_without_attention_stays():
    fewer, all = (
        run("cnn", lowered("cnn", 1, name))[1][0].saved_bytes for name in ("recompute-attention", "min-bytes")
    )
    assert fewer == all


def halves(dropout):
    """A forward and a backward graph of nothing but attention, as a partitioner leaves them."""
    q, k, v, output = (torch.empty(SHAPE, device="meta") for _ in range(4))
    logsumexp = torch.empty(SHAPE[:-1], device="meta")

    def place(graph, name, value):
        node = graph.placeholder(name)
        node.meta["val"] = value
        return node

    forward = fx.Graph()
    inputs = [place(forward, name, value) for name, value in (("q", q), ("k", k), ("v", v))]
    attention = forward.call_function(FORWARD, (*inputs, dropout, True), {"scale": 0.5})
    attention.meta["val"] = (output, logsumexp)
    results = [forward.call_function(operator.getitem, (attention, i)) for i in (0, 1)]
    for node, value in zip(results, (output, logsumexp), strict=True):
        node.meta["val"] = value
    forward.output((results[0], *inputs, *results))
    backward = fx.Graph()
    taken = [place(backward, n.name, n.meta["val"]) for n in (*inputs, *results)]
    gradient = place(backward, "gradient", output)
    backward.output((backward.call_function(BACKWARD, (gradient, *taken, dropout, True), {"scale": 0.5}),))
    return forward, backward


def test_the_call_is_the_same_again():
    forward, backward = halves(0.0)
    recompute_attention(forward, backward, 1)
    assert [n.name for n in returned(forward)[1:]] == ["q", "k", "v"]
    (first,), (again,) = (graph.find_nodes(op="call_function", target=FORWARD) for graph in (forward, backward))
    calls = [n.normalized_arguments(nn.Module(), normalize_to_only_use_kwargs=True).kwargs for n in (first, again)]
    assert str(calls[0]) == str(calls[1])


def test_attention_that_drops_out_is_not_computed_again():
    forward, backward = halves(0.1)
    recompute_attention(forward, backward, 1)
    assert len(returned(forward)) == 6
    assert not backward.find_nodes(op="call_function", target=FORWARD)


@pytest.mark.parametrize(("forward", "backward"), FUSED_ATTENTION.items(), ids=str)
def test_backward_takes_all_tensors_that_forward_takes(forward, backward):
    tensors = {a.name for a in forward._schema.arguments if "Tensor" in str(a.type)}
    taken = {a.name for a in backward._schema.arguments}
    assert tensors | {"out", "logsumexp"} <= taken
    assert [str(r.type) for r in forward._schema.returns][:2] == ["Tensor", "Tensor"]
