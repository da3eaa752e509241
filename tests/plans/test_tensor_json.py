import json

import pytest
import torch

from fxpipe.errors import PlanError
from fxpipe.plans.tensor_json import tensors_from_data, tensors_to_data

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    "brain": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "large": torch.tensor([2**62 + 1]),
    "turned": torch.arange(6).view(2, 3).t(),
    "complex": torch.tensor([1 + 2j]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_kind_comes_back_bit_for_bit(name):
    found = tensors_from_data(json.loads(json.dumps(tensors_to_data({name: TENSORS[name]}))))[name]
    assert (found.dtype, found.shape, found.device) == (TENSORS[name].dtype, TENSORS[name].shape, TENSORS[name].device)
    assert found.flatten().view(torch.uint8).tolist() == TENSORS[name].flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float99"}, "constant 'c' has dtype 'float99', which torch does not know"),
        ({"dtype": "load"}, "constant 'c' has dtype 'load'"),
        ({"shape": [2]}, r"constant 'c' has 4 bytes; expected 8 for float32 \[2\]"),
    ],
)
def test_what_is_no_tensor_is_named(change, message):
    data = tensors_to_data({"c": torch.ones(1)})
    with pytest.raises(PlanError, match=message):
        tensors_from_data({"c": {**data["c"], **change}})
