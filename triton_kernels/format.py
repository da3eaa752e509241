"""Block floating-point formats: what they are called, where every bit lies, how large they are, how far they are off.

Imports neither torch nor triton. Block floating-point storage of activations between forward and backward is the subject
of US20200210839A1; the sign-free form below is the uniform case of the non-uniform mantissas of US12277502B2.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
BLOCKS = (8, 16, 32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")

GROUP = 8
"""Values whose codes share W whole bytes; every block is a whole number of groups."""

EXPONENT_MIN = 24
"""Least shared exponent (biased by 127): the scales of every width then stay normal floats, however they are applied."""

EXPONENT_NAN = 255
"""Shared exponent of a block that held a NaN or an infinity."""

_NAME = re.compile(r"bfp(\d+)b(\d+)((?:\+[^+]*)*)", re.ASCII)


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

    **The shared exponent** E is the largest biased float32 exponent in the block, at least 24; a block that holds a NaN or
    an infinity has E = 255, codes 0, and decodes to NaN as a whole. With ``largest`` in [2^(E-127), 2^(E-126)):

        signed      M = W-1   step = 2^(E-127-(M-1))   q = x/step, nearest, ties to even, to -(2^M-1) .. 2^M-1
                              decoded: q * step. The sign of a zero is not kept.
        +unsigned   M = W     step = 2^(E-127-(M-1))   level c-1/2 nearest to x/step, ties to odd c, c = 1 .. 2^M-1
                              decoded: (c - 1/2) * step; c = 0 where x is zero (or below), and nowhere else: decoded
                              values are zero exactly where the stored ones were, so a ReLU's mask survives.

    Blocks whose largest value is below 2^-103 (denormals among them) use the step of E = 24. float16 with ``+unsigned``
    has E at least 103 + W, so that the least level, half a step, is a float16 too. Decoding computes in float32 and
    rounds once to the dtype asked for, nearest even (only ``bfp8+unsigned`` to bfloat16 has anything to round, unless the
    dtype is narrower than the one that was compressed).

    **Bits.** Value j of a group of 8 has the bits [W*j, W*j + W) of the group's W bytes, little end first::

        W = 4, signed             byte 0    byte 1    byte 2    byte 3
                                 s111s000  s333s222  s555s444  s777s666      s sign, 000 magnitude of value 0
                                 one int32 of plane "code32"

        W = 5, signed             byte 0    byte 1    byte 2    byte 3  |  byte 4
                                 111s0000  2222 2s11 ...                    (fields run across bytes)
                                 one int32 of plane "code32"            |  one uint8 of plane "code8"

        +unsigned                W bits of c, no sign

    The W bytes are split into aligned planes of 4, 2 and 1 bytes, so that every width loads and stores aligned:

        W         2    3      4    5      6      7        8
        planes    2    2|1    4    4|1    4|2    4|2|1    4 4 (one plane, two int32 a group)

    followed by the plane ``exponent``, one uint8 a block. The signed code "minus zero" is never written and decodes to 0.

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
        """Blocks that hold ``numel`` values. Symbolic integers (torch.SymInt, sympy) give symbolic results, here and below."""
        return (numel + self.block - 1) // self.block

    def planes(self, numel: int) -> tuple[Plane, ...]:
        """The planes that store ``numel`` values, in the order in which operators pass them."""
        n_blocks = self.n_blocks(numel)
        n_groups = n_blocks * (self.block // GROUP)
        codes = tuple(replace(plane, length=plane.length * n_groups) for plane in self.group_planes)
        return (*codes, Plane("exponent", "uint8", n_blocks, 1))

    @property
    def group_planes(self) -> tuple[Plane, ...]:
        """The planes of codes, with the length that one group of 8 values takes of each."""
        return _GROUP_PLANES[self.width]

    def stored_bytes(self, numel: int) -> int:
        """Bytes that store ``numel`` values: the sum of the planes' bytes, the last block's filling included."""
        return self.n_blocks(numel) * (self.block // GROUP * self.width + 1)

    def exponent_min(self, dtype: str) -> int:
        """Least shared exponent (biased by 127) for values of torch dtype ``dtype`` ("float32", "bfloat16", "float16")."""
        return 103 + self.width if self.unsigned and dtype == "float16" else EXPONENT_MIN

    def error_bound(self, dtype: str = "float32") -> float:
        """The largest ``|x - decoded x|``, relative to the block's largest magnitude or 2^-103, whichever is greater.

        ``dtype`` is the torch dtype compressed from and decompressed to. Signed: 2^-M, half a step where the largest value
        is just 2^(M-1) steps, and equally the clipped top of the range. ``+unsigned``: 1.5 * 2^-M, the clipped top. For
        float16 with ``+unsigned`` the other magnitude is 2^(W-24), not 2^-103.
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
    fmt = BFPFormat(int(match[1]), int(match[2]), **dict.fromkeys(options, True))
    if str(fmt) != text:
        raise FormatError(_refusal(text, f"its text is '{fmt}'"))
    return fmt


def _refusal(text: object, reason: str) -> str:
    return (
        f"format {text!r} cannot be: {reason}; a format is bfp{{width}}b{{block}}[+option], "
        f"width one of {_listed(WIDTHS)}, block one of {_listed(BLOCKS)}, "
        f"option one of {_listed(f'+{name}' for name in OPTIONS)}, such as 'bfp4b32' or 'bfp4b32+unsigned'"
    )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
