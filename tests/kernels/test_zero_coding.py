"""Zero compression on the device: the definition against Python's integers, its sizes, and the kernels for each target."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels.zero_oracle import zero_compressed

from fxpipe.triton_kernels import BFPFormat, packing, reference, zero_coding
from fxpipe.triton_kernels.zero_reference import TILE_GROUPS, ZeroCoded, n_words

TOOL = Path(__file__).parents[2] / "tools" / "kernel_report.py"


def planes_of_codes(codes: list[int], width: int) -> list[torch.Tensor]:
    planes = packing.pack(torch.tensor(codes, dtype=torch.int64), width, BFPFormat(width, 8).group_planes)
    return [*planes, torch.arange(len(codes) // 8).to(torch.uint8)]


def used(coded: ZeroCoded) -> list[int]:
    return [word & 0xFFFFFFFF for word in coded.payload[: int(coded.start[-1])].tolist()]


@st.composite
def some_codes(draw: st.DrawFn) -> tuple[int, list[int]]:
    width, n_groups = draw(st.integers(2, 8)), draw(st.sampled_from([0, 1, 2, 5, TILE_GROUPS, TILE_GROUPS + 3]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(1, 1 << width, (n_groups * 8,), generator=g)
    codes *= torch.rand(n_groups * 8, generator=g) >= draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return width, codes.tolist()


@settings(deadline=None, max_examples=60)
@given(chosen=some_codes())
def test_the_definition_equals_the_layout_in_pythons_integers(chosen):
    width, codes = chosen
    planes, fmt = planes_of_codes(codes, width), BFPFormat(width, 8)
    coded = zero_coding.compress(planes, fmt)
    mask, start, words = zero_compressed(codes, width, TILE_GROUPS)
    assert (coded.mask.tolist(), coded.start.tolist(), used(coded)) == (mask, start, words)
    assert not coded.payload[len(words) :].any()
    assert coded.payload.numel() == n_words(len(codes) // 8, width)
    for made in (coded, coded.shrunk()):
        assert all(map(torch.equal, zero_coding.decompress(made, fmt), planes))


@pytest.mark.parametrize(
    "text", ["bfp4b32+unsigned", "bfp3b64:learned+se5m2", "bfp5b32+e5+o1", "bfp4b4x8", "bfp6b8+e4"]
)
@pytest.mark.parametrize("n", [0, 1, 77, 9000])
def test_round_trip_of_tensors(text, n):
    fmt = BFPFormat.parse(text)
    planes = reference.compress(torch.randn(-(-n // 32) * 32 if fmt.rows else n).relu(), fmt)
    coded = zero_coding.compress(planes, text).shrunk()
    assert all(map(torch.equal, zero_coding.decompress(coded, text), planes))


def test_by_hand():
    """Codes 0 3 0 0 0 0 0 1 and 0 0 0 0 0 0 0 0 of 4 bits: bits 1 and 7; a word 0x13."""
    coded = zero_coding.compress(planes_of_codes([0, 3, 0, 0, 0, 0, 0, 1] + [0] * 8, 4), "bfp4b8")
    assert (coded.mask.tolist(), coded.start.tolist()) == ([0b10000010, 0], [0, 1])
    assert coded.payload.tolist() == [0x13, 0]
    assert coded.used_bytes() == 2 + 2 * 8 + 4 + 2
    assert coded.shrunk().payload.tolist() == [0x13]


@pytest.mark.parametrize("width", range(2, 9))
def test_where_no_code_is_zero_the_payload_is_the_codes(width):
    codes = [1 + i % ((1 << width) - 1) for i in range(8 * TILE_GROUPS * 2)]
    coded = zero_coding.compress(planes_of_codes(codes, width), BFPFormat(width, 8))
    assert int(coded.start[-1]) == coded.payload.numel() == len(codes) * width // 32


def test_planes_of_another_format():
    planes = planes_of_codes([1] * 8, 4)
    with pytest.raises(ValueError, match=r"the planes code16 int16, code8 uint8, exponent uint8; found int32 \[1\]"):
        zero_coding.compress(planes, "bfp3b8")
    with pytest.raises(ValueError, match="found nothing"):
        zero_coding.compress([], "bfp4b8")
    coded = zero_coding.compress(planes, "bfp4b8")
    with pytest.raises(ValueError, match=r"the planes exponent uint8, outlier int16; found uint8 \[1\]"):
        zero_coding.decompress(coded, "bfp4b8+o1")
    with pytest.raises(ValueError, match="1 groups are 1 tiles, whose starts are one more; found 1"):
        zero_coding.decompress(ZeroCoded(coded.mask, coded.start[1:], coded.payload, coded.others), "bfp4b8")


@pytest.fixture(scope="module")
def kernel_report():
    spec = importlib.util.spec_from_file_location("kernel_report", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("kind", zero_coding.KERNELS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles(kernel_report, target, kind, width):
    compiled = zero_coding.compile_for(kernel_report.TARGETS[target], kind, BFPFormat(width, 8))
    count = kernel_report._count_amd if target == "gfx942" else kernel_report._count_nvidia
    ops, registers, spills, shared_bytes = count(compiled)
    assert (spills, registers <= 64, shared_bytes <= 4096) == (0, True, True)
    atomics = [op for op in ops if op.startswith(("ATOMG", "RED.", "REDG", "global_atomic"))]
    assert all(".OR" in op or "_or" in op for op in atomics)
    assert bool(atomics) == (kind == "payload")
