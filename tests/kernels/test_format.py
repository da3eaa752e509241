"""The notation, the sizes and the bounds of formats."""

import dataclasses
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
from hypothesis import given, strategies as st

import fxpipe.triton_kernels
from fxpipe.triton_kernels import BFPFormat, FormatError
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS

ALL = [BFPFormat(width, block, unsigned) for width in WIDTHS for block in BLOCKS for unsigned in (False, True)]
formats = st.builds(BFPFormat, st.sampled_from(WIDTHS), st.sampled_from(BLOCKS), st.booleans())


@given(formats)
def test_parse_inverts_str(fmt):
    assert BFPFormat.parse(str(fmt)) == fmt


@given(st.from_regex(r"bfp[0-9]{1,2}b[0-9]{1,3}(\+(unsigned|[a-z0-9]{1,3})){0,2}", fullmatch=True) | st.text())
def test_str_inverts_parse_or_the_text_is_refused(text):
    try:
        again = str(BFPFormat.parse(text))
    except FormatError as error:
        again = str(error)
    assert again == text or again.startswith(f"format {text!r} cannot be: ")


def test_texts():
    assert str(BFPFormat(4, 32)) == "bfp4b32"
    assert str(BFPFormat(8, 128, unsigned=True)) == "bfp8b128+unsigned"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bfp1b32", "the width is 1"),
        ("bfp9b32", "the width is 9"),
        ("bfp4b0", "the block is 0"),
        ("bfp4b24", "the block is 24"),
        ("bfp4b32+signed", "unknown option '+signed'"),
        ("bfp4b32+", "unknown option '+'"),
        ("bfp4b32+unsigned+unsigned", "option '+unsigned' is given more than once"),
        ("bfp4b32:", "the codebook has no name"),
        ("bfp4b32:normal", "unknown codebook ':normal'"),
        ("bfp6b32:gauss", "a codebook has at most 16 levels: widths 2 to 5"),
        ("bfp5b32:gauss+unsigned", "a codebook has at most 16 levels: widths 2 to 4"),
        ("bfp4b32:lossy-lite", "':lossy-lite' has 2 bits of magnitude: bfp3, or bfp2 with '+unsigned'"),
        ("bfp4b32:lossy-aggressive", "':lossy-aggressive' has 1 bits of magnitude: bfp2"),
        ("bfp3b32:0011223344", "it takes 2 to 4 levels, two hexadecimal digits each, and ':0011223344' has 10 digits"),
        ("bfp3b32:00", "it takes 2 to 4 levels"),
        ("bfp3b32:00332211", "the levels [0, 51, 34, 17] do not rise"),
        ("bfp2b32:10203040+unsigned", "the first level is 16, and '+unsigned' has 0 there"),
        ("bfp2b32:80001020+se5m2", "the first level is -128, and the least is -127"),
        ("bfp4b32:gauss+se5m2", "under '+se5m2' a codebook has at most 8 levels: widths 2 and 3"),
        ("bfp3b32:lossy-lite+se5m2", "':lossy-lite' has magnitudes"),
        ("bfp3b32+se5m2", "'+se5m2', a scale with a sign, needs a codebook"),
        ("bfp3b32:gauss+unsigned+se5m2", "'+se5m2', a scale with a sign, and '+unsigned' exclude each other"),
        ("bfp4b32:gauss+twos", "codebooks have a sign and a level, not '+twos'"),
        ("bfp4b32:gauss+sr", "'+sr' does not go with a codebook"),
        ("bfp4b32+e5m3+search+absmax", "option '+absmax' excludes '+search'"),
        ("bfp4b32+absmax", "'+absmax' puts the largest value at the top level, for which a power of two is too coarse"),
        ("bfp4b32+e5m3+absmax+sr", "'+absmax' may clip the largest value, which would bias '+sr'"),
        ("bfp4b32:learned+e5m3+absmax", "':learned' levels are fitted after the scale"),
        ("bfp2b32:8190c0f0+se5m2+absmax", "'+absmax' puts the largest value at the top level, which is -16"),
        ("bfp4b32+search+sr", "'+search' weighs errors of rounding to nearest, not of '+sr'"),
        ("bfp4b32+twos+unsigned", "option '+unsigned' excludes '+twos'"),
        ("bfp4b32+e5+e4", "option '+e4' excludes '+e5'"),
        ("bfp4b32+e8", "unknown option '+e8'"),
        ("bfp4b32+sr+e5", "its options are out of order, which is '+e5+sr'"),
        ("bfp4b8+o8", "8 outliers leave none of a block's 8 values"),
        ("bfp4b8+o1t14", "an outlier is at most 2^13 times the rest"),
        ("bfp4b8+o0", "unknown option '+o0'"),
        ("bfp4b3x5", "the block is 3 x 5 values"),
        ("bfp4b0x8", "the block is 0 x 8 values"),
        ("bfp04b32", "it is not of that shape"),
        ("bfp4b" + "9" * 5000, "it is not of that shape"),
        ("bfp4b32\n", "it is not of that shape"),
        ("fp8", "it is not of that shape"),
        ("", "it is not of that shape"),
        (None, "it is not of that shape"),
    ],
)
def test_a_refusal_shows_the_text_the_reason_and_what_is_legal(text, reason):
    with pytest.raises(FormatError) as caught:
        BFPFormat.parse(text)
    message = str(caught.value)
    assert message.startswith(f"format {text!r} cannot be: {reason}")
    assert "width one of 2, 3, 4, 5, 6, 7, 8, block one of 8, 16, 32, 64, 128 or " in message
    assert "codebook one of gauss, learned, lossy-lite, " in message
    assert "option one of +twos, +unsigned, +e6m2, " in message


def test_fields_are_checked_like_texts():
    with pytest.raises(FormatError, match="format 'bfp9b32' cannot be: the width is 9"):
        BFPFormat(9, 32)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("bfp4b8", "rows", 3),
        ("bfp4b8", "scale", "e3"),
        ("bfp4b8", "rounding", "up"),
        ("bfp4b8", "dither", "gaussian"),
        ("bfp4b8", "outlier_threshold", 1),
        ("bfp4b8", "outliers", -1),
    ],
)
def test_fields_that_no_text_has_are_refused(text, field, value):
    with pytest.raises(FormatError, match=f"cannot be: .*{value}|needs outliers"):
        dataclasses.replace(BFPFormat.parse(text), **{field: value})


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("bfp4b32", "bfp4b32+unsigned"),
        ("bfp4b32+unsigned", "bfp4b32+unsigned"),
        ("bfp4b32+twos+e5m3+sr", "bfp4b32+unsigned+e5m3+sr"),
        ("bfp4b32:gauss+e5m3+search+o1", "bfp4b32:gauss+unsigned+e5m3+search+o1"),
        ("bfp5b32:gauss+e5m3", "bfp5b32+unsigned+e5m3"),
        ("bfp3b32:lossy-lite", "bfp3b32+unsigned"),
        ("bfp3b32:gauss+se5m2+search", "bfp3b32:gauss+unsigned+e5m3+search"),
    ],
)
def test_the_form_for_values_that_are_never_negative(text, other):
    assert str(BFPFormat.parse(text).for_non_negative()) == other


def test_sizes_of_narrow_scales_outliers_and_levels():
    fmt = BFPFormat.parse("bfp3b64:learned+e5+o2")
    assert fmt.bits_per_value == 3 + (5 + 2 * 16) / 64
    assert [(p.name, p.dtype, p.length) for p in fmt.planes(9 * 64)] == [  # 9 blocks: two groups of scales
        ("code16", "int16", 72),
        ("code8", "uint8", 72),
        ("scale32", "int32", 2),
        ("scale8", "uint8", 2),
        ("outlier", "int16", 18),
        ("level", "uint8", 4),
    ]


def test_tiles_fill_up_rows_and_columns():
    fmt = BFPFormat.parse("bfp4b4x8")
    assert (fmt.block, fmt.rows, fmt.columns) == (32, 4, 8)
    assert fmt.stored_numel([3, 5, 9]) == 16 * 16
    assert fmt.stored_numel([]) == 32
    assert BFPFormat.parse("bfp4b32").stored_numel([3, 5, 9]) == 135


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_even_levels_know_no_factor_but_a_scale_rounded_up_does(fmt):
    assert fmt.peak_factor == 1.0
    for text in ("+e5m3", "+sr"):
        up = BFPFormat.parse(str(fmt) + text)
        exact = Fraction(2) ** (up.magnitude_bits - 1) / Fraction(up.peak_steps)
        assert exact <= Fraction(up.peak_factor) < exact + Fraction(1, 2**22)
        assert up.peak_factor == struct.unpack("f", struct.pack("f", up.peak_factor))[0] <= 1


def test_sizes_with_the_arithmetic_in_view():
    fmt = BFPFormat.parse("bfp5b32")
    assert fmt.bits_per_value == 5.25
    assert [(p.name, p.dtype, p.length, p.n_bytes) for p in fmt.planes(100)] == [  # 4 blocks of 4 groups
        ("code32", "int32", 16, 64),
        ("code8", "uint8", 16, 16),
        ("exponent", "uint8", 4, 4),
    ]
    assert fmt.stored_bytes(100) == 64 + 16 + 4
    assert fmt.stored_bytes(0) == 0


@given(formats, st.integers(0, 10**12))
def test_stored_bytes_are_the_planes_bytes_and_near_the_bits_per_value(fmt, numel):
    stored = fmt.stored_bytes(numel)
    assert stored == sum(plane.n_bytes for plane in fmt.planes(numel))
    assert 0 <= 8 * stored - numel * fmt.bits_per_value < fmt.block * fmt.bits_per_value


@given(formats, st.integers(0, 10**12))
def test_sizes_may_be_symbolic(fmt, numel):
    n = sympy.Symbol("n", integer=True, nonnegative=True)
    assert fmt.stored_bytes(n).subs(n, numel) == fmt.stored_bytes(numel)
    symbolic = [plane.length.subs(n, numel) for plane in fmt.planes(n)]
    assert symbolic == [plane.length for plane in fmt.planes(numel)]


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_bounds_shrink_with_the_width(fmt):
    assert fmt.error_bound() == (1.5 * 2.0**-fmt.width if fmt.unsigned else 2.0 ** (1 - fmt.width))
    assert fmt.error_bound("bfloat16") == fmt.error_bound() + (2**-8 if fmt.width == 8 and fmt.unsigned else 0)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_loads_neither_torch_nor_triton():
    ran = run("import sys, fxpipe.triton_kernels; print({'torch', 'triton', 'numpy'} & set(sys.modules))")
    assert ran.stdout == "set()\n", ran.stderr


def test_the_operators_load_no_triton_kernel():
    ran = run("import sys, fxpipe.triton_kernels.ops; print([m for m in sys.modules if m.startswith('triton')])")
    assert ran.stdout == "[]\n", ran.stderr


def test_the_package_refuses_its_bare_name():
    root = Path(fxpipe.triton_kernels.__file__).parents[1]
    ran = run(f"import sys; sys.path.insert(0, {str(root)!r}); import triton_kernels")
    assert "ImportError: this folder is the package fxpipe.triton_kernels; import it under that name" in ran.stderr
