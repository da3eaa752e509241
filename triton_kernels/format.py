"""Block floating-point formats: what they are called, where every bit lies, how large they are, how far they are off.

Imports neither torch nor triton. Keeping activations for backward in block floating-point, with outliers apart:
US20200210839A1. Codes whose levels are not evenly spaced, and decoding at random within a code's cell: US12277502B2.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from . import codebooks
from .grammar import BLOCKS, WIDTHS, FormatError, fields_of, refusal, text_of
from .impossible import why_not
from .planes import GROUP, GROUP_PLANES, Plane
from .scales import EXPONENT_MIN, SCALES, Scale

__all__ = ["BLOCKS", "DTYPES", "EXPONENT_MIN", "EXPONENT_NAN", "GROUP", "WIDTHS", "BFPFormat", "FormatError", "Plane"]

DTYPES = ("float32", "bfloat16", "float16")

EXPONENT_NAN = 255
"""The scale ``e8`` of a block that held a NaN or an infinity."""

FRACTION_BITS = 8
"""Bits of the fraction of a step that the roundings other than nearest look at."""

OUTLIER_EXPONENT_BITS = 4
OUTLIER_BIAS = 2
"""An outlier's exponent field e stands for the scale's exponent + e - 2; e = 0 marks an entry that is not used."""

LEARNED_BLOCKS = 1024
LEARNED_ROUNDS = 8
"""``:learned`` fits its levels to at most so many blocks, evenly spaced, in at most so many rounds of Lloyd's algorithm."""


@dataclass(frozen=True)
class BFPFormat:
    """A block floating-point format: ``width`` bits a value, ``block`` values under one scale.

    The text is ``bfp{width}b{block}``, then a codebook, then options in this order; ``parse`` inverts ``str``::

        bfp4b32  bfp4b4x8      blocks of 32 values in a row; of 4 rows by 8 columns
        :gauss :learned :00123f...  :lossy-lite :lossy-normal :lossy-aggressive       a codebook
        +twos | +unsigned      two's complement; for values that are never negative
        +e6m2 | +se5m2 | +e5m3 | +e5 | +e4     the scale, see ``scales``; none of them is e8, a power of two
        +search | +absmax      the scale of least squared error among a few; that which puts the largest value at the top level
        +sr | +hash | +trunc   stochastic rounding from a seed; from the value's own bits; truncation. None: nearest
        +o2 | +o2t3            the 2 largest values of a block apart; only those 2^3 times as large as the rest
        +dither | +dither-density   decoded at random in the code's cell, evenly or rather towards zero; from a seed

    **Blocks** are runs of ``block`` consecutive values of the flattened tensor; a last dimension that is no multiple of
    ``block`` runs on into the next row. ``b{R}x{C}`` (``rows`` = R) are tiles of the matrix whose rows are the last
    dimension, and whose row and column numbers are filled up to multiples; ``b32x1`` are columns, ``b1x32`` rows that do not
    run on. Tiles are stored row by row of tiles, each row by row. The last block is filled up with zeros. An empty tensor
    has empty planes.

    **The scale** S of a block (``scales`` has the bits) comes from its largest magnitude a. A step is S * 2^-(M-1) with M
    bits of magnitude, so a power of two S has a in [2^(M-1), 2^M) steps::

        e8 e5 e4, nearest or +trunc     S = 2^floor(log2 a)
        +sr, +hash, or a float scale    S = the least scale >= fl(a * ``peak_factor``), for which the largest value lies
                                        at most at the top of the range and is not clipped

        +absmax                         S = the nearest scale to fl(a * ``peak_factor``), ties to the greater, for which
                                        the largest value lies near the top level, and is clipped to it if it is above

    S is at least the scale's least: blocks below it, denormals among them, have its steps. A block that holds a NaN or an
    infinity, or whose S is too large for the scale, has the scale of all ones and codes 0, and decodes to NaN as a whole.

    ``+search`` tries the scales ``search_offsets`` codes away, each kept in the scale's range, and takes the first whose
    squared error is least, in integers: the sum over the block of min(|n - level|, 2047)^2, where n is x in 1/16 steps to
    nearest even and level the decoded value in 1/16 steps (codebooks: n and level on the grid, n at most 511), times
    S squared. Outliers do not count.

    **Codes**, with t = x * R * 2^(M-1), R = fl(1/S), the product exact::

        signed      M = W-1   q = t to the nearest integer, ties to even, clipped to -(2^M-1) .. 2^M-1; decodes to q steps
        +unsigned   M = W     c = 0 where x is zero (or below it), else 1 + (fl(t - 1/2) to the nearest integer, ties to
                              even), clipped to 1 .. 2^M-1; decodes to c - 1/2 steps, c = 0 to zero
        +trunc +sr +hash      n = 256 |t| to nearest even; signed |q| = (n + u) >> 8, unsigned c = (n + 128 + u) >> 8,
                              clipped as above; u is 0, or a random byte (``rounding``) of the value
        :codebook   M = 8     n = |t| to nearest even, at most 255; c is the index of the nearest of the 2^(W-1) levels
                              (unsigned 2^W, the first 0 and for zeros alone), ties to the lower; decodes to level steps
        :codebook+se5m2       M = 7     S has the sign of the block's largest value, minus if -x is larger than any x;
                              n = t to nearest even, in -127 .. 127; c is the index of the nearest of 2^W levels

    With ``+unsigned`` decoded values are zero exactly where the stored ones were, so the mask that a ReLU's backward
    takes from its output survives. Signed zeros lose their sign. Signed codebooks need not have a level of zero; those that
    have none decode zeros to their least level, but a block of zeros alone has scale code 0, which stands for S = 0 . A zero
    that is decoded has the sign of level times S, as floats multiply.

    ``+unsigned`` in float16 has an S large enough that half a step is a float16 (``least_scale``). Decoding computes in
    float32 and rounds once to the dtype asked for, to nearest even, float16 clipped to its finite range.

    **Dither**: a random byte v of the value replaces the middle of its cell: the magnitude decodes to
    |q| + (v + 1/2)/256 - 1/2 steps (``+unsigned``: c - 1 + (v + 1/2)/256), with a codebook to a + (v (b - a + 1) >> 8) for
    the code's n of a .. b, the top level's b as far above it as a is below, 255 at most. Codes 0 of ``+unsigned`` and
    levels of 0 stay. ``+dither-density`` takes the lesser of two bytes where the second is odd (but for q = 0), so that the
    density falls to a third across a cell, away from zero.

    **Bits.** Eight values are a group. Value j of a group has the bits [W*j, W*j + W) of the group's W bytes, little
    end first; the code of a signed value is its magnitude in the low M bits and its sign above them::

        bfp4b32       byte 0      byte 1      byte 2      byte 3
                      s111 s000   s333 s222   s555 s444   s777 s666         high bit on the left; s sign, jjj magnitude

        bfp3b32       byte 0      byte 1      byte 2
                      22s1 1s00   5s44 s33s   s77s 66s5

        +unsigned     as drawn, with a bit of magnitude in the place of s
        +twos         as drawn, q modulo 2^W
        :codebook     as drawn, with the level's index in the place of the magnitude; no sign where the level is 0

    The W bytes are split into aligned parts of 4, 2 and 1 bytes, low bytes first, each in a plane of its own, so that
    every width loads and stores aligned; after these planes come the scales, one uint8 a block::

        W             2       3           4       5          6           7                8
        code32                            int32   int32      int32       int32            2 x int32
        code16        int16   int16                          int16       int16
        code8                 uint8               uint8                  uint8

    Scales of 5 and 4 bits (``+e5``, ``+e4``) are packed like codes of that width, eight blocks to a group, the last group
    filled up with zeros: planes ``scale32`` and ``scale8``. The signed code "minus zero" is never written, and decodes to 0
    where codes are uniform.

    **Outliers** (``+o{k}``): the k values of a block with the largest keys (magnitude's bits, the low 7 replaced by 127 -
    index) do not count for a. With ``t{j}``, only those at least 2^j times the largest of the others. An outlier keeps
    1 + M + X significant bits, X = 12 - log2(block): its code is its sign and the M mantissa bits after the leading
    one (``+unsigned``: W), and its entry in plane ``outlier``, 16 bits, k a block, largest first, the rest::

        +o1, b32      eeee xxxx xxxi iiii     e exponent, relative to that of S, plus 2; x mantissa; i index in the block

    Its mantissa is rounded to nearest even. e is 1 .. 15, and S at least 2^-13 of every outlier; e = 0 marks an entry that
    is not used, where the value is zero or lies below S/2 and is coded like the others.

    **Codebooks** are levels on a grid of 255 (``codebooks``). Explicit ones are 2 hexadecimal digits a level, from 2 levels to
    as many as there are codes; codes beyond them decode to the last. Under ``+se5m2`` levels have their signs, on a grid
    of 127: two's complement bytes, and the code is the level's index.

    ``:learned`` has the plane ``level``, uint8, one level for each code or magnitude, fitted to the tensor itself
    (``codebooks.fit``, from the Gaussian levels): to every s-th block, s the least that leaves at most 1024 of them.

    Raises:
        FormatError: no format has these fields; the message lists the legal ones.
    """

    width: int
    block: int
    unsigned: bool = False
    rows: int = 0
    codebook: str = ""
    twos: bool = False
    scale: str = "e8"
    search: bool = False
    absmax: bool = False
    rounding: str = "nearest"
    outliers: int = 0
    outlier_threshold: int = 0
    dither: str = ""

    def __post_init__(self) -> None:
        reason = why_not(**_fields(self))
        if reason:
            raise refusal(str(self), reason)

    def __str__(self) -> str:
        return text_of(_fields(self))

    @staticmethod
    def parse(text: str) -> "BFPFormat":
        """The format that ``text`` names: ``BFPFormat.parse(str(f)) == f``, and ``str(BFPFormat.parse(t)) == t``.

        Raises:
            FormatError: ``text`` is not the text of a format.
        """
        return _parse(text)

    def for_non_negative(self) -> "BFPFormat":
        """The format of this family for values that are never negative: ``+unsigned``, the sign's bit used for magnitude.

        Two's complement is dropped, and so is a codebook that has no sign-free form of one bit more; ``+se5m2`` becomes
        ``+e5m3``.
        """
        if self.unsigned:
            return self
        has_form = self.codebook in ("gauss", "learned") and self.width <= codebooks.MAX_BITS
        codebook, scale = self.codebook if has_form else "", "e5m3" if self.signed_levels else self.scale
        return replace(self, unsigned=True, twos=False, codebook=codebook, scale=scale)

    # What it means

    @property
    def is_basic(self) -> bool:
        """Whether the format is one of width, block, rows and ``+unsigned`` alone."""
        return self == BFPFormat(self.width, self.block, self.unsigned, self.rows)

    @property
    def magnitude_bits(self) -> int:
        """M: bits of a code that are not the sign."""
        return self.width if self.unsigned else self.width - 1

    @property
    def grid_bits(self) -> int:
        """M of the grid that values are rounded to: 8 with a codebook."""
        if self.codebook:
            return codebooks.GRID_BITS - self.signed_levels
        return self.magnitude_bits

    @property
    def signed_levels(self) -> bool:
        """Whether a codebook's levels have their signs, because the scale has that of the largest value."""
        return self.scale_kind.signed

    @property
    def n_levels(self) -> int:
        """Levels of a full codebook: one for each code, or each magnitude."""
        return 1 << (self.width if self.signed_levels else self.magnitude_bits)

    @property
    def level_grid(self) -> range:
        """The integers that a codebook's levels are among."""
        return codebooks.SIGNED_GRID if self.signed_levels else codebooks.GRID

    @property
    def scale_kind(self) -> Scale:
        """How S is stored."""
        return SCALES[self.scale]

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of the codebook, rising, on the grid of 255; empty without one; where ``:learned`` starts from."""
        return _levels(self)

    @property
    def zero_scale(self) -> bool:
        """Whether a block of zeros has scale code 0, because none of its codes decodes to zero."""
        if not self.codebook or self.unsigned:
            return False
        return self.signed_levels or self.codebook == "learned" or self.levels[0] > 0

    @property
    def scale_rounding(self) -> str:
        """``nearest`` with ``+absmax``; ``up`` where the largest value is not to be clipped; ``down`` to a's power of two."""
        if self.absmax:
            return "nearest"
        return "up" if self.scale_kind.mantissa_bits > 0 or self.rounding in ("sr", "hash") else "down"

    @property
    def scale_addend(self) -> int:
        """What is added to the bits of fl(a * ``peak_factor``), a float32, before those that S does not have are dropped."""
        one = 1 << self.scale_kind.shift
        return {"down": 0, "nearest": one >> 1, "up": one - 1}[self.scale_rounding]

    @property
    def peak_factor(self) -> float:
        """The float32 that a block's largest magnitude is multiplied by before it is rounded to a scale.

        2^(M-1) over ``peak_steps``, rounded up, with ``+absmax`` to nearest; 1 where S is rounded down.
        """
        if self.scale_rounding == "down":
            return 1.0
        exact = 2.0 ** (self.grid_bits - 1) / self.peak_steps
        if self.absmax:
            mantissa, exponent = math.frexp(exact)
            return math.ldexp(round(mantissa * 2**24), exponent - 24)
        return math.ceil(exact * 2**24 + 1) / 2**24 if exact < 1 else 1.0

    @property
    def peak_steps(self) -> float:
        """The steps that the largest value of a block is to have, or where S is rounded up the most that it may have.

        With ``+absmax`` the top level's; else half a step above where rounding goes to the nearest, and the top level's where
        it goes either way.
        """
        top = 2.0**self.grid_bits - 1
        if self.absmax:
            return float(self.levels[-1]) if self.codebook else top - 0.5 * self.unsigned
        either_way = self.rounding in ("sr", "hash")
        if self.unsigned and not self.codebook:
            return top - 0.5 if either_way else top
        return top if either_way else top + 0.5

    @property
    def search_offsets(self) -> tuple[int, ...]:
        """The scale codes that are tried, relative to the first one's."""
        if not self.search:
            return (0,)
        if self.scale_kind.mantissa_bits == 0:
            return (0, 1, -1) if self.magnitude_bits == 1 else (0, -1)
        if self.scale_kind.mantissa_bits == 2:
            return (0, 1, -1, 2, -2) if self.magnitude_bits == 1 else (0, 1, -1)
        return (0, 1, -1, 2, -2, 3, -3, -4) if self.magnitude_bits == 1 else (0, 1, -1, -2)

    def least_scale(self, dtype: str) -> int:
        """Least scale code that is written (but for a zero scale) for values of the torch dtype of that name."""
        return self.scale_kind.code_of_exponent(self.exponent_min(dtype))

    def exponent_min(self, dtype: str) -> int:
        """Least exponent (biased by 127) of S for values of the torch dtype of that name, one of ``DTYPES``."""
        if self.unsigned and dtype == "float16":
            return 103 + self.grid_bits + (FRACTION_BITS + 1 if self.dither else 0)
        return EXPONENT_MIN

    @property
    def compress_needs_seed(self) -> bool:
        """Whether compressing takes a seed."""
        return self.rounding == "sr"

    @property
    def decompress_needs_seed(self) -> bool:
        """Whether decompressing takes a seed."""
        return bool(self.dither)

    @property
    def outlier_index_bits(self) -> int:
        """Bits of an outlier's index in its block."""
        return self.block.bit_length() - 1

    @property
    def outlier_extra_bits(self) -> int:
        """X: bits of an outlier's mantissa that lie in its entry."""
        return 16 - OUTLIER_EXPONENT_BITS - self.outlier_index_bits

    # Sizes. Symbolic if the number of values is (torch.SymInt, sympy).

    @property
    def columns(self) -> int:
        """Columns of a tile; 0 where blocks are runs."""
        return self.block // self.rows if self.rows else 0

    @property
    def bits_per_value(self) -> float:
        """Stored bits for each value of a whole block, the shares of scale and outliers included."""
        return self.width + (self.scale_kind.bits + 16 * self.outliers) / self.block

    def stored_numel(self, shape: Sequence[int]) -> int:
        """Values that are stored for a tensor of that shape: of all tiles, or, where blocks are runs, its own."""
        if not self.rows:
            return math.prod(shape)
        n_rows, n_columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        return _whole(n_rows, self.rows) * self.rows * _whole(n_columns, self.columns) * self.columns

    def n_blocks(self, numel: int) -> int:
        """Blocks that hold ``numel`` values."""
        return _whole(numel, self.block)

    def planes(self, numel: int) -> tuple[Plane, ...]:
        """The planes that store ``numel`` values (``stored_numel``), in the order in which operators pass them."""
        n_blocks = self.n_blocks(numel)
        n_groups = n_blocks * (self.block // GROUP)
        planes = [Plane(p.name, p.dtype, p.length * n_groups, p.itemsize) for p in self.group_planes]
        planes += self._scale_planes(n_blocks)
        if self.outliers:
            planes.append(Plane("outlier", "int16", n_blocks * self.outliers, 2))
        if self.codebook == "learned":
            planes.append(Plane("level", "uint8", self.n_levels, 1))
        return tuple(planes)

    def _scale_planes(self, n_blocks: int) -> list[Plane]:
        if self.scale_kind.bits == 8:
            return [Plane("scale" if self.scale_kind.mantissa_bits else "exponent", "uint8", n_blocks, 1)]
        n_groups = _whole(n_blocks, GROUP)
        planes = GROUP_PLANES[self.scale_kind.bits]
        return [Plane(p.name.replace("code", "scale"), p.dtype, p.length * n_groups, p.itemsize) for p in planes]

    @property
    def group_planes(self) -> tuple[Plane, ...]:
        """The planes of codes, with the length that one group of 8 values takes of each."""
        return GROUP_PLANES[self.width]

    def stored_bytes(self, numel: int) -> int:
        """Bytes that store ``numel`` values: the sum of the planes' bytes, the last block's filling included."""
        return sum(plane.n_bytes for plane in self.planes(numel))

    def error_bound(self, dtype: str = "float32") -> float:
        """The most that ``|x - decoded x|`` can be, over the block's largest magnitude or ``least_magnitude``, if greater.

        ``dtype`` is the torch dtype compressed from and decompressed to. ``bfp4b32``, say: 2^-M, half a step where the
        largest value is 2^(M-1) steps, and equally the clipped top of the range.
        """
        half = 0.5 if self.rounding == "nearest" else 1 + 2.0**-9
        cell, top = half, 2.0**self.grid_bits - (1.5 if self.unsigned else 1)
        if self.codebook:
            cell, top = _codebook_cell(self)
        if self.dither:
            cell, top = (2 * cell, 2 * top - 255) if self.codebook else (cell + 0.5, top - 0.5)
        least, greatest = self._scale_range()
        step = 2.0 ** (1 - self.grid_bits)
        return max(cell * step * greatest, 1 - top * step * least) + self._dtype_error(dtype)

    def _scale_range(self) -> tuple[float, float]:
        """Least and greatest S, over the block's largest magnitude, the candidates of a search included."""
        ratio = 1 + 2.0**-self.scale_kind.mantissa_bits  # of one scale to the next, at most
        half = 1 + (ratio - 1) / 2
        least, greatest = {"down": (0.5, 1.0), "nearest": (1 / half, ratio / half), "up": (1.0, ratio)}[
            self.scale_rounding
        ]
        least, greatest = least * self.peak_factor, greatest * self.peak_factor
        return least * ratio ** min(self.search_offsets), greatest * ratio ** max(self.search_offsets)

    def _dtype_error(self, dtype: str) -> float:
        """What rounding to the dtype adds, where decoded values have more bits than it."""
        bits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
        own = self.grid_bits + self.unsigned + (self.scale_kind.mantissa_bits and 1 + self.scale_kind.mantissa_bits)
        own += (FRACTION_BITS + 1) * bool(self.dither) + 16 * bool(self.outliers)
        return (0.0 if own <= bits else 2.0**-bits) if self.is_basic else 2.0 ** (1 - bits)

    def least_magnitude(self, dtype: str = "float32") -> float:
        """Blocks whose largest magnitude is less than this are as far off as blocks of this magnitude may be."""
        least = self.scale_kind.value(self.least_scale(dtype)) * (1.0 if self.scale_rounding == "down" else 2.0)
        return max(least, 2.0**-14) if dtype == "float16" and not self.is_basic else least


@lru_cache(maxsize=256)
def _parse(text: str) -> BFPFormat:
    return BFPFormat(**fields_of(text))


@lru_cache(maxsize=256)
def _levels(fmt: BFPFormat) -> tuple[int, ...]:
    if not fmt.codebook:
        return ()
    if fmt.codebook in codebooks.LOSSY:
        return codebooks.lossy(fmt.codebook)
    if fmt.codebook in codebooks.NAMES and fmt.signed_levels:
        return codebooks.gauss_signed(fmt.width, fmt.block)
    if fmt.codebook in codebooks.NAMES:
        power_of_two = fmt.scale_kind.mantissa_bits == 0
        return codebooks.gauss(fmt.magnitude_bits, fmt.block, unsigned=fmt.unsigned, power_of_two=power_of_two)
    return codebooks.from_hex(fmt.codebook, signed=fmt.signed_levels)


def _codebook_cell(fmt: BFPFormat) -> tuple[float, float]:
    """The most that a value on the grid and within the levels is off, half a unit of the grid added, and the top level."""
    if fmt.codebook == "learned":
        return 256.0, 0.0
    levels = fmt.levels
    half = max((b - a for a, b in itertools.pairwise(levels[fmt.unsigned :])), default=0) / 2
    if fmt.signed_levels:
        return half + 1.0, float(min(levels[-1], -levels[0]))
    return max(levels[fmt.unsigned], half) + 1.0, float(levels[-1])


def _fields(fmt: BFPFormat) -> dict[str, Any]:
    return {field.name: getattr(fmt, field.name) for field in fields(fmt)}


def _whole(n: int, size: int) -> int:
    """Parts of ``size`` that hold ``n``."""
    return (n + size - 1) // size
