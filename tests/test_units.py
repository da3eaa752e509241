import pytest
from hypothesis import given, strategies as st

from fxpipe import units
from fxpipe.errors import OptionError


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.parse_bytes, "0", 0),
        (units.parse_bytes, "512", 512),
        (units.parse_bytes, "512B", 512),
        (units.parse_bytes, "12GiB", 12 * 1024**3),
        (units.parse_bytes, " 80 GB ", 80 * 10**9),
        (units.parse_bytes, "1.5KiB", 1536),
        (units.parse_bytes, "0.1 PB", 10**14),
        (units.parse_bytes, "1e3", 1000),
        (units.parse_bytes_per_second, "12GB/s", 12e9),
        (units.parse_bytes_per_second, "1 GiB/s", 1024.0**3),
        (units.parse_seconds, "3.2 ms", 0.0032),
        (units.parse_seconds, "5us", 5e-6),
        (units.parse_seconds, "2", 2.0),
        (units.parse_flops, "2.1 TFLOP", 2_100_000_000_000),
        (units.parse_flops_per_second, "312 TFLOP/s", 312e12),
    ],
)
def test_reads_exactly(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            units.parse_bytes,
            "12Gb",
            r"'12Gb' is not a number of bytes; .* B, KiB, MiB, GiB, TiB, PiB, KB, MB, GB, TB, PB",
        ),
        (units.parse_bytes, "", "'' is not a number of bytes"),
        (units.parse_bytes, "-1GiB", "'-1GiB' is not a number of bytes"),
        (units.parse_bytes, "nan", "'nan' is not a number of bytes"),
        (units.parse_bytes, "1_000", "'1_000' is not a number of bytes"),
        (units.parse_bytes, "1e9999", "'1e9999' is not a number of bytes"),
        (units.parse_bytes, "12GB/s", "'12GB/s' is not a number of bytes"),
        (units.parse_bytes, "0.3 B", r"'0\.3 B' is 0\.3, not a whole number"),
        (units.parse_bytes_per_second, "12GB", r"'12GB' is not a bandwidth; .* GB/s"),
        (units.parse_seconds, "3 sec", "'3 sec' is not a time; write a number and one of the units ns, us, ms, s"),
        (units.parse_flops, "2 Tflops", r"'2 Tflops' is not a number of operations; .* TFLOP"),
        (units.parse_flops_per_second, "2 TFLOP", r"'2 TFLOP' is not a compute rate; .* TFLOP/s"),
    ],
)
def test_refuses_and_lists_the_units(read, text, message):
    with pytest.raises(OptionError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.format_bytes, 0, "0 B"),
        (units.format_bytes, 1023, "1023 B"),
        (units.format_bytes, 1536, "1.50 KiB"),
        (units.format_bytes, 1024**2 - 1, "1.00 MiB"),
        (units.format_bytes, 12 * 1024**3, "12.0 GiB"),
        (units.format_bytes, 5 * 1024**6, "5120 PiB"),
        (units.format_bytes_per_second, 12e9, "12.0 GB/s"),
        (units.format_seconds, 0, "0 s"),
        (units.format_seconds, 0.0032, "3.20 ms"),
        (units.format_seconds, 0.99999, "1.00 s"),
        (units.format_seconds, 59.96, "60.0 s"),
        (units.format_flops, 2_100_000_000_000, "2.10 TFLOP"),
    ],
)
def test_writes_three_digits(write, value, text):
    assert write(value) == text


@given(st.integers(0, 10**17))
def test_bytes_read_back_within_the_digits_written(n_bytes):
    value, unit = units.format_bytes(n_bytes).split()
    assert float(value) * float(units.BYTES[unit]) == pytest.approx(n_bytes, rel=0.006)


@given(st.floats(1e-9, 1e6))
def test_seconds_read_back_within_the_digits_written(seconds):
    assert units.parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=0.006)
