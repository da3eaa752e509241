"""Stages that run on several ranks: the cut for given replicas, and replicas that the planner chooses."""

import pytest
import torch
from passes.test_partition import Layers, X, cut, priced, traced
from torch import nn

from fxpipe.errors import OptionError, PartitionError
from fxpipe.passes.partition import PartitionStages


@pytest.mark.parametrize("text", ["2,0", "2,", "two", "-1,2"])
def test_replicas_that_are_no_numbers(text):
    expected = f"replicas are '{text}'; expected how many ranks each stage runs on, such as '2,1,1', or 'auto'"
    with pytest.raises(OptionError, match=expected):
        PartitionStages(replicas=text)


def test_replicas_share_the_work():
    program = priced(traced(Layers(), X))  # seconds: four layers of 3, a sum
    found = cut(program, n_stages=2, replicas="3,1", n_microbatches=6)
    assert (found.replicas, found.stages[0].nodes[-1]) == ((3, 1), "linear_3")
    assert found.bottleneck == "stage 0 compute"
    assert found.bottleneck_seconds == pytest.approx(4, rel=1e-6)
    assert found.lower_bound_seconds == pytest.approx(15 / 4)
    with pytest.raises(OptionError, match="replicas 3,1 are of 2 stages, not 3"):
        cut(program, n_stages=3, replicas="3,1")
    with pytest.raises(PartitionError, match="9 stages were asked for, but the program can be cut into"):
        cut(program, n_stages=None, replicas="2,1,1,1,1,1,1,1,1")


def test_the_planner_chooses_replicas():
    program = priced(traced(Layers(), X), linear_1=30.0)
    found = cut(program, n_stages=4, replicas="auto", n_microbatches=8)
    assert sum(found.replicas) == 4
    heavy = next(s for s in found.stages if "linear_1" in s.nodes)
    assert found.replicas[heavy.index] >= 2
    alone = cut(program, n_stages=4)
    assert found.bottleneck_seconds < alone.bottleneck_seconds


class Normed(nn.Module):
    """A heavy layer, BatchNorm, and a layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))

    def forward(self, x):
        return self.layers(x).sum()


@pytest.mark.parametrize("replicas", ["auto", "3,1", "1,3", "2,1,1"])
def test_what_updates_buffers_is_on_one_rank(replicas):
    program = priced(traced(Normed(), torch.randn(4, 8)), linear=30.0, linear_1=20.0)
    n_stages = 4 if replicas == "auto" else len(replicas.split(","))
    found = cut(program, n_stages=n_stages, replicas=replicas, n_microbatches=8)
    holders = [s.index for s in found.stages if any("batch_norm" in n for n in s.nodes)]
    assert [found.replicas[s] for s in holders] == [1]
    assert max(found.replicas) > 1


def test_no_cut_leaves_what_updates_buffers_on_one_rank():
    program = priced(traced(Normed(), torch.randn(4, 8)))
    expected = r"no cut into 2 stages on 2,2 ranks has what updates buffers \(add_, batch_norm\) in stages of one rank"
    with pytest.raises(PartitionError, match=expected):
        cut(program, n_stages=2, replicas="2,2", n_microbatches=8)
    with pytest.raises(PartitionError, match=r"on 3,1 ranks has what .* and keeps to 16 B a rank"):
        cut(program, n_stages=2, replicas="3,1", n_microbatches=8, memory_bytes=16)
    in_eval = priced(traced(Normed().eval(), torch.randn(4, 8)))
    assert cut(in_eval, n_stages=2, replicas="2,2", n_microbatches=8).replicas == (2, 2)
