"""The definition in torch against the definition in exact rational arithmetic, and what it promises."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels.inputs import every_class, normal, same
from kernels.oracle import Oracle, group_bytes

from fxpipe.triton_kernels import BFPFormat
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS
from fxpipe.triton_kernels.reference import compress, decompress

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEAST_BLOCK = 2.0**-103


def oracle(fmt: BFPFormat, dtype: torch.dtype) -> Oracle:
    least = 103 + fmt.width if fmt.unsigned and dtype == torch.float16 else 24
    return Oracle(fmt.width, fmt.block, fmt.unsigned, least)


def raw(plane: torch.Tensor) -> bytes:
    return plane.numpy().tobytes()


def assert_as_the_oracle(fmt: BFPFormat, x: torch.Tensor) -> None:
    exact = oracle(fmt, x.dtype)
    planes = compress(x, fmt)
    groups, exponents = exact.store(x.tolist())
    assert group_bytes([raw(plane) for plane in planes[:-1]], fmt.width) == groups
    assert raw(planes[-1]) == exponents
    expected = torch.tensor(exact.restore(groups, exponents, x.numel()), dtype=torch.float64).to(x.dtype)
    assert same(decompress(planes, fmt, x.numel(), x.dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_oracle_on_every_class(width, unsigned, dtype):
    assert_as_the_oracle(BFPFormat(width, 16, unsigned), every_class(131, dtype))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 127, 129, 300])
def test_equals_the_oracle_at_every_block_and_ragged_size(block, n):
    assert_as_the_oracle(BFPFormat(3, block), normal(n, torch.Generator().manual_seed(n)))


@settings(deadline=None)
@given(
    st.builds(BFPFormat, st.sampled_from(WIDTHS), st.sampled_from(BLOCKS), st.booleans()),
    st.lists(st.floats(width=16) | st.sampled_from([2.0**-24, -0.0, 65504.0]), max_size=40),
    st.sampled_from(DTYPES),
)
def test_equals_the_oracle_on_what_hypothesis_finds(fmt, values, dtype):
    assert_as_the_oracle(fmt, torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_errors_stay_within_the_bound(width, unsigned, dtype):
    fmt = BFPFormat(width, 32, unsigned)
    x = every_class(1024, dtype)
    x = x.abs() if unsigned else x
    y = decompress(compress(x, fmt), fmt, x.numel(), dtype)
    x, y = x.double().view(-1, 32), y.double().view(-1, 32)
    finite = x.isfinite().all(dim=1)
    least = 2.0 ** (width - 24) if unsigned and dtype == torch.float16 else LEAST_BLOCK
    largest = x[finite].abs().amax(dim=1, keepdim=True).clamp_min(least)
    relative = ((x[finite] - y[finite]).abs() / largest).max().item()
    assert relative <= fmt.error_bound(str(dtype).removeprefix("torch."))
    assert relative > 0.9 * fmt.error_bound() or dtype != torch.float32  # the bound is no larger than it must be
    assert y[~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_unsigned_keeps_exactly_the_zeros(width, dtype):
    x = every_class(1024, dtype).relu()
    x = x.masked_fill(~x.isfinite(), 1.0)
    fmt = BFPFormat(width, 64, unsigned=True)
    y = decompress(compress(x, fmt), fmt, x.numel(), dtype)
    assert torch.equal(y == 0, x == 0)
    assert (y >= 0).all()


@pytest.mark.parametrize("fmt", ["bfp2b8", "bfp4b32", "bfp8b128", "bfp4b32+unsigned"])
def test_what_was_decoded_is_stored_without_loss(fmt):
    fmt = BFPFormat.parse(fmt)
    x = every_class(512, torch.float32)
    y = decompress(compress(x, fmt), fmt, x.numel(), torch.float32)
    if fmt.unsigned:  # levels lie half a step off, so a smaller largest value may halve the step, once
        y = decompress(compress(y, fmt), fmt, x.numel(), torch.float32)
    assert same(decompress(compress(y, fmt), fmt, x.numel(), torch.float32), y)


def test_the_code_minus_zero_decodes_to_zero():
    fmt = BFPFormat.parse("bfp4b8")
    planes = (torch.tensor([-0x77777778], dtype=torch.int32), torch.tensor([127], dtype=torch.uint8))
    assert decompress(planes, fmt, 8, torch.float32).tolist() == [0.0] * 8


def test_the_drawings_of_the_layout():
    x = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, 0])  # E = 129, step 1
    code, exponent = compress(x, BFPFormat.parse("bfp4b8"))
    assert code.view(torch.uint8).tolist() == [0b1010_0001, 0b1100_0011, 0b1110_0101, 0b0000_0111]
    assert exponent.tolist() == [129]
    x = torch.tensor([1.0, -2, 3, -1, 2, -3, 1, -2])  # E = 128, step 1
    code16, code8, exponent = compress(x, BFPFormat.parse("bfp3b8"))
    bits = 0b110_001_111_010_101_011_110_001  # values 7 to 0
    assert code16.view(torch.uint8).tolist() + code8.tolist() == list(bits.to_bytes(3, "little"))
    assert exponent.tolist() == [128]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_other_dtypes_are_refused(dtype):
    fmt = BFPFormat.parse("bfp4b32")
    with pytest.raises(TypeError, match="format 'bfp4b32' holds values of dtype float32, bfloat16, float16, not "):
        compress(torch.zeros(4, dtype=dtype), fmt)
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        decompress(compress(torch.zeros(4), fmt), fmt, 4, dtype)
