"""model_digest: every change that a plan depends on shows, in the aspect that it belongs to, and nothing else does."""

import subprocess
import sys

import pytest
import torch
from models import MODELS
from stages import small
from torch import nn

from fxpipe.plans.model_digest import model_digest


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.1)
        self.scale = 2.0

    def forward(self, x):
        return self.drop(self.norm(self.layer(x))) * self.scale


def changed(change):
    """The aspects that differ after a change to a block."""
    block, same = Block(), Block()
    before = model_digest(block)
    assert model_digest(same) == before
    change(block)
    after = model_digest(block)
    assert set(after) == {"structure", "parameters", "buffers", "code"}
    return {aspect for aspect in after if after[aspect] != before[aspect]}


def replace_layer(block):
    block.layer = nn.Linear(4, 4, bias=False)


def tie(block):
    block.other.weight = block.layer.weight


def grow(block):
    block.layer.weight = nn.Parameter(torch.zeros(4, 5))


def other_class(block):
    class Block(nn.Module):
        forward = lambda self, x: x  # noqa: E731

    block.__class__ = Block


CHANGES = [
    (lambda b: b.eval(), {"structure"}),
    (lambda b: setattr(b.drop, "p", 0.5), {"structure"}),
    (lambda b: setattr(b.norm, "momentum", 0.5), {"structure"}),
    (lambda b: setattr(b, "scale", 3.0), {"structure"}),
    (lambda b: b.add_module("more", nn.ReLU()), {"structure", "code"}),
    (replace_layer, {"structure", "parameters"}),
    (tie, {"parameters"}),
    (grow, {"parameters"}),
    (lambda b: b.layer.requires_grad_(False), {"parameters"}),
    (lambda b: b.layer.double(), {"parameters"}),
    (lambda b: b.register_buffer("mask", torch.zeros(2)), {"buffers"}),
    (lambda b: b.norm.running_mean.resize_(5), {"buffers"}),
    (other_class, {"structure", "code"}),
]


@pytest.mark.parametrize(("change", "aspects"), CHANGES)
def test_a_change_shows(change, aspects):
    assert changed(change) == aspects


def train(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(8, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [train, lambda b: b.layer.weight.data.zero_(), lambda b: setattr(b, "_cache", 5)])
def test_values_are_no_change(change):
    assert changed(change) == set()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_has_the_same_digest(name):
    assert model_digest(small(name)[0]) == model_digest(small(name)[0])


def test_models_differ():
    assert len({model_digest(small(name)[0])["structure"] for name in MODELS}) == len(MODELS)


def test_a_class_without_source():
    scope = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x", scope)
    assert len(model_digest(scope["Typed"]())["code"]) == 16


def test_another_process_finds_the_same():
    imports = "from fxpipe.demos import demo; from fxpipe.plans.model_digest import model_digest"
    code = f"{imports}; print(model_digest(demo('gpt')()[0]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    from fxpipe.demos import demo

    assert run.stdout.strip() == str(model_digest(demo("gpt")()[0]))
