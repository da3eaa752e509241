"""A tile's values and codes between device memory and registers.

One thread owns whole groups of 8 values, so that every width loads and stores aligned and without shared memory. 16-bit
values travel as pairs in an int32 ``w``: bfloat16's even value is ``w << 16`` as float32 bits, its odd one
``w & 0xffff0000``. FULL: nothing is masked.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import as_rows, numbers, places, rows, store


@triton.jit
def load(pointers, keep, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=keep, other=0)


@triton.jit
def load_values(x_ptr, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """The ``rest`` values at x_ptr, zeros beyond: float32 bits (a, b), each [N, 4], or twice the same pairs [N, 4]."""
    if C.dtype == 0:
        index = numbers(N, C).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
        bits_ptr = x_ptr.to(tl.pointer_type(tl.int32))
        return load(bits_ptr + index, index < rest, FULL), load(bits_ptr + index + 4, index + 4 < rest, FULL)
    else:
        if FULL:
            pair = tl.reshape(tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + places(N, 4, C)), [N, 4])
        else:  # one by one: nothing behind the last value is touched
            index = places(N, 8, C)
            value = tl.load(x_ptr.to(tl.pointer_type(tl.int16)) + index, mask=index < rest, other=0)
            even, odd = tl.split(tl.reshape(value, [N, 4, 2]))
            pair = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
        return pair, pair


@triton.jit
def store_loaded(y_ptr, a, b, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Write a tile of bits, in the order and form of ``load_values``, as the ``rest`` values at y_ptr."""
    if C.dtype == 0:
        index = numbers(N, C).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
        bits_ptr = y_ptr.to(tl.pointer_type(tl.int32))
        store(bits_ptr + index, a, index < rest, FULL)
        store(bits_ptr + index + 4, b, index + 4 < rest, FULL)
    elif FULL:
        tl.store(y_ptr.to(tl.pointer_type(tl.int32)) + places(N, 4, C), tl.reshape(a, [N * 4]))
    else:
        value = tl.join(a.to(tl.int16), (a >> 16).to(tl.int16))
        index = places(N, 8, C)
        tl.store(y_ptr.to(tl.pointer_type(tl.int16)) + index, tl.reshape(value, [N * 8]), mask=index < rest)


@triton.jit
def pairs(a, b, nan, C: tl.constexpr):
    """Pairs of 16-bit values (uint32) of the floats (a, b). ``nan`` [N, 1]: which groups' blocks are NaN."""
    if C.dtype == 2:
        return _halves(a, b, C)
    else:
        return _bfloats(a, b, nan, C)


@triton.jit
def store_values(y_ptr, a, b, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Write the tile as the ``rest`` values at y_ptr: of float32 a and b, else the pairs a."""
    if C.dtype == 0:
        index = tl.arange(0, N).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
        store(y_ptr + index, a, index < rest, FULL)
        store(y_ptr + index + 4, b, index + 4 < rest, FULL)
    elif FULL:
        tl.store(
            y_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, N * 4), tl.reshape(a, [N * 4]).to(tl.int32, bitcast=True)
        )
    else:
        value = tl.join(a.to(tl.int16), (a >> 16).to(tl.int16))
        index = tl.arange(0, N * 8)
        tl.store(y_ptr.to(tl.pointer_type(tl.int16)) + index, tl.reshape(value, [N * 8]), mask=index < rest)


@triton.jit
def _halves(a, b, C: tl.constexpr):
    """Pairs of float16 (uint32), clipped to the finite range if C.clip."""
    if C.packs:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [b, a], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        low = a.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = b.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        pair = low | (high << 16)
    if C.clip:  # one below infinity is the greatest number, one below a NaN still a NaN
        pair -= (((pair & 0x7FFF7FFF) + 0x04000400) >> 15) & 0x00010001
    return pair


@triton.jit
def _bfloats(a, b, nan, C: tl.constexpr):
    """Pairs of bfloat16 (uint32)."""
    if not C.inexact:
        return (a.to(tl.uint32, bitcast=True) >> 16) | b.to(tl.uint32, bitcast=True)
    elif C.packs:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [b, a], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        pair = (_rounded_bits(a) >> 16) | (_rounded_bits(b) & 0xFFFF0000)
        return tl.where(nan, 0x7FC07FC0, pair)


@triton.jit
def _rounded_bits(value):
    """Float32 bits whose upper half is the nearest bfloat16, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    return bits + 0x7FFF + ((bits >> 16) & 1)


@triton.jit
def store_codes(low, high, code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Deal the words of each group to the planes of 4, 2 and 1 bytes, low bits first."""
    if WIDTH == 8:
        words = tl.join(low, high).to(tl.int32, bitcast=True)
        both = group.expand_dims(1) * 2 + tl.arange(0, 2).expand_dims(0)
        store(code32_ptr + both, words, keep.expand_dims(1), FULL)
    else:
        tail = low
        if WIDTH >= 4:
            word = low
            if WIDTH > 4:
                word = low | (high << (4 * WIDTH))
                tail = high >> (32 - 4 * WIDTH)
            store(code32_ptr + group, word.to(tl.int32, bitcast=True), keep, FULL)
        if WIDTH & 2:
            store(code16_ptr + group, tail.to(tl.int16), keep, FULL)
            tail = tail >> 16
        if WIDTH & 1:
            store(code8_ptr + group, tail.to(tl.uint8), keep, FULL)


@triton.jit
def store_code_rows(low, high, code32_ptr, code16_ptr, code8_ptr, rest, C: tl.constexpr, FULL: tl.constexpr):
    """Deal the words [N] of a tile to the planes, a run at a time, of which the tile's ``rest`` values take some."""
    N: tl.constexpr = low.shape[0]
    if C.width < 8:
        group = rows(N, 1, C)
        keep = group // (C.block // 8) * C.block < rest
        low, high = as_rows(low, C), as_rows(high, C)
        store_codes(low, high, code32_ptr, code16_ptr, code8_ptr, group, keep, C.width, FULL)
    else:
        word = rows(N, 2, C)
        keep = word // (C.block // 4) * C.block < rest
        words = as_rows(tl.join(low, high), C).to(tl.int32, bitcast=True)
        if word.shape[1] <= 4:
            store(code32_ptr + word, words, keep, FULL)
        else:  # 16 bytes at a time
            first, second = tl.split(tl.permute(tl.reshape(words, [word.shape[0], 2, 4]), [0, 2, 1]))
            word = tl.arange(0, word.shape[0]).expand_dims(1) * 8 + tl.arange(0, 4).expand_dims(0)
            keep = word // (C.block // 4) * C.block < rest
            store(code32_ptr + word, first, keep, FULL)
            store(code32_ptr + word + 4, second, (word + 4) // (C.block // 4) * C.block < rest, FULL)


@triton.jit
def load_codes(code32_ptr, code16_ptr, code8_ptr, group, keep, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """The words of each group; what lies above the fields of ``low`` is not cleared."""
    if WIDTH == 8:
        both = group.expand_dims(1) * 2 + tl.arange(0, 2).expand_dims(0)
        low, high = tl.split(load(code32_ptr + both, keep.expand_dims(1), FULL).to(tl.uint32, bitcast=True))
        return low, high
    else:
        if WIDTH & 1:
            tail = load(code8_ptr + group, keep, FULL).to(tl.uint32)
        if WIDTH & 2:
            middle = load(code16_ptr + group, keep, FULL).to(tl.uint16, bitcast=True).to(tl.uint32)
            tail = (tail << 16) | middle if WIDTH & 1 else middle
        if WIDTH < 4:
            return tail, tail
        else:
            word = load(code32_ptr + group, keep, FULL).to(tl.uint32, bitcast=True)
            if WIDTH == 4:
                return word, word
            else:
                return word, (word >> (4 * WIDTH)) | (tail << (32 - 4 * WIDTH))
