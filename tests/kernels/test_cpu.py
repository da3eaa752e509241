"""The path for CPU tensors in eager operators equals the reference bit for bit. ``test_native.py`` has the other one."""

import pytest
import torch
from kernels.inputs import every_class, same

from fxpipe.triton_kernels import BFPFormat, cpu, native, reference
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: False)


def assert_equal(fmt: BFPFormat, x: torch.Tensor, decoded: torch.dtype) -> None:
    expected = reference.compress(x, fmt)
    assert all(map(same, cpu.compress(x, fmt), expected))
    assert same(
        cpu.decompress(expected, fmt, x.numel(), decoded), reference.decompress(expected, fmt, x.numel(), decoded)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_format_on_every_class(width, block, unsigned, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2048)
    assert_equal(BFPFormat(width, block, unsigned), every_class(1021, dtype), dtype)


@pytest.mark.parametrize("n", [0, 1, 127, 1023, 1024, 1025, 4096, 5000])
@pytest.mark.parametrize("fmt", ["bfp3b8", "bfp4b32", "bfp7b128+unsigned", "bfp8b16"])
def test_chunks_and_ragged_sizes(fmt, n, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    assert_equal(BFPFormat.parse(fmt), every_class(n // 14 + 1, torch.float32)[:n], torch.float32)


@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp8b32+unsigned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decoded", DTYPES, ids=str)
def test_a_dtype_other_than_the_compressed_one(fmt, dtype, decoded):
    assert_equal(BFPFormat.parse(fmt), every_class(200, dtype), decoded)


def test_the_real_chunk():
    x = torch.randn(2 * cpu.CHUNK + 33)
    assert_equal(BFPFormat.parse("bfp4b32"), x, torch.float32)


def test_the_inputs_are_left_alone():
    x = torch.randn(1000)
    planes = cpu.compress(x, BFPFormat.parse("bfp6b16"))
    before = [x.clone(), *(plane.clone() for plane in planes)]
    cpu.compress(x, BFPFormat.parse("bfp6b16"))
    cpu.decompress(planes, BFPFormat.parse("bfp6b16"), 1000, torch.float32)
    assert all(map(torch.equal, [x, *planes], before))
