"""Stage hints: modules that share a stage, modules that do not; what cannot be."""

import pytest
import torch
from torch import nn

import fxpipe
from fxpipe.cuts.stage_hints import marked
from fxpipe.errors import OptionError, PartitionError
from fxpipe.passes.partition import PartitionStages


def model(n=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n)))


def modules_of(net, n_ranks=2, **hints):
    """The layers of each stage of the plan."""
    options = fxpipe.Options(n_ranks=n_ranks, stage_hints=hints)
    plan = fxpipe.compile(net, torch.randn(4, 8), options, loss_fn=lambda output, _: output.square().mean())
    return [sorted({name.split(".")[0] for name in stage.parameters}) for stage in plan.partition.stages]


FREE = [list("0123"), list("45")]  # the first layer computes no gradient of its input


def test_without_hints_the_work_is_halved():
    assert modules_of(model()) == FREE


def test_one_hint_keeps_modules_together():
    assert modules_of(model(), **{"1": "a", "4": "a"}) in ([["0"], list("12345")], [list("01234"), ["5"]])


def test_two_hints_keep_modules_apart():
    assert modules_of(model(), **{"0": "a", "1": "b"}) == [["0"], list("12345")]


def test_marks_in_the_model_are_the_same():
    net = model()
    assert fxpipe.stage_hint(net[0], "a") is net[0]
    fxpipe.stage_hint(net[1], 2)
    assert marked(net) == {"0": "a", "1": "2"}
    assert modules_of(net) == [["0"], list("12345")]


def test_options_win_over_marks():
    net = model()
    fxpipe.stage_hint(net[0], "a")
    fxpipe.stage_hint(net[1], "b")
    assert modules_of(net, **{"1": "a"}) == FREE


def test_the_inner_module_counts():
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8))
    options = fxpipe.Options(n_ranks=2, stage_hints={"0": "a", "0.1": "b", "1": "b"})
    plan = fxpipe.compile(net, torch.randn(4, 8), options, loss_fn=lambda output, _: output.square().mean())
    assert plan.partition.stages[0].parameters == ("0.0.weight", "0.0.bias")


def test_a_hint_for_nothing():
    with pytest.raises(OptionError, match=r"unknown module or node of a stage hint 'encoder'; known: 0, 1, 2"):
        modules_of(model(), encoder="a")


def test_hints_that_overlap():
    with pytest.raises(PartitionError, match=r"stage hints 'a' and 'b' overlap in the order of the program"):
        modules_of(model(), **{"0": "a", "1": "b", "2": "a"})


def test_more_hints_than_stages():
    with pytest.raises(PartitionError, match=r"no cut into 2 stages keeps the stage hints apart: they need 3 stages"):
        modules_of(model(), **{"0": "a", "1": "b", "2": "c"})


def test_a_text_that_is_no_hint():
    with pytest.raises(OptionError, match="stage hint 'encoder' is not of the form MODULE=HINT"):
        PartitionStages(stage_hints="encoder")
