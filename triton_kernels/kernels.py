"""Triton kernels that store and restore block floating-point values, equal to ``reference`` bit for bit.

The arithmetic is in ``tiles`` and what it imports, the loads and stores in ``memory_tiles``. A program whose tile is full
masks nothing; only the last one's may not be. Offsets are marked as not contiguous where a wider access would move the
data through shared memory first. Every kernel moves its pointers itself: Inductor, which must know what a kernel writes to,
does not follow pointers that a function returns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import for_groups, numbers, store_for_blocks
from .many_outlier_tiles import put_many, take_out_many
from .memory_tiles import load, load_codes, load_values, pairs, store_code_rows, store_values
from .outlier_tiles import outliers_of, put_codes, put_pairs, put_values, take_out
from .pair_tiles import float_bits
from .scale_tiles import scales_of
from .search_tiles import searched
from .tiles import decode, encode, encode_in_turn


@triton.jit
def compress_kernel(
    x_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    seed_ptr,
    numel,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i stores x[i * BLOCKS * block : (i + 1) * BLOCKS * block], of x [numel], in the format C.

    The levels at level_ptr are read, not written.

    EVEN: numel is a multiple of BLOCKS * block. scale_ptr: a uint8 a block, scales of fewer bits not packed. Pointers to
    planes that the format does not have, and to a seed (int64) that it does not need, are not used; x_ptr is aligned to
    16 bytes.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    rest = tl.minimum(numel - block * C.block, BLOCKS * C.block).to(tl.int32)
    group = block * (C.block // 8)
    x_ptr += block * C.block
    code32_ptr += group * (2 if C.width == 8 else 1)
    code16_ptr += group
    code8_ptr += group
    scale_ptr += block
    outlier_ptr += block * C.outliers
    if EVEN or rest == BLOCKS * C.block:
        _compress_tile(
            x_ptr, code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, seed_ptr, group, rest, C,
            BLOCKS, True,
        )  # fmt: skip
    else:
        _compress_tile(
            x_ptr, code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, seed_ptr, group, rest, C,
            BLOCKS, False,
        )  # fmt: skip


@triton.jit
def decompress_kernel(
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    y_ptr,
    seed_ptr,
    numel,
    place_bits,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i restores y[i * BLOCKS * block : (i + 1) * BLOCKS * block], of y [numel].

    ``place_bits``: see ``tiles.decode``. The other arguments are those of ``compress_kernel``.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    rest = tl.minimum(numel - block * C.block, BLOCKS * C.block).to(tl.int32)
    group = block * (C.block // 8)
    code32_ptr += group * (2 if C.width == 8 else 1)
    code16_ptr += group
    code8_ptr += group
    scale_ptr += block
    outlier_ptr += block * C.outliers
    y_ptr += block * C.block
    if EVEN or rest == BLOCKS * C.block:
        _decompress_tile(
            code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, y_ptr, seed_ptr, group, rest,
            place_bits, C, BLOCKS, True,
        )  # fmt: skip
    else:
        _decompress_tile(
            code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, y_ptr, seed_ptr, group, rest,
            place_bits, C, BLOCKS, False,
        )  # fmt: skip


@triton.jit
def _compress_tile(
    x_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    seed_ptr,
    first_group,
    rest,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store the ``rest`` values at x_ptr; FULL: there are BLOCKS * block of them."""
    a, b = load_values(x_ptr, rest, BLOCKS * (C.block // 8), C, FULL)
    compress_tile(
        a,
        b,
        code32_ptr,
        code16_ptr,
        code8_ptr,
        scale_ptr,
        outlier_ptr,
        level_ptr,
        seed_ptr,
        first_group,
        rest,
        C,
        BLOCKS,
        FULL,
    )


@triton.jit
def compress_tile(
    a,
    b,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    seed_ptr,
    first_group,
    rest,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store the tile (a, b) as ``load_values`` has it, of which ``rest`` values are; FULL: all."""
    N: tl.constexpr = BLOCKS * (C.block // 8)
    if C.one_outlier:
        stored, code, entry, place, own, a, b = take_out(a, b, C)
    elif C.outliers > 0:
        stored, code, found, a, b = take_out_many(a, b, level_ptr, C)
    else:
        stored, code = scales_of(a, b, C)
        if len(C.search) > 0:
            code, a, b = searched(a, b, stored, 0, 0, level_ptr, C)
            stored = code
        if C.dtype != 0:
            a, b = float_bits(a, C)
    store_for_blocks(scale_ptr, stored.to(tl.uint8), rest, N, C, FULL)
    if C.one_outlier:
        store_for_blocks(outlier_ptr, entry.to(tl.int16), rest, N, C, FULL)
    seed = tl.load(seed_ptr) if C.rounding == "sr" else 0
    counter = (first_group + numbers(N, C)).to(tl.uint32) if C.rounding == "sr" else 0
    if C.packs and FULL:
        low, high = encode_in_turn(a, b, for_groups(code, N, C), seed, counter, level_ptr, C)
    else:
        low, high = encode(a, b, for_groups(code, N, C), seed, counter, level_ptr, C)
    if C.one_outlier:
        low, high = put_codes(low, high, for_groups(place, N, C), for_groups(own, N, C), C)
    elif C.outliers > 0:
        low, high = put_many(low, high, found, code, outlier_ptr, rest, C, FULL)
    store_code_rows(low, high, code32_ptr, code16_ptr, code8_ptr, rest, C, FULL)


@triton.jit
def _decompress_tile(
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    y_ptr,
    seed_ptr,
    first_group,
    rest,
    place_bits,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Restore the ``rest`` values at y_ptr; FULL: there are BLOCKS * block of them."""
    GROUPS: tl.constexpr = C.block // 8
    N: tl.constexpr = BLOCKS * GROUPS
    group = tl.max_contiguous(tl.arange(0, N), 1)
    keep = group // GROUPS * C.block < rest
    low, high = load_codes(code32_ptr, code16_ptr, code8_ptr, group, keep, C.width, FULL)
    code = load(scale_ptr + group // GROUPS, keep, FULL).to(tl.int32)
    seed = tl.load(seed_ptr) if C.dither != "" else 0
    counter = (first_group + group).to(tl.uint32) if C.dither != "" else 0
    a, b = decode(low, high, code, place_bits, seed, counter, level_ptr, C)
    nan = code.expand_dims(1) == C.scale_nan
    if C.dtype != 0:
        a = pairs(a, b, nan, C)
    OUTLIERS: tl.constexpr = C.outliers
    for i in tl.static_range(OUTLIERS):
        entry = load(outlier_ptr + group // GROUPS * C.outliers + i, keep, FULL).to(tl.int32)
        index, outlier = outliers_of(low, high, entry, code, C)
        if C.dtype == 0:
            a, b = put_values(a, b, index, outlier, C)
        else:
            a = put_pairs(a, index, pairs(outlier, outlier, nan, C), C)
    store_values(y_ptr, a, b, rest, N, C, FULL)
