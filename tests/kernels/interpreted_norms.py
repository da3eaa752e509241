"""The norm kernel on CPU tensors, under Triton's interpreter: ``test_interpreted.py`` runs this file by itself."""

import pytest
import torch
from kernels.inputs import norm_inputs, same
from kernels.interpreted import multiply_and_add_rounds_once  # noqa: F401  (a fixture for every test)
from kernels.norm_oracle import EPS, check

from fxpipe.triton_kernels import BFPFormat
from fxpipe.triton_kernels.norms import NORMS, by_definition, on_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["bfp4b32", "bfp8b16", "bfp3b64", "bfp3b16:gauss+e5m3", "bfp4b32+o1"]
WIDTHS = [(9, 64), (5, 96), (3, 256), (2, 768), (2, 2048)]


def arguments(inputs: dict[str, torch.Tensor], norm: str, text: str, stored: str) -> tuple[object, ...]:
    values = [inputs[name] for name in ("x", "residual") if name in inputs]
    given = (inputs.get(name) for name in ("weight", "bias", "mask"))
    return (values, text, *given, inputs.get("kept", 1.0), norm, EPS, stored)


@pytest.mark.parametrize(("n_rows", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_a_sum(dtype, n_rows, width):
    place = WIDTHS.index((n_rows, width)) + DTYPES.index(dtype)
    text, stored = FORMATS[place % len(FORMATS)], ("input", "output", "both")[place % 3]
    if width % BFPFormat.parse(text).block:
        text = "bfp4b32"
    inputs = norm_inputs((n_rows, width), dtype, ("residual", "weight", "bias"), seed=width)
    check(on_gpu(*arguments(inputs, "layer", text, stored)), inputs, "layer", text, stored)


@pytest.mark.parametrize("has", [(), ("weight",), ("residual", "mask"), ("residual", "mask", "weight", "bias")])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_there_may_be_besides(dtype, norm, has):
    for shape in ((3, 3, 128), (2, 1, 768)):
        inputs = norm_inputs(shape, dtype, has)
        check(on_gpu(*arguments(inputs, norm, "bfp4b32", "both")), inputs, norm, "bfp4b32", "both")


@pytest.mark.parametrize(
    ("text", "width"), [("bfp4b32+o2", 64), ("bfp4b4x8", 64), ("bfp4b128", 192), ("bfp4b32", 8224)]
)
def test_without_a_kernel_it_goes_by_the_definition(text, width):
    given = arguments(norm_inputs((4, width), torch.bfloat16, ("residual", "weight")), "rms", text, "both")
    assert all(map(same, on_gpu(*given), by_definition(*given)))
