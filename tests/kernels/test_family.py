"""Every format of the family: the definition in torch against exact arithmetic, and what the formats promise."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels import family_oracle
from kernels.inputs import every_class, normal, same

from fxpipe.triton_kernels import BFPFormat, packing
from fxpipe.triton_kernels.learned import levels_of
from fxpipe.triton_kernels.reference import compress, decompress
from fxpipe.triton_kernels.scales import SCALES

SEED = 0x1234_5678_9ABC_DEF0
SEED_TENSOR = torch.tensor(SEED)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEXTS = [
    *(f"bfp4b16+{scale}" for scale in ("e6m2", "e5m3", "e5", "e4")),
    *(f"bfp{width}b8+e5m3" for width in (2, 3, 5, 8)),
    *(f"bfp{width}b16+unsigned+e6m2" for width in (2, 4, 8)),
    *(f"bfp4b16{sign}{scale}+search" for sign in ("", "+twos", "+unsigned") for scale in ("", "+e5m3", "+e5")),
    *(f"bfp2b16{scale}+search" for scale in ("", "+e6m2", "+e5m3")),
    *(f"bfp{width}b16+twos" for width in (2, 4, 7)),
    *(f"bfp{width}b16{sign}{scale}+{rounding}" for width, sign, scale, rounding in (
        (4, "", "", "sr"), (4, "", "", "trunc"), (4, "", "", "hash"), (2, "", "+e5m3", "sr"), (3, "+twos", "+e4", "sr"),
        (8, "", "", "sr"), (4, "+unsigned", "", "sr"), (2, "+unsigned", "+e5m3", "trunc"), (4, "+unsigned", "+e6m2", "hash"),
    )),
    *(f"bfp{width}b16:gauss{rest}" for width, rest in (
        (2, ""), (3, "+e5m3"), (4, "+e5m3+search"), (5, "+e6m2+search"), (4, "+unsigned+e5m3"), (2, "+unsigned+search"),
        (2, "+se5m2"), (3, "+se5m2+search"),
    )),
    *(f"bfp{width}b16{rest}+absmax" for width, rest in (
        (2, "+e5m3"), (4, "+e6m2"), (8, "+twos+e5m3"), (2, "+unsigned+e5m3"), (8, "+unsigned+e6m2"), (3, ":gauss+e5m3"),
        (3, ":gauss+unsigned+e6m2"), (3, ":gauss+se5m2"), (2, ":lossy-aggressive+e5m3"), (3, ":00010203+e5m3"),
    )),
    "bfp4b16+e5m3+absmax+o2+dither",
    "bfp3b16:lossy-lite", "bfp3b16:lossy-normal+e5m3", "bfp2b16:lossy-aggressive", "bfp2b16:lossy-lite+unsigned+e5m3",
    "bfp3b16:00204060+e5m3", "bfp2b16:c0001050+se5m2",
    "bfp3b16:learned+e5m3", "bfp3b16:learned+unsigned", "bfp2b16:learned+se5m2+search",
    *(f"bfp4b16{rest}" for rest in (
        "+o1", "+o3", "+o15", "+e5m3+search+o1", "+unsigned+o2", "+twos+e4+o1", "+o2t3", ":gauss+e5m3+o1t1", "+sr+o1",
    )),
    "bfp3b8:gauss+se5m2+o1", "bfp8b128+o2", "bfp2b128+e5m3+o7t2",
    *(f"bfp4b16{rest}" for rest in (
        "+dither", "+dither-density", "+unsigned+dither", "+unsigned+e5m3+dither-density", ":gauss+e5m3+dither",
        ":gauss+unsigned+dither-density", "+twos+sr+o1+dither",
    )),
    "bfp3b16:gauss+se5m2+dither-density", "bfp3b16:lossy-normal+dither",
]  # fmt: skip


def parts_of(planes: tuple[torch.Tensor, ...], fmt: BFPFormat, numel: int) -> tuple[list, list, list]:
    """Scale codes, codes and entries of each block, as the oracle has them."""
    n_codes = len(fmt.group_planes)
    codes = packing.unpack(planes[:n_codes], fmt.width, fmt.group_planes).view(-1, fmt.block)
    scales = packing.unpack_scales(planes[n_codes:], fmt, fmt.n_blocks(numel))
    by_name = {plane.name: tensor for plane, tensor in zip(fmt.planes(numel), planes, strict=True)}
    entries = [[]] * len(codes)
    if fmt.outliers:
        entries = (by_name["outlier"].int() & 0xFFFF).view(-1, fmt.outliers).tolist()
    return scales.tolist(), codes.tolist(), entries


def assert_as_the_oracle(fmt: BFPFormat, x: torch.Tensor) -> None:
    name = str(x.dtype).removeprefix("torch.")
    levels = levels_of(x, fmt) if fmt.codebook == "learned" else fmt.levels
    planes = compress(x, fmt, SEED_TENSOR)
    assert [(p.numel(), str(p.dtype)) for p in planes] == [
        (p.length, f"torch.{p.dtype}") for p in fmt.planes(x.numel())
    ]
    expected = family_oracle.store(x.tolist(), fmt, name, levels, SEED)
    assert parts_of(planes, fmt, x.numel()) == expected
    exact = [v for block in family_oracle.restore(expected, fmt, levels, SEED) for v in block][: x.numel()]
    y = decompress(planes, fmt, x.numel(), x.dtype, SEED_TENSOR)
    in_float32 = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    assert torch.equal(in_float32.float().double().nan_to_num(7e7), in_float32.nan_to_num(7e7)), "exact in float32"
    limit = torch.finfo(x.dtype).max
    assert same(y, in_float32.clamp(-limit, limit).to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_oracle_on_every_class(text, dtype):
    fmt = BFPFormat.parse(text)
    assert_as_the_oracle(fmt, every_class(37, dtype))


@pytest.mark.parametrize("text", [text for text in TEXTS if "+absmax" in text and "+o" not in text])
def test_absmax_leaves_the_largest_value_where_it_is(text):
    """To half a step of the scale."""
    fmt = BFPFormat.parse(text)
    x = normal(1 << 14, torch.Generator().manual_seed(1)).view(-1, fmt.block)
    x = x.abs() if fmt.unsigned else x
    y = decompress(compress(x.flatten(), fmt), fmt, x.numel(), x.dtype).view_as(x)
    place = x.abs().argmax(dim=1, keepdim=True)
    kept = y.gather(1, place) / x.gather(1, place)
    assert ((kept - 1).abs() <= 2.0 ** -(1 + fmt.scale_kind.mantissa_bits) + 2.0**-20).all()


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 129])
@pytest.mark.parametrize(
    "text", ["bfp3b16+e5", "bfp4b16:gauss+e5m3+search+o1", "bfp3b128:learned+e4", "bfp4b16+sr+dither"]
)
def test_equals_the_oracle_at_ragged_sizes(text, n):
    assert_as_the_oracle(BFPFormat.parse(text), normal(n, torch.Generator().manual_seed(n)))


@st.composite
def formats(draw) -> BFPFormat:
    """Any format without tiles, learned and explicit codebooks."""
    unsigned, outliers = draw(st.booleans()), draw(st.integers(0, 3))
    fields = {
        "width": draw(st.integers(2, 8)),
        "block": draw(st.sampled_from([8, 16, 32])),
        "unsigned": unsigned,
        "scale": draw(st.sampled_from([name for name in SCALES if name != "se5m2"])),
        "outliers": outliers,
        "outlier_threshold": draw(st.integers(0, 3)) if outliers else 0,
        "dither": draw(st.sampled_from(["", "", "uniform", "density"])),
    }
    if fields["width"] <= 5 - unsigned and draw(st.booleans()):
        signed = fields["width"] <= 3 and not unsigned and draw(st.booleans())
        fields |= {"codebook": "gauss"} | ({"scale": "se5m2"} if signed else {})
        return BFPFormat(**fields, **how_scaled(draw, fields["scale"]))
    rounding = draw(st.sampled_from(["nearest", "sr", "hash", "trunc"]))
    how = how_scaled(draw, fields["scale"]) if rounding == "nearest" else {}
    return BFPFormat(**fields, rounding=rounding, twos=not unsigned and draw(st.booleans()), **how)


def how_scaled(draw, scale: str) -> dict[str, bool]:
    name = draw(st.sampled_from(["", "search", *["absmax"] * (SCALES[scale].mantissa_bits > 0)]))
    return {name: True} if name else {}


@settings(deadline=None, max_examples=150)
@given(
    formats(),
    st.lists(st.floats(width=16) | st.sampled_from([2.0**-24, -0.0, 65504.0]), max_size=24),
    st.sampled_from(DTYPES),
)
def test_equals_the_oracle_on_what_hypothesis_finds(fmt, values, dtype):
    assert_as_the_oracle(fmt, torch.tensor(values, dtype=dtype))


@settings(deadline=None, max_examples=300)
@given(
    formats(),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True), min_size=1, max_size=40),
    st.sampled_from(DTYPES),
)
def test_errors_stay_within_the_bound(fmt, values, dtype):
    check_bound(fmt, torch.tensor(values, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_errors_stay_within_the_bound_on_every_class(text, dtype):
    check_bound(BFPFormat.parse(text), every_class(1024, dtype))


def check_bound(fmt: BFPFormat, x: torch.Tensor) -> None:
    x = x.abs() if fmt.unsigned else x
    name = str(x.dtype).removeprefix("torch.")
    y = decompress(compress(x, fmt, SEED_TENSOR), fmt, x.numel(), x.dtype, SEED_TENSOR)
    filling = (0, -x.numel() % fmt.block)
    x, y = (torch.nn.functional.pad(t.double(), filling).view(-1, fmt.block) for t in (x, y))
    known = ~y.isnan().any(dim=1)
    largest = x[known].abs().amax(dim=1, keepdim=True).clamp_min(fmt.least_magnitude(name))
    assert ((x[known] - y[known]).abs() <= largest * fmt.error_bound(name)).all()
    held = fmt.scale_kind.value(fmt.scale_kind.nan - 1) / 2 / max(1.0, fmt.peak_factor)
    assert known[(x.abs() <= held).all(dim=1)].all()  # no block within the range is lost
    assert not (known & ~x.isfinite().all(dim=1)).any()
    if fmt.unsigned:
        assert torch.equal(x[known] == 0, y[known] == 0)
