"""What a kernel has to know of a format, as numbers. Imports no torch, no triton."""

import itertools
import math
from typing import NamedTuple, TypedDict

from . import codebooks
from .codebook_polynomials import Curve, Thresholds, curve
from .format import DTYPES, BFPFormat

ROUNDINGS = ("nearest", "trunc", "hash", "sr")
FLOAT32, BFLOAT16, FLOAT16 = range(3)
DEVICES = ("cuda",)
"""Where tensors go to the Triton kernels; PyTorch calls AMD's devices so too."""
_LARGEST_HALF = 65504.0


class Codec(NamedTuple):
    """One format for values of one dtype; the compile-time argument of the kernels."""

    width: int
    block: int
    magnitude_bits: int
    unsigned: bool
    twos: bool
    dtype: int  # of ``DTYPES``
    rounding: str
    grid_bits: int
    scale_shift: int  # bits(S) = (code + scale_base) << scale_shift
    scale_base: int
    scale_mantissa_bits: int
    scale_least: int
    scale_nan: int
    scale_signed: bool
    scale_zero: bool  # code 0 is S = 0
    scale_addend: int  # to the bits of the largest magnitude times the factor; 0: S is its power of two
    peak_factor: float
    codebook: bool
    levels: tuple[int, ...]  # one for each index, the last repeated; empty without a codebook
    thresholds: tuple[int, ...]  # n > thresholds[i]: the index is more than i
    ramp: tuple[float, ...]  # of 1.5 * 2^23 + n: slope and offset; this and the next two as in ``codebook_polynomials``
    knee: tuple[float, ...]  # of the ramp, or empty
    polynomial: tuple[float, ...]  # times the ramp, rounds to the index of a level; empty where there is none
    learned: bool  # the levels above are not those of the tensor
    first: tuple[int, ...]  # the least n of each index, where decoding is at random
    last: tuple[int, ...]  # the greatest
    dither: str
    outliers: int
    one_outlier: bool  # found by ``outlier_tiles`` when values are compressed
    outlier_threshold: int
    outlier_extra_bits: int
    inexact: bool  # decoded values have more bits than the dtype
    clip: bool  # decoded values may lie beyond float16's range, and are clipped to it
    run: int  # groups in a row that a thread compresses: 64 bytes of values
    packs: bool  # two floats are rounded to a pair of 16-bit ones by one instruction, NVIDIA's
    search: tuple[int, ...]  # the scale codes that are tried, relative to the first one's; empty without ``+search``
    search_limit: int  # n on the grid of codebooks is at most so much, where it may be more; else 0
    search_pairs: tuple[tuple[float, float], ...]  # levels two by two: the middle between them, and half their distance
    search_bytes: bool  # an error on the grid is at most 255

    def __repr__(self) -> str:
        """An expression that needs no import before it: Inductor writes it into the code that it generates."""
        return f"__import__({__name__!r}, fromlist=['Codec']).Codec{tuple(self)!r}"


def codec(fmt: BFPFormat, dtype: str, *, packs: bool) -> Codec:
    """The numbers of ``fmt`` for values of that dtype, one of ``DTYPES``."""
    scale = fmt.scale_kind
    levels = fmt.levels
    start = -128 if fmt.signed_levels else 0
    cells = _cells(fmt)
    fitted = _curve(fmt)
    return Codec(
        width=fmt.width,
        block=fmt.block,
        magnitude_bits=fmt.magnitude_bits,
        unsigned=fmt.unsigned,
        twos=fmt.twos,
        dtype=DTYPES.index(dtype),
        rounding=fmt.rounding,
        grid_bits=fmt.grid_bits,
        scale_shift=scale.shift,
        scale_base=scale.base,
        scale_mantissa_bits=scale.mantissa_bits,
        scale_least=fmt.least_scale(dtype),
        scale_nan=scale.nan,
        scale_signed=scale.signed,
        scale_zero=fmt.zero_scale,
        scale_addend=fmt.scale_addend,
        peak_factor=fmt.peak_factor,
        codebook=bool(levels),
        levels=(*levels, *levels[-1:] * (fmt.n_levels - len(levels))) if levels else (),
        thresholds=_thresholds(levels, start, fmt.unsigned),
        ramp=tuple(fitted.first) if fitted else (),
        knee=tuple(fitted.second or ()) if fitted else (),
        polynomial=fitted.coefficients if fitted else (),
        learned=fmt.codebook == "learned",
        first=cells[0],
        last=cells[1],
        dither=fmt.dither,
        outliers=fmt.outliers,
        one_outlier=has_one_outlier(fmt),
        outlier_threshold=fmt.outlier_threshold,
        outlier_extra_bits=fmt.outlier_extra_bits,
        inexact=dtype == "bfloat16" and _significant_bits(fmt) > 8,
        clip=dtype == "float16" and not fmt.is_basic and _greatest(fmt) > _LARGEST_HALF,
        run=4 if packs and dtype != "float32" else 2,
        packs=packs,
        **_search(fmt),
    )


class _Search(TypedDict):
    search: tuple[int, ...]
    search_limit: int
    search_pairs: tuple[tuple[float, float], ...]
    search_bytes: bool


def _search(fmt: BFPFormat) -> _Search:
    levels, far = fmt.levels[fmt.unsigned :], _farthest(fmt)
    if not fmt.search or not levels:
        return {
            "search": fmt.search_offsets if fmt.search else (),
            "search_limit": 0,
            "search_pairs": (),
            "search_bytes": False,
        }
    limit = 2 * fmt.level_grid[-1] + 1
    least = -min(far, limit) if fmt.signed_levels else 0
    errors = [min(far, limit) - levels[-1], levels[0] - least, *(b - a for a, b in itertools.pairwise(levels))]
    pairs = itertools.zip_longest(levels[::2], levels[1::2])
    return {
        "search": fmt.search_offsets,
        "search_limit": limit if far > limit else 0,
        "search_pairs": tuple((float(a), 0.0) if b is None else ((a + b) / 2, (b - a) / 2) for a, b in pairs),
        "search_bytes": max(errors) <= 255,
    }


def _farthest(fmt: BFPFormat) -> int:
    """No value is more steps than so many from zero, whichever scale is tried."""
    scale, least = fmt.scale_kind, min(fmt.search_offsets)
    codes = range(scale.least - least, scale.least - least + (1 << scale.mantissa_bits))
    ratio = max(scale.value(code) / scale.value(code + least) for code in codes)
    first = 2.0**fmt.grid_bits if fmt.scale_rounding == "down" else fmt.peak_steps
    return math.ceil(first * ratio)


def has_one_outlier(fmt: BFPFormat) -> bool:
    """Whether a block's largest value is its outlier, and its scale that of the others: the case with faster tiles."""
    return fmt.outliers == 1 and not (fmt.unsigned or fmt.signed_levels or fmt.search)


def why_not_fused(fmt: BFPFormat) -> str:
    """Which part of ``fmt`` the kernels that compute the values too do not know."""
    if fmt.compress_needs_seed:
        return "a seed"
    if fmt.codebook == "learned":
        return "levels learned from the values"
    return "tiles of rows" if fmt.rows else ""


def _thresholds(levels: tuple[int, ...], start: int, unsigned: bool) -> tuple[int, ...]:
    """The greatest byte n - start that is nearest to each level but the last; positive ones go to no level of zero."""
    edges = [(a + b) // 2 - start for a, b in itertools.pairwise(levels)]
    return (0, *edges[1:]) if unsigned and edges else tuple(edges)


def _cells(fmt: BFPFormat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not (fmt.codebook and fmt.dither):
        return (), ()
    ends = codebooks.cells(
        fmt.levels, fmt.n_levels, fmt.level_grid, signed=fmt.signed_levels, first_is_zero=fmt.unsigned
    )
    return tuple(ends[0]), tuple(ends[1])


def _curve(fmt: BFPFormat) -> Curve | None:
    """None where comparing is as fast, or zeros have no sign."""
    thresholds = _thresholds(fmt.levels, 0, fmt.unsigned)
    if len(thresholds) < 3 or fmt.codebook == "learned" or (fmt.levels[0] == 0 and not fmt.unsigned):
        return None
    if fmt.signed_levels:
        return curve(Thresholds(thresholds, -128, 128))
    return curve(Thresholds(thresholds[fmt.unsigned :], 0, 256))


def _significant_bits(fmt: BFPFormat) -> int:
    """Most significant bits of a decoded value."""
    mantissa_bits = fmt.scale_kind.mantissa_bits
    if fmt.dither:
        return 24
    if fmt.outliers:
        return 1 + fmt.magnitude_bits + fmt.outlier_extra_bits
    return fmt.grid_bits + (fmt.unsigned and not fmt.codebook) + (mantissa_bits and 1 + mantissa_bits)


def _greatest(fmt: BFPFormat) -> float:
    """More than any decoded value."""
    return fmt.scale_kind.value(fmt.scale_kind.nan - 1) * (2.0**14 if fmt.outliers else 2.0)
