"""Random bytes for a tile's values, in registers: the same as ``rounding`` makes, whatever the tile's size."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)
_MULTIPLIER = tl.constexpr(0xD256D193)
_WEYL = tl.constexpr(0x9E3779B9)
_SHORT_WEYL = tl.constexpr(0x9E3779B9 * (2**15 + 1) % 2**32)


@triton.jit
def philox(seed, group, PURPOSE: tl.constexpr):
    """Two random words [N] (uint32), a byte for each of the 8 values of each ``group`` [N] (uint32); ``seed`` int64."""
    key = seed.to(tl.uint32)
    low = group
    high = tl.full(group.shape, PURPOSE, tl.uint32) + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product = low.to(tl.uint64) * _MULTIPLIER
        low, high = (product >> 32).to(tl.uint32) ^ key ^ high, product.to(tl.uint32)
        key = key + tl.full([], _WEYL, tl.uint32)
    return low, high


@triton.jit
def bytes_of(low, high, PAIRED: tl.constexpr):
    """The words' bytes for the values of a tile (a, b), each [N, 4]; what lies above 8 bits is not cleared."""
    four = tl.arange(0, 4).expand_dims(0)
    low = low.expand_dims(1)
    high = high.expand_dims(1)
    if PAIRED:
        word = tl.where(four < 2, low, high)
        return word >> ((four & 1) * 16), word >> ((four & 1) * 16 + 8)
    else:
        return low >> (four * 8), high >> (four * 8)


@triton.jit
def hashed(bits, SHORT: tl.constexpr):
    """A byte from each float32's magnitude. SHORT: its low 16 bits are zero, so that no bit of the sum below carries."""
    magnitude = (bits & 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    if SHORT:
        return ((magnitude >> 15) * _SHORT_WEYL) >> 24
    else:
        return ((magnitude ^ (magnitude >> 15)) * _WEYL) >> 24
