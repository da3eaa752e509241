"""The notation, the sizes and the bounds of formats."""

import subprocess
import sys
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
    assert message.startswith(f"format {text!r} cannot be: {reason}; ")
    assert "width one of 2, 3, 4, 5, 6, 7, 8, block one of 8, 16, 32, 64, 128 or " in message
    assert "codebook one of gauss, learned, lossy-lite, " in message
    assert "option one of +twos, +unsigned, +e6m2, " in message


def test_fields_are_checked_like_texts():
    with pytest.raises(FormatError, match="format 'bfp9b32' cannot be: the width is 9"):
        BFPFormat(9, 32)


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
