import json
from collections import OrderedDict, defaultdict
from dataclasses import replace
from enum import Enum

import pytest
import torch
import torch.utils._pytree as pytree

from fxpipe.errors import PlanError
from fxpipe.ir.program import Signature
from fxpipe.plans.signature_json import signature_from_data, signature_to_data


class Side(Enum):
    LEFT = 1


def signature_of(call, constants=()):
    spec = pytree.tree_structure(call)
    return Signature(("x",), ("x",), constants, spec, pytree.tree_structure({"loss": 0}), 1, 0, {"s0": 4})


@pytest.mark.parametrize(
    "call",
    [((1,), {}, None), ((), {"x": 1, "rest": [2, (3, {"deep": 4})]}, 5), ((OrderedDict(b=1, a=2),), {}, None)],
)
def test_comes_back_equal(call):
    signature = signature_of(call, ((1, 2.5), (2, None), (3, "mean"), (4, True)))
    assert signature_from_data(json.loads(json.dumps(signature_to_data(signature)))) == signature


@pytest.mark.parametrize("box", [defaultdict(list, a=1), {Side.LEFT: 1}])
def test_containers_that_have_no_safe_spelling_are_refused(box):
    with pytest.raises(PlanError, match="cannot be stored in a plan"):
        signature_to_data(signature_of(((box,), {}, None)))


def test_constants_that_have_no_spelling_are_named():
    signature = replace(signature_of(((1,), {}, None)), constants=((3, torch.float16),))
    with pytest.raises(PlanError, match=r"input leaf 3 is the constant torch.float16, a dtype, which cannot be stored"):
        signature_to_data(signature)
