"""How a block's shared scale S is stored: 8, 5 or 4 bits of exponent, or an 8-bit float. Imports no torch.

A stored scale is the top bits of a float32, less a constant: ``bits(S) = (code + base) << (23 - mantissa_bits)``; decoding
one is an addition and a shift::

    e8      eeee eeee    2^(code - 127), as in float32                          2^-103 .. 2^127
    e5m3    eeee emmm    (1 + mmm/8) * 2^(eeeee - 15), bias as in float16       1.125 * 2^-15 .. 1.75 * 2^16
    e6m2    eeee eemm    (1 + mm/4) * 2^(eeeeee - 31)                           1.25 * 2^-31 .. 1.5 * 2^32
    se5m2   seee eemm    (1 + mm/4) * 2^(eeeee - 15), s its sign                1.25 * 2^-15 .. 1.5 * 2^16
    e5         e eeee    2^(code - 15)                                          2^-14 .. 2^15
    e4           eeee    2^(code - 7)                                           2^-6 .. 2^7

No scale is a denormal. The code of all ones (but for the sign) says that the block holds a NaN, an infinity, or a value
too large for the scale; code 0 that all its values are zero, in formats that cannot say so with codes (``zero_scale``).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """``name`` as in a text, ``bits`` a scale, ``mantissa_bits`` of them, ``base`` as above, ``least`` code that is written."""

    name: str
    bits: int
    mantissa_bits: int
    base: int
    least: int
    signed: bool = False

    @property
    def nan(self) -> int:
        """The code of a block that decodes to NaN; one more than the greatest code of a number."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def shift(self) -> int:
        """Where the code stands in the bits of a float32."""
        return 23 - self.mantissa_bits

    def value(self, code: int) -> float:
        """S of a code that is not ``nan``."""
        exponent, mantissa = divmod(code + self.base, 1 << self.mantissa_bits)
        return (1 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - 127)

    def code_of_exponent(self, exponent: int) -> int:
        """The code of 2^(exponent - 127), or the least code if that is greater."""
        return max(self.least, (exponent << self.mantissa_bits) - self.base)


EXPONENT_MIN = 24
"""Least exponent (biased by 127) of ``e8``: it keeps the steps of every width, and their reciprocals, normal floats."""

SCALES = {
    scale.name: scale
    for scale in (
        Scale("e8", 8, 0, 0, EXPONENT_MIN),
        Scale("e6m2", 8, 2, (127 - 31) << 2, 1),
        Scale("se5m2", 8, 2, (127 - 15) << 2, 1, signed=True),
        Scale("e5m3", 8, 3, (127 - 15) << 3, 1),
        Scale("e5", 5, 0, 127 - 15, 1),
        Scale("e4", 4, 0, 127 - 7, 1),
    )
}
