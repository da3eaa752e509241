"""Block floating-point formats: what they are called, where every bit lies, how large they are, how far they are off.

Imports neither torch nor triton. Keeping activations for backward in block floating-point: US20200210839A1. Codes whose
levels are not those of a signed integer, of which the sign-free form is the simplest: US12277502B2.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
BLOCKS = (8, 16, 32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")

GROUP = 8
"""Values whose codes share W whole bytes; every block is a whole number of groups."""

EXPONENT_MIN = 24
"""Least shared exponent (biased by 127): it keeps the scales of every width normal floats, however they are applied."""

EXPONENT_NAN = 255
"""Shared exponent of a block that held a NaN or an infinity."""

_NAME = re.compile(r"bfp(0|[1-9]\d{0,3})b(0|[1-9]\d{0,3})((?:\+[^+]*)*)", re.ASCII)


class FormatError(ValueError):
    """A text names no format, or a format cannot exist."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One stored tensor of a compressed value: one-dimensional, ``length`` elements of torch dtype ``dtype``."""

    name: str
    dtype: str
    length: int
    itemsize: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the plane."""
        return self.length * self.itemsize


@dataclass(frozen=True, slots=True)
class BFPFormat:
    """A block floating-point format: ``width`` bits a value, ``block`` values under one 8-bit exponent.

    The text is ``bfp{width}b{block}``, then the options: ``bfp4b32``, ``bfp4b32+unsigned``. ``parse`` inverts ``str``.

    **Blocks** are runs of ``block`` consecutive values of the flattened tensor; a last dimension that is no multiple of
    ``block`` runs on into the next row. The last block is filled up with zeros. An empty tensor has empty planes.

    **The shared exponent** E is the largest biased float32 exponent in the block, at least 24. A block that holds a NaN
    or an infinity has E = 255 and codes 0, and decodes to NaN as a whole. With M bits of magnitude, the block's largest
    value lies in [2^(M-1), 2^M) steps::

        signed      M = W-1   step = 2^(E-127-(M-1))   q = x/step to the nearest integer, ties to even,
                                                       clipped to -(2^M-1) .. 2^M-1; decodes to q * step

        +unsigned   M = W     step = 2^(E-127-(M-1))   c = 0 where x is zero (or below it), else c-1/2 is nearest to
                                                       x/step, ties to odd c, clipped to 1 .. 2^M-1;
                                                       decodes to (c - 1/2) * step, c = 0 to zero

    With ``+unsigned`` decoded values are zero exactly where the stored ones were, so the mask that a ReLU's backward
    takes from its output survives. Signed zeros lose their sign in both.

    Blocks whose largest value is below 2^-103, denormals among them, have the step of E = 24. float16 with
    ``+unsigned`` has E at least 103 + W, so that half a step is a float16. Decoding computes in float32 and rounds once
    to the dtype asked for, to nearest even; where that dtype is the one compressed, only ``bfp8+unsigned`` in bfloat16
    has anything to round.

    **Bits.** Eight values are a group. Value j of a group has the bits [W*j, W*j + W) of the group's W bytes, little
    end first; the code of a signed value is its magnitude in the low M bits and its sign above them::

        bfp4b32       byte 0      byte 1      byte 2      byte 3
                      s111 s000   s333 s222   s555 s444   s777 s666         high bit on the left; s sign, jjj magnitude

        bfp3b32       byte 0      byte 1      byte 2
                      22s1 1s00   5s44 s33s   s77s 66s5

        +unsigned     as drawn, with a bit of magnitude in the place of s

    The W bytes are split into aligned parts of 4, 2 and 1 bytes, low bytes first, each in a plane of its own, so that
    every width loads and stores aligned; after these planes comes ``exponent``, one uint8 a block::

        W             2       3           4       5          6           7                8
        code32                            int32   int32      int32       int32            2 x int32
        code16        int16   int16                          int16       int16
        code8                 uint8               uint8                  uint8

    The signed code "minus zero" is never written, and decodes to 0.

    Raises:
        FormatError: no format has these fields; the message lists the legal ones.
    """

    width: int
    block: int
    unsigned: bool = False

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise FormatError(_refusal(str(self), f"the width is {self.width}"))
        if self.block not in BLOCKS:
            raise FormatError(_refusal(str(self), f"the block is {self.block}"))

    def __str__(self) -> str:
        options = "".join(f"+{name}" for name in OPTIONS if getattr(self, name))
        return f"bfp{self.width}b{self.block}{options}"

    @staticmethod
    def parse(text: str) -> "BFPFormat":
        """The format that ``text`` names: ``BFPFormat.parse(str(f)) == f``, and ``str(BFPFormat.parse(t)) == t``.

        Raises:
            FormatError: ``text`` is not the text of a format.
        """
        return _parse(text)

    @property
    def magnitude_bits(self) -> int:
        """M: bits of a code that are not the sign."""
        return self.width if self.unsigned else self.width - 1

    @property
    def bits_per_value(self) -> float:
        """Stored bits for each value of a whole block, the exponent's share included."""
        return self.width + 8 / self.block

    def n_blocks(self, numel: int) -> int:
        """Blocks that hold ``numel`` values. Symbolic, here and below, if ``numel`` is (torch.SymInt, sympy)."""
        return (numel + self.block - 1) // self.block

    def planes(self, numel: int) -> tuple[Plane, ...]:
        """The planes that store ``numel`` values, in the order in which operators pass them."""
        n_blocks = self.n_blocks(numel)
        n_groups = n_blocks * (self.block // GROUP)
        codes = tuple(Plane(p.name, p.dtype, p.length * n_groups, p.itemsize) for p in self.group_planes)
        return (*codes, Plane("exponent", "uint8", n_blocks, 1))

    @property
    def group_planes(self) -> tuple[Plane, ...]:
        """The planes of codes, with the length that one group of 8 values takes of each."""
        return _GROUP_PLANES[self.width]

    def stored_bytes(self, numel: int) -> int:
        """Bytes that store ``numel`` values: the sum of the planes' bytes, the last block's filling included."""
        return self.n_blocks(numel) * (self.block // GROUP * self.width + 1)

    def exponent_min(self, dtype: str) -> int:
        """Least shared exponent (biased by 127) for values of the torch dtype of that name, one of ``DTYPES``."""
        return 103 + self.width if self.unsigned and dtype == "float16" else EXPONENT_MIN

    def error_bound(self, dtype: str = "float32") -> float:
        """The most that ``|x - decoded x|`` can be, over the block's largest magnitude or 2^-103, whichever is greater.

        ``dtype`` is the torch dtype compressed from and decompressed to. Signed: 2^-M, half a step where the largest
        value is 2^(M-1) steps, and equally the clipped top of the range. ``+unsigned``: 1.5 * 2^-M, the clipped top;
        for float16 it is 2^(W-24) that takes the place of 2^-103.
        """
        rounding = 2.0**-8 if dtype == "bfloat16" and self.magnitude_bits == 8 else 0.0
        return (1.5 if self.unsigned else 1.0) * 2.0**-self.magnitude_bits + rounding


_CODE32 = Plane("code32", "int32", 1, 4)
_CODE16 = Plane("code16", "int16", 1, 2)
_CODE8 = Plane("code8", "uint8", 1, 1)

_GROUP_PLANES: dict[int, tuple[Plane, ...]] = {
    2: (_CODE16,),
    3: (_CODE16, _CODE8),
    4: (_CODE32,),
    5: (_CODE32, _CODE8),
    6: (_CODE32, _CODE16),
    7: (_CODE32, _CODE16, _CODE8),
    8: (Plane("code32", "int32", 2, 4),),
}

OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(BFPFormat))[2:]
"""The options, in the order in which the text gives them."""


@lru_cache(maxsize=256)
def _parse(text: str) -> BFPFormat:
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise FormatError(_refusal(text, "it is not of that shape"))
    options = match[3].split("+")[1:]
    for option in options:
        if option not in OPTIONS:
            raise FormatError(_refusal(text, f"unknown option '+{option}'"))
        if options.count(option) > 1:
            raise FormatError(_refusal(text, f"option '+{option}' is given more than once"))
    return BFPFormat(int(match[1]), int(match[2]), **dict.fromkeys(options, True))


def _refusal(text: object, reason: str) -> str:
    return (
        f"format {text!r} cannot be: {reason}; a format is bfp{{width}}b{{block}}[+option], "
        f"width one of {_listed(WIDTHS)}, block one of {_listed(BLOCKS)}, "
        f"option one of {_listed(f'+{name}' for name in OPTIONS)}, such as 'bfp4b32' or 'bfp4b32+unsigned'"
    )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
