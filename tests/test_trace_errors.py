"""trace: what is said of a model that cannot be captured: which module, which line, what to do."""

import re

import pytest
import torch
from torch import nn

from fxpipe.errors import OptionError, TraceError
from fxpipe.trace import trace

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # this line is what the message names
            return x
        return -x


class Fails(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def line_of(text):
    with open(__file__) as source:
        return next(i for i, line in enumerate(source, 1) if text in line)


def error(model, *args, **options):
    with pytest.raises(TraceError) as caught:
        trace(model, args, **options)
    return str(caught.value)


def test_a_branch_on_a_value_names_module_line_and_remedy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Branches()))
    found = error(model, X)
    assert found.startswith("cannot capture Sequential as one graph: GuardOnDataDependentSymNode: ")
    assert "where: in module 1.0 (Branches) at " in found
    assert f"{__file__}:{line_of('what the message names')}, in forward" in found
    assert found.endswith("write it with torch.where or torch.cond, or keep that part outside")


def test_a_size_taken_from_a_value():
    found = error(Fails(lambda x: x[: int(x.sum().item())]), X)
    assert "sizes a tensor on a value inside a tensor" in found
    assert re.search(r"in module Fails \(Fails\) at .*test_trace_errors\.py:\d+, in <lambda>", found)


def test_too_many_inputs():
    found = error(nn.Linear(4, 4), X, X)
    assert "takes 2 positional arguments but 3 were given" in found
    assert "the example inputs do not fit the model's forward; check their names, number and order" in found


def test_an_unknown_keyword():
    with pytest.raises(TraceError, match="unexpected keyword argument 'mask'") as caught:
        trace(nn.Linear(4, 4), (X,), {"mask": X})
    assert "check their names, number and order" in str(caught.value)


def test_shapes_that_do_not_fit():
    found = error(Fails(lambda x: x.view(7, 3)), X)
    assert "shape '[7, 3]' is invalid for input of size 8" in found
    assert "what to do: run the model once on the same example inputs" in found


def test_any_other_failure_keeps_its_cause():
    with pytest.raises(TraceError, match="in module Fails") as caught:
        trace(Fails(lambda x: x.nothing), (X,))
    assert isinstance(caught.value.__cause__, AttributeError)
    assert "make the model pass torch.export.export(model, args, kwargs)" in str(caught.value)


def test_a_failure_in_the_loss_function():
    found = error(nn.Linear(4, 4), X, loss_fn=lambda output, target: output.sum() + target["y"], target={"x": X})
    assert "cannot capture Linear as one graph: KeyError: 'y'" in found
    assert f"{__file__}:{line_of('output.sum() + target')}, in <lambda>" in found


def test_dynamic_of_an_unknown_input():
    assert (
        error(nn.Linear(4, 4), X, dynamic={"y": [0]})
        == "dynamic names the input 'y', which is no tensor of the call; those are: 0"
    )
    assert "which is no tensor of the call" in error(nn.Linear(4, 4), X, dynamic={"target": [0]})


def test_dynamic_of_a_dimension_that_is_not_there():
    assert error(nn.Linear(4, 4), X, dynamic={"0": [2]}) == (
        "dynamic names dimension 2 of input '0', which has 2 dimensions, from 0"
    )


def test_dynamic_of_a_dimension_that_the_model_fixes():
    found = error(nn.Linear(4, 4), X, dynamic={"0": [1]})
    assert "Constraints violated" in found
    assert found.endswith("asks to keep symbolic; leave that dimension out")
    assert trace(nn.Linear(4, 4), (X,)).signature.sizes == {}  # nothing is left behind on the example


def test_a_target_without_a_loss_function():
    with pytest.raises(OptionError, match="a target is given but no loss_fn to take it"):
        trace(nn.Linear(4, 4), (X,), target=X)
