"""Decoding in plain operators equals the definition bit for bit, by itself and in the loops that Inductor makes of it."""

import itertools

import pytest
import torch
from kernels.inputs import any_codes, every_class, same
from kernels.kernel_formats import FAMILY
from torch.fx.experimental.proxy_tensor import make_fx

from fxpipe.triton_kernels import BFPFormat, ops, packing, reference
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS
from fxpipe.triton_kernels.open_decoding import decompress, why_not_open

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASIC = [str(BFPFormat(width, block, u)) for width in WIDTHS for block in BLOCKS for u in (False, True)]
OPTIONS = [text for text in FAMILY if not why_not_open(BFPFormat.parse(text))]


def assert_equal(planes, fmt: BFPFormat, numel: int) -> None:
    for dtype in DTYPES:
        assert same(decompress(planes, fmt, numel, dtype), reference.decompress(planes, fmt, numel, dtype))


@pytest.mark.parametrize("text", [*BASIC, *OPTIONS])
def test_every_class_any_code_and_any_size(text):
    fmt, x = BFPFormat.parse(text), every_class(171, torch.float32)
    for numel in (0, 1, 9, x.numel()):
        stored = reference.compress(x[:numel], fmt, torch.tensor(5))
        assert_equal(stored, fmt, numel)
    assert_equal(any_codes(stored, fmt, torch.Generator().manual_seed(1)), fmt, x.numel())


@pytest.mark.parametrize("text", [*(str(BFPFormat(width, 16)) for width in WIDTHS), *OPTIONS])
def test_every_code_under_every_scale(text):
    fmt = BFPFormat.parse(text)
    kind = fmt.scale_kind
    written = [*[0] * fmt.zero_scale, *range(kind.least, kind.nan + 1)]
    scales = [sign + code for sign in (0, 128)[: 1 + kind.signed] for code in written]
    a_scale = -(-(1 << fmt.width) // fmt.block)  # blocks that have every code
    codes = torch.arange(len(scales) * a_scale * fmt.block) % (1 << fmt.width)
    planes = [
        *packing.pack(codes, fmt.width, fmt.group_planes),
        *packing.pack_scales(torch.tensor(scales).repeat_interleave(a_scale), fmt),
    ]
    assert_equal(planes, fmt, codes.numel())


@pytest.mark.parametrize("text", ["bfp4b4x8", "bfp4b32+o1", "bfp4b16:learned", "bfp4b32+dither"])
def test_what_is_not_decoded_so(text):
    names = ("tiles of rows", "outliers", "levels learned from the values", "decoding at random")
    assert why_not_open(BFPFormat.parse(text)) in names


def test_inductors_loops_on_the_cpu():
    formats = ["bfp4b32", "bfp7b8+unsigned", "bfp5b16:gauss+e5m3"]
    x = every_class(33, torch.bfloat16)[:450].view(9, 50)
    planes = [list(ops.compress(x, text)) for text in formats]

    def read_by_loops(*flat: torch.Tensor, decode=ops.decompress_in_operators) -> list[torch.Tensor]:
        left = iter(flat)
        stored = [list(itertools.islice(left, len(p))) for p in planes]
        return [decode(p, text, [9, 50], [1, 0], x.dtype) * 2 for p, text in zip(stored, formats, strict=True)]

    flat = list(itertools.chain(*planes))
    compiled = torch._inductor.compile(make_fx(read_by_loops)(*flat), flat)
    expected = read_by_loops(*flat, decode=torch.ops.fxpipe.bfp_decompress)
    assert all(map(same, compiled(*flat), expected))
