"""Triton kernels of zero compression, equal to ``zero_reference`` bit for bit.

A program handles a tile of GROUPS groups, a thread whole groups. Where a group's codes go follows from a sum over the masks
before it in the tile, and where the tile's go from a sum over tiles between the two kernels that compress. Codes of neighbours
share words, so these are put together by atomic or, whose result does not depend on the order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .kernels import _load_codes, _store_codes


@triton.jit
def mask_kernel(
    code32_ptr, code16_ptr, code8_ptr, mask_ptr, words_ptr, n_groups, WIDTH: tl.constexpr, GROUPS: tl.constexpr
):
    """Program i writes mask[i * GROUPS : (i + 1) * GROUPS] and words[i], how many words the tile's codes take."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    keep = group < n_groups - first
    low, high = _tile_codes(code32_ptr, code16_ptr, code8_ptr, first, group, keep, WIDTH)
    mask = tl.zeros([GROUPS], tl.int32)
    for j in tl.static_range(8):
        mask |= (_field(low, high, j, WIDTH) != 0).to(tl.int32) << j
    tl.store(mask_ptr + first + group, mask.to(tl.uint8), mask=keep)
    bits = tl.sum(_count(mask) * WIDTH, axis=0)
    tl.store(words_ptr + tl.program_id(0), ((bits + 31) // 32).to(tl.int64))


@triton.jit
def payload_kernel(
    code32_ptr, code16_ptr, code8_ptr, start_ptr, payload_ptr, n_groups, WIDTH: tl.constexpr, GROUPS: tl.constexpr
):
    """Program i adds the codes of its tile to payload, which holds zeros, from word start[i] on."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    low, high = _tile_codes(code32_ptr, code16_ptr, code8_ptr, first, group, group < n_groups - first, WIDTH)
    packed = tl.zeros([GROUPS], tl.uint64)
    bits = tl.zeros([GROUPS], tl.int32)
    for j in tl.static_range(8):
        field = _field(low, high, j, WIDTH)
        packed |= field.to(tl.uint64) << bits.to(tl.uint64)
        bits += (field != 0).to(tl.int32) * WIDTH
    begin = tl.cumsum(bits, axis=0) - bits
    payload_ptr += tl.load(start_ptr + tl.program_id(0))
    shift = (begin & 31).to(tl.uint64)
    below = (packed & 0xFFFFFFFF) << shift
    _add_word(payload_ptr + (begin >> 5), below)
    above = ((packed >> 32) << shift) | (below >> 32)
    _add_word(payload_ptr + (begin >> 5) + 1, above)
    if WIDTH > 4:
        _add_word(payload_ptr + (begin >> 5) + 2, above >> 32)


@triton.jit
def restore_kernel(
    mask_ptr,
    start_ptr,
    payload_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    n_groups,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Program i writes the codes of its tile."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.max_contiguous(tl.arange(0, GROUPS), 1)
    keep = group < n_groups - first
    mask = tl.load(mask_ptr + first + group, mask=keep, other=0).to(tl.int32)
    bits = _count(mask) * WIDTH
    begin = tl.cumsum(bits, axis=0) - bits
    start = tl.load(start_ptr + tl.program_id(0))
    left = tl.load(start_ptr + tl.program_id(0) + 1) - start
    payload_ptr += start
    word = begin >> 5
    shift = (begin & 31).to(tl.uint64)
    packed = (_word(payload_ptr, word, left) | (_word(payload_ptr, word + 1, left) << 32)) >> shift
    if WIDTH > 4:
        packed |= (_word(payload_ptr, word + 2, left) << (63 - shift)) << 1
    low = tl.zeros([GROUPS], tl.uint32)
    high = tl.zeros([GROUPS], tl.uint32)
    for j in tl.static_range(8):
        here = (mask >> j) & 1
        field = tl.where(here != 0, packed & ((1 << WIDTH) - 1), 0).to(tl.uint32)
        packed = packed >> (here * WIDTH).to(tl.uint64)
        if WIDTH <= 4 or j < 4:
            low |= field << (j * WIDTH)
        else:
            high |= field << ((j - 4) * WIDTH)
    code32_ptr += first * (2 if WIDTH == 8 else 1)
    _store_codes(low, high, code32_ptr, code16_ptr + first, code8_ptr + first, group, keep, WIDTH, False)


@triton.jit
def _tile_codes(code32_ptr, code16_ptr, code8_ptr, first, group, keep, WIDTH: tl.constexpr):
    code32_ptr += first * (2 if WIDTH == 8 else 1)
    return _load_codes(code32_ptr, code16_ptr + first, code8_ptr + first, group, keep, WIDTH, False)


@triton.jit
def _field(low, high, j: tl.constexpr, WIDTH: tl.constexpr):
    """Code j of each group."""
    in_low: tl.constexpr = WIDTH <= 4 or j < 4
    word = low >> (j * WIDTH) if in_low else high >> ((j - 4) * WIDTH)
    return word & ((1 << WIDTH) - 1)


@triton.jit
def _count(mask):
    """How many of the 8 bits are set."""
    count = (mask & 0x55) + ((mask >> 1) & 0x55)
    count = (count & 0x33) + ((count >> 2) & 0x33)
    return (count & 0x0F) + (count >> 4)


@triton.jit
def _add_word(pointers, value):
    word = value.to(tl.uint32).to(tl.int32, bitcast=True)
    tl.atomic_or(pointers, word, mask=word != 0, sem="relaxed")


@triton.jit
def _word(payload_ptr, index, left):
    """The word at each index, of ``left`` words; 0 behind them."""
    word = tl.load(payload_ptr + index, mask=index < left, other=0)
    return word.to(tl.uint32, bitcast=True).to(tl.uint64)
