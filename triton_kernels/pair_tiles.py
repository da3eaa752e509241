"""16-bit values two in a word: to float32 bits, and the largest of each block by NVIDIA's instructions for pairs.

``pair`` [N, 4] (int32) has the values of a tile as ``memory_tiles`` loads them. Source of the instructions: PTX ISA, max.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import by_thread, of_threads


@triton.jit
def float_bits(pair, C: tl.constexpr):
    """Float32 bits (int32) of the even values and of the odd ones."""
    if C.dtype == 1:
        return pair << 16, pair & -0x10000
    else:
        return _half_bits(pair), _half_bits(pair >> 16)


@triton.jit
def _half_bits(word):
    """Float32 bits of the float16 in the low half of a word."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def doubled_largest(pair, C: tl.constexpr):
    """Twice the float32 bits (uint32) of each block's largest magnitude [BLOCKS]; of a NaN, if there is one."""
    word = by_thread(_magnitudes(pair, C), C)
    for _ in tl.static_range(_halvings(word.shape[1])):
        x, y = _parts(word)
        word = _greater(x, y, C)
    even, odd = float_bits(word, C)
    return of_threads(tl.maximum((even << 1).to(tl.uint32, bitcast=True), (odd << 1).to(tl.uint32, bitcast=True)))


@triton.jit
def doubled_extremes(pair, C: tl.constexpr):
    """The same of the greatest value, at least 0, and of the least; of values above zero the least may be any of them."""
    word = by_thread(pair, C)
    x, y = _parts(word)
    upper, lower = _greater(x, y, C), _lesser(x, y, C)
    for _ in tl.static_range(_halvings(word.shape[1]) - 1):
        x, y = _parts(upper)
        upper = _greater(x, y, C)
        x, y = _parts(lower)
        lower = _lesser(x, y, C)
    even, odd = float_bits(upper, C)
    greatest = of_threads(tl.maximum(tl.maximum(even, odd), 0))
    even, odd = float_bits(lower, C)
    least = of_threads(tl.maximum(even.to(tl.uint32, bitcast=True), odd.to(tl.uint32, bitcast=True)))
    return greatest.to(tl.uint32, bitcast=True) << 1, least << 1


@triton.jit
def two_largest(pair, C: tl.constexpr):
    """(key, magnitude, rest) of each block [BLOCKS] with no NaN: the largest magnitude, twice the largest of the others.

    The low 7 bits of ``key`` have C.block - 1 less the place of the first of the largest in the block. If there is a NaN
    ``magnitude`` is one.
    """
    word = by_thread(pair, C)
    x, y = _parts(_magnitudes(word, C))
    upper, lower = _greater(x, y, C), _lesser(x, y, C)
    for _ in tl.static_range(_halvings(word.shape[1]) - 1):
        x, y = _parts(upper)
        upper = _greater(x, y, C)
        u, v = _parts(lower)
        lower = _greater(_greater(u, v, C), _lesser(x, y, C), C)
    even, odd = float_bits(upper, C)
    first = tl.maximum(even, odd)
    second = tl.minimum(even, odd)
    even, odd = float_bits(lower, C)
    second = tl.maximum(second, tl.maximum(even, odd))
    LAST: tl.constexpr = 2 * word.shape[1] - 1
    place = tl.arange(0, word.shape[1]).expand_dims(0).expand_dims(2).expand_dims(3) * 2
    even, odd = float_bits(word, C)
    key = tl.maximum(magnitude(even + (LAST - place)), magnitude(odd + (LAST - 1 - place)))
    key = tl.max(key, axis=1).expand_dims(1).to(tl.int32, bitcast=True)
    key += (-tl.arange(0, key.shape[3]) + (key.shape[3] - 1)) * (LAST + 1)

    if word.shape[3] > 1:
        first, second = tl.reduce((first, second), 3, _two_of_four)
    BLOCKS: tl.constexpr = word.shape[0] * word.shape[2]
    doubled = tl.reshape(second, [BLOCKS]).to(tl.uint32, bitcast=True) << 1
    return of_threads(key), tl.reshape(first, [BLOCKS]), doubled


@triton.jit
def _two_of_four(a, b, c, d):
    """The greatest and the next of a >= b and c >= d."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def magnitude(bits):
    """|x| (float32), on NVIDIA, as part of the instruction that takes it: ``tl.abs`` may become one of its own."""
    return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=r,r", [bits], dtype=tl.float32, is_pure=True, pack=1)


@triton.constexpr_function
def _sign_rounds(C, first: int) -> list[tuple[int, int]]:
    """(selector, mask) until the sign of each field from ``first`` on of a word is in its place.

    The selector takes whole bytes of signs from those of the eight values.
    """
    fields = 8 if C.width <= 4 else 4
    left = [(first + j, C.width * j + C.width - 1) for j in range(fields)]
    rounds = []
    while left:
        selector, mask, later = 0, 0, []
        for value, bit in left:
            if mask >> (bit // 8 * 8) & 255:
                later.append((value, bit))
            else:
                selector |= (8 + value) << (bit // 8 * 4)
                mask |= 1 << bit
        rounds.append((selector, mask))
        left = later
    return rounds


@triton.jit
def signs_of_pairs(pair, C: tl.constexpr):
    """Words (low, high) [N] (uint32) that have the signs of bfloat16 values at the top of each field; zeros have none."""
    one = tl.full([1, 1], 0x3F803F80, tl.int32)
    zero = tl.full([1, 1], 0, tl.int32)
    pair = tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pair, one, zero], dtype=tl.int32, is_pure=True, pack=1
    )
    even, odd = tl.split(tl.reshape(pair, [pair.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    front, back = permuted(first, second, 0x7531), permuted(third, fourth, 0x7531)
    low = _signs(front, back, 0, C)
    high = low
    if C.width > 4:
        high = _signs(front, back, 4, C)
    return low, high


@triton.jit
def _signs(front, back, FIRST: tl.constexpr, C: tl.constexpr):
    word = tl.zeros(front.shape, tl.uint32)
    for i in tl.static_range(len(_sign_rounds(C, FIRST))):
        word |= permuted(front, back, _sign_rounds(C, FIRST)[i][0]) & _sign_rounds(C, FIRST)[i][1]
    return word


@triton.jit
def permuted(a, b, selector):
    """Bytes of a (0 to 3) and b (4 to 7), as the four nibbles of ``selector`` say; with 8 added, their sign in all bits."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.constexpr_function
def _halvings(n: int) -> int:
    return n.bit_length() - 1


@triton.jit
def _parts(word):
    """[a, 2 n, b, c] -> twice [a, n, b, c]."""
    parts = tl.reshape(word, [word.shape[0], word.shape[1] // 2, 2, word.shape[2], word.shape[3]])
    return tl.split(tl.permute(parts, [0, 1, 3, 4, 2]))


@triton.jit
def _magnitudes(pair, C: tl.constexpr):
    KIND: tl.constexpr = "abs.bf16x2 $0, $1;" if C.dtype == 1 else "abs.f16x2 $0, $1;"
    return tl.inline_asm_elementwise(KIND, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _greater(a, b, C: tl.constexpr):
    KIND: tl.constexpr = "max.NaN.bf16x2 $0, $1, $2;" if C.dtype == 1 else "max.NaN.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(KIND, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _lesser(a, b, C: tl.constexpr):
    KIND: tl.constexpr = "min.NaN.bf16x2 $0, $1, $2;" if C.dtype == 1 else "min.NaN.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(KIND, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
