"""Triton kernels that store and restore block floating-point values, equal to ``reference`` bit for bit.

One thread owns whole groups of 8 values, so every width loads and stores aligned without shared memory:

* float32 values are handled as their bits; bfloat16 as pairs in int32, an even value being ``w << 16`` and an odd one
  ``w & 0xffff0000``, so no 16-bit arithmetic remains;
* the shared exponent is an integer maximum over shifted bits, in which infinities and NaNs come out on top;
* scaling, rounding and the offset that makes codes non-negative are one fused multiply-add: adding 1.5 * 2^23 rounds to
  the nearest integer, ties to even, and leaves it in the low bits of the sum;
* codes are packed with shifts and adds, no masks: what the magic number adds up to is subtracted once a word;
* sign and magnitude are made, and taken apart again, for all the fields of a word at once.

Storage scheme: US20200210839A1.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23
_MAGIC_BITS = tl.constexpr(0x4B400000)
_ODD_HALF = tl.constexpr(-0x10000)  # 0xffff0000
_EXPONENT_NAN = tl.constexpr(255)
_NAN_BITS = tl.constexpr(0x7FC00000)
_TWO_BF16_NANS = tl.constexpr(0x7FC07FC0)


@triton.jit
def _field_sum(FIELDS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 in every field of a word, as an int32: sum of 2^(i * WIDTH)."""
    ones: tl.constexpr = ((1 << (FIELDS * WIDTH)) - 1) // ((1 << WIDTH) - 1)
    return ones
