"""Bytes, seconds and operations as people write them: ``12GiB``, ``80 GB``, ``12GB/s``, ``3.2 ms``, ``2.1 TFLOP``.

``KiB``, ``MiB``, ... are powers of 1024; ``KB``, ``MB``, ... powers of 1000. Upper and lower case differ, so that
no bit is taken for a byte. Reading is exact: ``2.1 TFLOP`` is 2,100,000,000,000. Writing keeps three digits.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

from fxpipe.errors import OptionError

PREFIXES = ("K", "M", "G", "T", "P")
BINARY_BYTES = {"B": Fraction(1), **{f"{p}iB": Fraction(1024 ** (k + 1)) for k, p in enumerate(PREFIXES)}}
BYTES = {**BINARY_BYTES, **{f"{p}B": Fraction(1000 ** (k + 1)) for k, p in enumerate(PREFIXES)}}
SECONDS = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": Fraction(1)}
FLOPS = {"FLOP": Fraction(1), **{f"{p}FLOP": Fraction(1000 ** (k + 1)) for k, p in enumerate(PREFIXES)}}

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?)\s*([A-Za-z/]*)\s*")


def parse_bytes(text: str) -> int:
    """``12GiB`` -> 12884901888. A bare number is bytes. Raises OptionError for another unit or a part of a byte."""
    return _whole(text, _parse(text, BYTES, "a number of bytes"))


def parse_bytes_per_second(text: str) -> float:
    """``12GB/s`` -> 12e9. A bare number is bytes per second."""
    return float(_parse(text, _per_second(BYTES), "a bandwidth"))


def parse_seconds(text: str) -> float:
    """``3.2 ms`` -> 0.0032. A bare number is seconds."""
    return float(_parse(text, SECONDS, "a time"))


def parse_flops(text: str) -> int:
    """``2.1 TFLOP`` -> 2100000000000. A bare number is single operations."""
    return _whole(text, _parse(text, FLOPS, "a number of operations"))


def parse_flops_per_second(text: str) -> float:
    """``312 TFLOP/s`` -> 312e12. A bare number is operations per second."""
    return float(_parse(text, _per_second(FLOPS), "a compute rate"))


def format_bytes(n_bytes: float) -> str:
    """1536 -> ``1.50 KiB``; whole bytes below 1024 stand as they are."""
    return _format(n_bytes, BINARY_BYTES)


def format_bytes_per_second(rate: float) -> str:
    """12e9 -> ``12.0 GB/s``: bandwidths are quoted in powers of 1000."""
    return _format(rate, {unit: scale for unit, scale in _per_second(BYTES).items() if "i" not in unit})


def format_seconds(seconds: float) -> str:
    """0.0032 -> ``3.20 ms``."""
    return _format(seconds, SECONDS)


def format_flops(flops: float) -> str:
    """2100000000000 -> ``2.10 TFLOP``."""
    return _format(flops, FLOPS)


def _per_second(units: Mapping[str, Fraction]) -> dict[str, Fraction]:
    return {f"{unit}/s": scale for unit, scale in units.items()}


def _parse(text: str, units: Mapping[str, Fraction], expected: str) -> Fraction:
    match = _QUANTITY.fullmatch(text)
    if not match or (match[2] and match[2] not in units):
        raise OptionError(f"{text!r} is not {expected}; write a number and one of the units {', '.join(units)}")
    return Fraction(match[1]) * units.get(match[2], Fraction(1))


def _whole(text: str, value: Fraction) -> int:
    if value.denominator != 1:
        raise OptionError(f"{text!r} is {float(value):g}, not a whole number")
    return int(value)


def _format(value: float, units: Mapping[str, Fraction]) -> str:
    """Three digits in the smallest unit that keeps them below the next one; a small whole count as it is."""
    unit, scale = _unit_for(value, sorted(units.items(), key=lambda item: item[1]))
    if scale == 1 and abs(value) < 1024 and value == int(value):
        return f"{int(value)} {unit}"
    return f"{_three_digits(value / float(scale))} {unit}"


def _unit_for(value: float, ascending: list[tuple[str, Fraction]]) -> tuple[str, Fraction]:
    if not value:
        return next(item for item in ascending if item[1] == 1)
    for (unit, scale), (_, larger) in pairwise(ascending):
        if abs(float(_three_digits(value / float(scale)))) * scale < larger:
            return unit, scale
    return ascending[-1]


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"
