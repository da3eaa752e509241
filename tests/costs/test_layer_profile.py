"""A traced program as a profile: against counts done by hand, and sums from the cost table."""

import pytest
import torch
from models import build
from torch import nn

from fxpipe.costs.layer_profile import layer_profile
from fxpipe.cuts.cut_rules import cut_rules
from fxpipe.ir.cost import CostTable
from fxpipe.passes.annotate import AnnotateCosts
from fxpipe.passes.canonicalize import Canonicalize
from fxpipe.passes.keep_loss import KeepLoss
from fxpipe.planner.partition import partition
from fxpipe.planner.profile import read_profile
from fxpipe.trace import trace

BATCH, WIDTH = 3, 8


def annotated(model, args=(), kwargs=None):
    program = trace(model, args, kwargs)
    for step in (KeepLoss(), Canonicalize(), AnnotateCosts(device="cpu")):
        program = step.run(program)
    return program, program.fact(CostTable)


def profiled(model, args=(), kwargs=None, bandwidth=1e5):
    program, costs = annotated(model, args, kwargs)
    return layer_profile(cut_rules(program, costs, bandwidth)), costs


class Skip(nn.Module):
    """A residual, BatchNorm with its counter, a write in place, a tied weight, a mask that is recomputed, a tuple."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        y = self.relu(self.norm(x))
        left, right = (x + y).chunk(2, dim=1)
        mask = torch.ones(x.shape[0], WIDTH, device=x.device).tril()
        return (self.last(torch.cat([right, left], 1)) * mask).sum()


def test_counts_by_hand():
    found, _ = profiled(Skip(), (torch.randn(BATCH, WIDTH),))
    value = 4 * BATCH * WIDTH
    rows = [(n["id"], n["name"], n["output_bytes"], n["parameter_bytes"]) for n in found["nodes"]]
    assert rows == [
        ("linear", "first", value, 4 * (WIDTH * WIDTH + WIDTH)),
        ("relu_", "relu", value, 4 * 2 * WIDTH),
        ("add", "add", value, 0),
        ("getitem_1", "getitem_1", value, 0),
        ("cat", "cat", value, 0),
        ("linear_1", "last", value, 0),
        ("mul", "mul", value, 0),
        ("sum_1", "sum_1", 4, 0),
    ]
    assert found["edges"] == [
        ["linear", "relu_"],
        ["linear", "add"],
        ["relu_", "add"],
        ["add", "getitem_1"],
        ["getitem_1", "cat"],
        ["cat", "linear_1"],
        ["linear_1", "mul"],
        ["mul", "sum_1"],
    ]


def test_what_is_dear_to_recompute_is_sent():
    found, _ = profiled(Skip(), (torch.randn(BATCH, WIDTH),), bandwidth=1e10)
    assert ["tril", "mul"] in found["edges"]


def test_a_layer_costs_what_its_nodes_cost():
    found, costs = profiled(Skip(), (torch.randn(BATCH, WIDTH),))
    norm = ("add_", "batch_norm", "relu_")
    for field in ("forward_seconds", "backward_seconds"):
        assert found["nodes"][1][field] == pytest.approx(sum(getattr(costs[n], field) for n in norm))


@pytest.mark.parametrize("name", ["mlp", "cnn", "unet", "tied", "gpt"])
def test_sums_and_plan(name):
    model, args, kwargs = build(name)
    found, costs = profiled(model, args, kwargs)
    for field in ("forward_seconds", "backward_seconds"):
        total = sum(getattr(costs[row], field) for row in costs)
        assert sum(n[field] for n in found["nodes"]) == pytest.approx(total, rel=1e-9)
    trained = {id(p): p.nbytes for p in model.parameters()}
    assert sum(n["parameter_bytes"] for n in found["nodes"]) == sum(trained.values())
    assert read_profile(found).to_dict()["edges"] == found["edges"]
    stages = partition(found, "2@10GB/s", n_stages=2).to_dict()["stages"]
    assert sum(len(stage["nodes"]) for stage in stages) == len(found["nodes"])
