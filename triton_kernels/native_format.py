"""A format as ``bfp.c`` reads it: the struct ``Format`` of ``bfp_numbers.h``, filled in from ``BFPFormat``."""

import ctypes
import itertools
from collections.abc import Sequence
from functools import lru_cache

from . import coding
from .format import DTYPES, BFPFormat

EVEN, FRACTION, CODEBOOK = range(3)
NOISES = {"sr": 1, "hash": 2}
DITHERS = ("", "uniform", "density")
MAX_LEVELS, MAX_OFFSETS = 16, 8

_NUMBERS = ctypes.c_int32
_BYTES = ctypes.c_uint8 * MAX_LEVELS


class NativeFormat(ctypes.Structure):
    """``Format`` of ``bfp_numbers.h``, field by field."""

    _fields_ = (
        *((name, _NUMBERS) for name in (
            "dtype", "width", "block", "is_unsigned", "twos", "magnitude_bits", "grid_bits", "coding", "noise", "dither",
            "scale_bits", "scale_base", "scale_shift", "scale_nan", "least_scale", "scale_addend", "zero_scale",
        )),
        ("peak_factor", ctypes.c_float),
        *((name, _NUMBERS) for name in ("outliers", "outlier_threshold", "clamps", "n_offsets")),
        ("offsets", _NUMBERS * MAX_OFFSETS),
        *((name, _NUMBERS) for name in ("n_levels", "signed_levels", "first_level")),
        ("edges", _BYTES),
        ("rises", _BYTES),
        ("cells", ctypes.c_int16 * (2 * MAX_LEVELS) * 2),
    )  # fmt: skip


@lru_cache(maxsize=256)
def native_format(fmt: BFPFormat, dtype: str, levels: tuple[int, ...]) -> NativeFormat:
    """``fmt`` for values of the torch dtype of that name; ``levels`` those of its codebook, if it has one."""
    scale = fmt.scale_kind
    offsets = fmt.search_offsets
    native = NativeFormat(
        dtype=DTYPES.index(dtype), width=fmt.width, block=fmt.block, is_unsigned=fmt.unsigned, twos=fmt.twos,
        magnitude_bits=fmt.magnitude_bits, grid_bits=fmt.grid_bits,
        coding=CODEBOOK if fmt.codebook else EVEN if fmt.rounding == "nearest" else FRACTION,
        noise=NOISES.get(fmt.rounding, 0), dither=DITHERS.index(fmt.dither),
        scale_bits=scale.bits, scale_base=scale.base, scale_shift=scale.shift, scale_nan=scale.nan,
        least_scale=fmt.least_scale(dtype), scale_addend=fmt.scale_addend, zero_scale=fmt.zero_scale,
        peak_factor=fmt.peak_factor, outliers=fmt.outliers, outlier_threshold=fmt.outlier_threshold,
        clamps=not fmt.is_basic, n_offsets=len(offsets), offsets=(_NUMBERS * MAX_OFFSETS)(*offsets),
    )  # fmt: skip
    if levels:
        _set_levels(native, fmt, levels)
    return native


def _set_levels(native: NativeFormat, fmt: BFPFormat, levels: Sequence[int]) -> None:
    grid = fmt.level_grid
    edges = [(a + b) // 2 - grid[0] for a, b in itertools.pairwise(levels)]
    rises = [b - a for a, b in itertools.pairwise(levels)]
    native.n_levels, native.signed_levels, native.first_level = fmt.n_levels, fmt.signed_levels, levels[0]
    native.edges = _BYTES(*edges, *[255] * (MAX_LEVELS - len(edges)))  # nothing lies above 255
    native.rises = _BYTES(*rises)
    for row, ends in zip(native.cells, coding.cells(levels, fmt), strict=True):
        row[: len(ends)] = ends
