"""A model traced once costs at another size what it costs when its example has that size."""

import pytest
import torch
from models import build
from torch import nn

from fxpipe.costs.cost_model import modelled_costs
from fxpipe.costs.devices import device
from fxpipe.errors import OptionError, TraceError
from fxpipe.other_sizes import AskedSize, trace_at
from fxpipe.trace import trace

WORK = ("flops", "backward_flops")
FIELDS = (*WORK, "parameter_bytes", "saved_bytes")


def sums(program, fields):
    table = modelled_costs(program.graph_module, device("A100")).at(program.signature.sizes)
    return {field: sum(getattr(row, field) for row in table.nodes) for field in fields}


@pytest.mark.parametrize(
    ("name", "asked", "other", "fields"),
    [
        # an example of another length comes with another table of positions
        ("gpt", [("batch", 0, 6), ("input_ids", 1, 24)], {"batch": 6, "length": 24}, WORK),
        ("mlp", [("batch", 0, 64)], {"batch": 64}, FIELDS),
        ("cnn", [("0", 0, 4)], {"batch": 4}, FIELDS),
    ],
)
def test_costs_are_those_of_an_example_of_that_size(name, asked, other, fields):
    here = trace_at(*build(name), [AskedSize(*one) for one in asked])
    there = trace(*build(name, **other))
    assert sums(here, fields) == sums(there, fields)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(4, 6).sum()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([("nope", 0, 4)], "unknown input 'nope'"),
        ([("input_ids", 5, 4)], "input 'input_ids' has 2 dimensions, from 0; dimension 5 was asked for"),
        ([("batch", 0, 4), ("labels", 0, 5)], "dimension 0 of input 'labels' is to be 5, but .* to be 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(asked, message):
    with pytest.raises(OptionError, match=message):
        trace_at(*build("gpt"), [AskedSize(*one) for one in asked])


def test_a_dimension_that_the_model_fixes_is_named():
    with pytest.raises(TraceError, match=r"kwargs'\]\['x'\].*\n.*\n.*the model fixes the size of a dimension"):
        trace_at(Fixed(), (), {"x": torch.zeros(4, 6)}, [AskedSize("x", 0, 8)])
