"""The fused kernel on CPU tensors, under Triton's interpreter: ``test_interpreted.py`` runs this file by itself."""

import pytest
import torch
from kernels.inputs import classes_in_turn, every_class, near_activation, same
from kernels.interpreted import multiply_and_add_rounds_once  # noqa: F401  (a fixture for every test)

from fxpipe.triton_kernels import BFPFormat, launch, reference
from fxpipe.triton_kernels.fused import ACTIVATIONS, STORED, by_definition, on_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["bfp4b32", "bfp8b16", "bfp3b64+unsigned", "bfp2b32+e4", "bfp3b16:gauss+e5m3", "bfp4b32+o1", "bfp4b32+o2"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_writes_the_activation_and_stores_what_it_read_or_wrote(activation, dtype, stored):
    x, fmt = every_class(300, dtype), BFPFormat.parse(FORMATS[DTYPES.index(dtype)])
    y, *planes = launch.produce_and_compress([x], fmt, activation, stored, tile=16384)
    assert all(map(same, planes, reference.compress(x if stored == "input" else y, fmt)))
    if activation == "relu":
        assert same(y, torch.relu(x))
    else:
        assert near_activation(y, x, activation)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("text", FORMATS)
def test_relu_is_the_unfused_pair_to_the_bit(text, stored):
    x = every_class(60, torch.bfloat16)[:840].view(5, 24, 7)
    for order in ([0, 1, 2], [2, 0, 1]):
        arguments = ([x.permute(0, 1, 2)], text, order, "relu", stored)
        assert all(map(same, on_gpu(*arguments), by_definition(*arguments)))


@pytest.mark.parametrize("n", [1, 9, 4095, 4097, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tile_that_runs_on_a_device_at_ragged_sizes(dtype, n):
    x, fmt = every_class(n // 14 + 1, dtype, seed=n)[:n], BFPFormat.parse("bfp5b64")
    y, *planes = launch.produce_and_compress([x], fmt, "relu", "output")
    assert same(y, torch.relu(x))
    assert all(map(same, planes, reference.compress(y, fmt)))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_the_unfused_pair_to_the_bit(dtype, text):
    x, z = (classes_in_turn(4096 + 504, dtype, seed).view(8, -1) for seed in (1, 2))
    arguments = ([x, z], text, [0, 1], "add", "output")
    assert all(map(same, on_gpu(*arguments), by_definition(*arguments)))
