"""The codec on tiles in registers: float bits in, packed words out, and back. The kernels add the memory around it.

A tile of N groups of 8 values is two tensors [N, 4] of float32 bits (int32), ``a`` and ``b``:

    float32          a holds values 0 1 2 3 of each group, b holds 4 5 6 7     (as 128-bit loads deliver them)
    16-bit dtypes    a holds values 0 2 4 6 of each group, b holds 1 3 5 7     (the halves of 32-bit words)

Its codes are two words [N] (uint32), ``low`` and ``high``: 8 fields in ``low`` for widths to 4, else 4 fields in each.

* The shared exponent is an integer maximum over shifted bits, in which infinities and NaNs come out on top.
* Scaling and rounding are one multiply-add: adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves
  it in the low bits of the sum. The offset 2^M that keeps signed codes positive is in the same constant.
* Codes are packed by shifts and adds without masks: what the constants add up to is subtracted once a word.
* Sign and magnitude are made, and taken apart again, for all the fields of a word at once.
* Decoding leaves a field where it lies in its word: in the mantissa of 2^23 it is a float, a power of two too large.

Every step is exact or rounds once, as in ``reference``, whether or not the compiler fuses multiplies and adds.
Storage scheme: US20200210839A1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)

_ROUND = tl.constexpr(12582912)  # 1.5 * 2^23
_ROUND_BITS = tl.constexpr(0x4B400000)
_PLACE = tl.constexpr(8388608)  # 2^23
_NAN_EXPONENT = tl.constexpr(255)


@triton.constexpr_function
def _each_field(value: int, width: int) -> int:
    """The word that holds ``value`` in each of its fields, modulo 2^32."""
    return sum(value << (i * width) for i in range(8 if width <= 4 else 4)) % 2**32


@triton.jit
def block_exponent(a, b, BLOCKS: tl.constexpr, EXPONENT_MIN: tl.constexpr):
    """The shared exponents [BLOCKS] (int32) of a tile whose blocks are BLOCKS equal runs of groups."""
    doubled = tl.maximum((a << 1).to(tl.uint32, bitcast=True), (b << 1).to(tl.uint32, bitcast=True))
    largest = tl.max(tl.reshape(doubled, [BLOCKS, a.numel // BLOCKS]), axis=1)
    return tl.maximum((largest >> 24).to(tl.int32), EXPONENT_MIN)


@triton.jit
def encode(a, b, exponent, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr, PAIRED: tl.constexpr):
    """Words (low, high) that hold the codes of a tile, under the shared ``exponent`` [N] of each group's block.

    PAIRED: the tile is of a 16-bit dtype. ``high`` repeats ``low`` for widths to 4.
    """
    EXCESS: tl.constexpr = 0 if UNSIGNED else _each_field(_ROUND_BITS, WIDTH)
    low, high = _pack(_codes(a, exponent, WIDTH, UNSIGNED), _codes(b, exponent, WIDTH, UNSIGNED), WIDTH, PAIRED)
    low, high = low - EXCESS, high - EXCESS
    finite = exponent.expand_dims(1) != _NAN_EXPONENT
    return _finish(low, finite, WIDTH, UNSIGNED), _finish(high, finite, WIDTH, UNSIGNED)


@triton.jit
def _codes(bits, exponent, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr):
    """Codes [N, 4] (uint32) of the floats whose bits are given; signed ones plus 2^M and _ROUND_BITS."""
    if UNSIGNED:
        reciprocal = ((253 + WIDTH - exponent) << 23).to(tl.float32, bitcast=True)
        cell = tl.fma(bits.to(tl.float32, bitcast=True), reciprocal.expand_dims(1), -0.5) + _ROUND
        code = cell.to(tl.int32, bitcast=True) + (1 - _ROUND_BITS)
        code = tl.maximum(tl.minimum(code, bits), 0)  # as integers, the bits of a positive float are more than any code
        return tl.minimum(code, (1 << WIDTH) - 1).to(tl.uint32, bitcast=True)
    else:
        # One bit of magnitude at E = 254 has a reciprocal that is no normal float: all is doubled, and halved as bits.
        DOUBLE: tl.constexpr = 1 if WIDTH == 2 else 0
        reciprocal = ((254 + WIDTH - 2 + DOUBLE - exponent) << 23).to(tl.float32, bitcast=True)
        OFFSET: tl.constexpr = (_ROUND + (1 << (WIDTH - 1))) * (1 + DOUBLE)
        code = tl.fma(bits.to(tl.float32, bitcast=True), reciprocal.expand_dims(1), OFFSET).to(tl.uint32, bitcast=True)
        return tl.minimum(code - (DOUBLE << 23), _ROUND_BITS + (1 << WIDTH) - 1)


@triton.jit
def _pack(a, b, WIDTH: tl.constexpr, PAIRED: tl.constexpr):
    N: tl.constexpr = a.shape[0]
    four = tl.arange(0, 4).expand_dims(0)
    if PAIRED:
        pairs = a + (b << WIDTH)
        if WIDTH <= 4:
            low = tl.sum(pairs << (four * (2 * WIDTH)), axis=1)
            high = low
        else:
            halves = tl.reshape(pairs << ((four & 1) * (2 * WIDTH)), [N, 2, 2])
            low, high = tl.split(tl.sum(halves, axis=2))
    else:
        low = tl.sum(a << (four * WIDTH), axis=1)
        high = tl.sum(b << (four * WIDTH), axis=1)
        if WIDTH <= 4:
            low += high << (4 * WIDTH)
    return low, high


@triton.jit
def _finish(word, finite, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr):
    """Offset codes to sign and magnitude, in each field; 0 where the block is not finite."""
    if not UNSIGNED:
        SIGNS: tl.constexpr = _each_field(1 << (WIDTH - 1), WIDTH)
        negative = (word & SIGNS) ^ SIGNS
        ones = negative >> (WIDTH - 1)
        magnitude = ((word ^ (negative - ones)) & (SIGNS ^ 0xFFFFFFFF)) + ones
        clipped = (magnitude & SIGNS) >> (WIDTH - 1)  # -2^M, one below the least code
        word = (magnitude - clipped) | negative
    return tl.reshape(tl.where(finite, word.expand_dims(1), 0), word.shape)


@triton.jit
def decode(low, high, exponent, place_bits, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr, PAIRED: tl.constexpr):
    """A tile of floats (a, b), each [N, 4], from its words and the exponents [N] (int32) of each group's block.

    ``place_bits`` is 0x4B000000, the bits of 2^23: where the compiler does not know them, it masks and sets a field in
    one instruction.
    """
    MAGNITUDE: tl.constexpr = WIDTH if UNSIGNED else WIDTH - 1
    step = ((exponent - (MAGNITUDE - 1)) << 23).to(tl.float32, bitcast=True)
    step = tl.where(exponent == _NAN_EXPONENT, float("nan"), step).expand_dims(1)
    if not UNSIGNED:
        low = _offset_codes(low, WIDTH)
        high = _offset_codes(high, WIDTH)
    low = low.expand_dims(1)
    high = high.expand_dims(1)
    four = tl.arange(0, 4).expand_dims(0)
    if PAIRED:
        word = low if WIDTH <= 4 else tl.where(four < 2, low, high)
        index = four * 2 if WIDTH <= 4 else (four & 1) * 2
        return (
            _floats(word, index, step, place_bits, WIDTH, UNSIGNED),
            _floats(word, index + 1, step, place_bits, WIDTH, UNSIGNED),
        )
    else:
        FURTHER: tl.constexpr = 4 if WIDTH <= 4 else 0
        return (
            _floats(low, four, step, place_bits, WIDTH, UNSIGNED),
            _floats(high, four + FURTHER, step, place_bits, WIDTH, UNSIGNED),
        )


@triton.jit
def _offset_codes(word, WIDTH: tl.constexpr):
    """Sign and magnitude to codes plus 2^M, in each field; minus zero becomes zero."""
    SIGNS: tl.constexpr = _each_field(1 << (WIDTH - 1), WIDTH)
    negative = word & SIGNS
    ones = negative >> (WIDTH - 1)
    return ((word & (SIGNS ^ 0xFFFFFFFF)) ^ (negative - ones)) + ones + (SIGNS ^ negative)


@triton.jit
def _floats(word, index, step, place_bits, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr):
    """The floats [N, 4] of the fields ``index`` [1, 4] of ``word``; half of a word's fields are read in one place."""
    HALF: tl.constexpr = 4 if WIDTH <= 4 else 2
    UP: tl.constexpr = 1 if UNSIGNED else 0  # room for half a step below the field
    place = (index % HALF) * WIDTH + UP
    word = tl.where(index < HALF, word << UP, word >> (HALF * WIDTH - UP))
    field = (word & (((1 << WIDTH) - 1) << place).to(tl.uint32)) | place_bits
    OFFSET: tl.constexpr = 1 if UNSIGNED else 1 << WIDTH
    offset = (((OFFSET << place) >> 1) + _PLACE).to(tl.float32)
    value = field.to(tl.float32, bitcast=True) - offset
    if UNSIGNED:
        value = tl.maximum(value, 0.0)
    return value * (step * ((127 - place) << 23).to(tl.float32, bitcast=True))
