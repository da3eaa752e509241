"""Triton kernels that store and restore block floating-point values, equal to ``reference`` bit for bit.

One thread owns whole groups of 8 values, so that every width loads and stores aligned and without shared memory. 16-bit
values travel as pairs in an int32 ``w``: bfloat16's even value is ``w << 16`` as float32 bits, its odd one
``w & 0xffff0000``. The arithmetic is in ``tiles``. A program whose tile is full masks nothing; only the last one's may
not be. Offsets are marked as not contiguous where a wider access would move the data through shared memory first.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .tiles import BFLOAT16, FLOAT16, FLOAT32, block_exponent, decode, encode

_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
_INT16 = tl.constexpr(tl.pointer_type(tl.int16))


@triton.jit
def compress_kernel(
    x_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    exponent_ptr,
    numel,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNSIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    EXPONENT_MIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i stores x[i * BLOCKS * BLOCK : (i + 1) * BLOCKS * BLOCK], of x [numel], which is of DTYPE.

    EVEN: numel is a multiple of BLOCKS * BLOCK. Pointers to planes that the width does not have are not used; x_ptr is
    aligned to 4 bytes.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    rest = tl.minimum(numel - block * BLOCK, BLOCKS * BLOCK).to(tl.int32)
    group = block * (BLOCK // 8)
    x_ptr += block * BLOCK
    code32_ptr += group * (2 if WIDTH == 8 else 1)
    code16_ptr += group
    code8_ptr += group
    exponent_ptr += block
    if EVEN or rest == BLOCKS * BLOCK:
        _compress_tile(
            x_ptr, code32_ptr, code16_ptr, code8_ptr, exponent_ptr, rest,
            WIDTH, BLOCK, UNSIGNED, DTYPE, EXPONENT_MIN, BLOCKS, True,
        )  # fmt: skip
    else:
        _compress_tile(
            x_ptr, code32_ptr, code16_ptr, code8_ptr, exponent_ptr, rest,
            WIDTH, BLOCK, UNSIGNED, DTYPE, EXPONENT_MIN, BLOCKS, False,
        )  # fmt: skip


@triton.jit
def decompress_kernel(
    code32_ptr,
    code16_ptr,
    code8_ptr,
    exponent_ptr,
    y_ptr,
    numel,
    place_bits,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNSIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i restores y[i * BLOCKS * BLOCK : (i + 1) * BLOCKS * BLOCK], of y [numel], in DTYPE.

    ``place_bits``: see ``tiles.decode``. The other arguments are those of ``compress_kernel``.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    rest = tl.minimum(numel - block * BLOCK, BLOCKS * BLOCK).to(tl.int32)
    group = block * (BLOCK // 8)
    code32_ptr += group * (2 if WIDTH == 8 else 1)
    code16_ptr += group
    code8_ptr += group
    exponent_ptr += block
    y_ptr += block * BLOCK
    if EVEN or rest == BLOCKS * BLOCK:
        _decompress_tile(
            code32_ptr, code16_ptr, code8_ptr, exponent_ptr, y_ptr, rest, place_bits,
            WIDTH, BLOCK, UNSIGNED, DTYPE, BLOCKS, True,
        )  # fmt: skip
    else:
        _decompress_tile(
            code32_ptr, code16_ptr, code8_ptr, exponent_ptr, y_ptr, rest, place_bits,
            WIDTH, BLOCK, UNSIGNED, DTYPE, BLOCKS, False,
        )  # fmt: skip


@triton.jit
def _compress_tile(
    x_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    exponent_ptr,
    rest,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNSIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    EXPONENT_MIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store the ``rest`` values at x_ptr; FULL: there are BLOCKS * BLOCK of them."""
    GROUPS: tl.constexpr = BLOCK // 8
    N: tl.constexpr = BLOCKS * GROUPS
    a, b = _load_values(x_ptr, rest, N, DTYPE, FULL)
    exponent = block_exponent(a, b, BLOCKS, EXPONENT_MIN)
    exponent = tl.broadcast_to(exponent.expand_dims(1), [BLOCKS, GROUPS])
    low, high = encode(a, b, tl.reshape(exponent, [N]), WIDTH, UNSIGNED, DTYPE != FLOAT32)

    group = tl.max_contiguous(tl.arange(0, N), 1)
    keep = group // GROUPS * BLOCK < rest
    _store_codes(low, high, code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH, FULL)
    group = tl.reshape(group, [BLOCKS, GROUPS])
    first = group % GROUPS == 0
    tl.store(exponent_ptr + group // GROUPS, exponent.to(tl.uint8), mask=first if FULL else first & (group * 8 < rest))


@triton.jit
def _decompress_tile(
    code32_ptr,
    code16_ptr,
    code8_ptr,
    exponent_ptr,
    y_ptr,
    rest,
    place_bits,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNSIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Restore the ``rest`` values at y_ptr; FULL: there are BLOCKS * BLOCK of them."""
    GROUPS: tl.constexpr = BLOCK // 8
    N: tl.constexpr = BLOCKS * GROUPS
    group = tl.max_contiguous(tl.arange(0, N), 1)
    keep = group // GROUPS * BLOCK < rest
    low, high = _load_codes(code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH, FULL)
    exponent = _load(exponent_ptr + group // GROUPS, keep, FULL).to(tl.int32)
    a, b = decode(low, high, exponent, place_bits, WIDTH, UNSIGNED, DTYPE != FLOAT32)
    _store_values(y_ptr, a, b, exponent, rest, N, DTYPE, UNSIGNED and WIDTH == 8, FULL)


@triton.jit
def _load(pointers, keep, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=keep, other=0)


@triton.jit
def _store(pointers, values, keep, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=keep)


@triton.jit
def _load_values(x_ptr, rest, N: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """The tile (a, b) of float32 bits, each [N, 4], of the ``rest`` values at x_ptr; zeros beyond."""
    if DTYPE == FLOAT32:
        index = tl.arange(0, N).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
        bits_ptr = x_ptr.to(_INT32)
        return _load(bits_ptr + index, index < rest, FULL), _load(bits_ptr + index + 4, index + 4 < rest, FULL)
    else:
        if FULL:
            pair = tl.reshape(tl.load(x_ptr.to(_INT32) + tl.arange(0, N * 4)), [N, 4])
        else:  # one by one: nothing behind the last value is touched
            index = tl.arange(0, N * 8)
            value = tl.load(x_ptr.to(_INT16) + index, mask=index < rest, other=0)
            even, odd = tl.split(tl.reshape(value, [N, 4, 2]))
            pair = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
        if DTYPE == BFLOAT16:
            return pair << 16, pair & -0x10000
        else:
            return _half_bits(pair), _half_bits(pair >> 16)


@triton.jit
def _half_bits(word):
    """Float32 bits of the float16 in the low half of a word."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _store_values(
    y_ptr, a, b, exponent, rest, N: tl.constexpr, DTYPE: tl.constexpr, INEXACT: tl.constexpr, FULL: tl.constexpr
):
    """Write the tile of floats (a, b) as the ``rest`` values at y_ptr. INEXACT: bfloat16 has to round."""
    if DTYPE == FLOAT32:
        index = tl.arange(0, N).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
        _store(y_ptr + index, a, index < rest, FULL)
        _store(y_ptr + index + 4, b, index + 4 < rest, FULL)
    else:
        if DTYPE == FLOAT16:
            low = a.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            high = b.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            pair = low | (high << 16)
        elif INEXACT:
            pair = (_rounded_bits(a) >> 16) | (_rounded_bits(b) & 0xFFFF0000)
            pair = tl.where(exponent.expand_dims(1) == 255, 0x7FC07FC0, pair)
        else:
            pair = (a.to(tl.uint32, bitcast=True) >> 16) | b.to(tl.uint32, bitcast=True)
        if FULL:
            pair = tl.reshape(pair, [N * 4]).to(tl.int32, bitcast=True)
            tl.store(y_ptr.to(_INT32) + tl.arange(0, N * 4), pair)
        else:
            value = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
            index = tl.arange(0, N * 8)
            tl.store(y_ptr.to(_INT16) + index, tl.reshape(value, [N * 8]), mask=index < rest)


@triton.jit
def _rounded_bits(value):
    """Float32 bits whose upper half is the nearest bfloat16, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    return bits + 0x7FFF + ((bits >> 16) & 1)


@triton.jit
def _store_codes(low, high, code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Deal the words of each group to the planes of 4, 2 and 1 bytes, low bits first."""
    if WIDTH == 8:
        words = tl.join(low, high).to(tl.int32, bitcast=True)
        both = group.expand_dims(1) * 2 + tl.arange(0, 2).expand_dims(0)
        _store(code32_ptr + both, words, keep.expand_dims(1), FULL)
    else:
        tail = low
        if WIDTH >= 4:
            word = low
            if WIDTH > 4:
                word = low | (high << (4 * WIDTH))
                tail = high >> (32 - 4 * WIDTH)
            _store(code32_ptr + group, word.to(tl.int32, bitcast=True), keep, FULL)
        if WIDTH & 2:
            _store(code16_ptr + group, tail.to(tl.int16), keep, FULL)
            tail = tail >> 16
        if WIDTH & 1:
            _store(code8_ptr + group, tail.to(tl.uint8), keep, FULL)


@triton.jit
def _load_codes(code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """The words of each group; what lies above the fields of ``low`` is not cleared."""
    if WIDTH == 8:
        both = group.expand_dims(1) * 2 + tl.arange(0, 2).expand_dims(0)
        low, high = tl.split(_load(code32_ptr + both, keep.expand_dims(1), FULL).to(tl.uint32, bitcast=True))
        return low, high
    else:
        if WIDTH & 1:
            tail = _load(code8_ptr + group, keep, FULL).to(tl.uint32)
        if WIDTH & 2:
            middle = _load(code16_ptr + group, keep, FULL).to(tl.uint16, bitcast=True).to(tl.uint32)
            tail = (tail << 16) | middle if WIDTH & 1 else middle
        if WIDTH < 4:
            return tail, tail
        else:
            word = _load(code32_ptr + group, keep, FULL).to(tl.uint32, bitcast=True)
            if WIDTH == 4:
                return word, word
            else:
                return word, (word >> (4 * WIDTH)) | (tail << (32 - 4 * WIDTH))
