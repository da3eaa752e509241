"""A Triton kernel for a norm over rows that stores its input, its output or both compressed, in one pass.

Before the norm it may add a residual, and apply the mask of a dropout to what is added; it draws nothing at random. A row is
in one program, a short one with others, so that one warp has no more than 32 lanes times the run of ``block_tiles``. Rows of
other widths than powers of two are filled up with zeros, which are masked.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .block_tiles import as_rows, numbers, places, rows, run, store
from .fused_kernels import nearest_pair, sums_of_tiles
from .kernels import compress_tile
from .memory_tiles import load, load_values, store_loaded
from .pair_tiles import float_bits


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    mask_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    bits_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    y_code32_ptr,
    y_code16_ptr,
    y_code8_ptr,
    y_scale_ptr,
    y_outlier_ptr,
    n_rows,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    KEPT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASK: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STORES_INPUT: tl.constexpr,
    STORES_OUTPUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i computes the rows [i * ROWS : (i + 1) * ROWS] of y from those of x, all [n_rows, WIDTH] of one dtype.

    NORM: ``layer`` or ``rms``, with EPS added to the variance; statistics, float32 [n_rows], are written to mean_ptr
    (``layer``) and rstd_ptr. With a RESIDUAL the norm is of the sum, which is written; with a MASK (bools) too, of x times
    KEPT where it is true and else 0, and the mask is written as bits. WEIGHT, BIAS: whether there is one. STORES_INPUT: the
    input (the sum, if there is one) goes to the first planes; STORES_OUTPUT: the output goes to those of y. WIDTH: a
    multiple of 8 and of blocks. PADDED: the same, or the next power of two, and then ROWS is 1. EVEN: n_rows is a multiple
    of ROWS. Pointers to what there is not are not used; the others are aligned to 16 bytes.
    """
    N: tl.constexpr = ROWS * PADDED // 8
    FULL: tl.constexpr = EVEN and WIDTH == PADDED
    row = tl.program_id(0).to(tl.int64) * ROWS
    n = tl.minimum(n_rows - row, ROWS).to(tl.int32)
    rest = WIDTH if ROWS == 1 else n * WIDTH
    group = row * (WIDTH // 8)
    block = row * (WIDTH // C.block)
    a, b = load_row_values(x_ptr + row * WIDTH, rest, N, C, FULL)
    if MASK:
        u, v = load_mask(mask_ptr + row * WIDTH, rest, N, C, FULL)
        of_runs = rows(N, 1, C)
        store(bits_ptr + group + of_runs, as_rows(mask_bits(u, v), C), of_runs * 8 < rest, FULL)
        a = dropped(a, u, v, KEPT, C)
        b = a
    if RESIDUAL:
        u, v = load_row_values(residual_ptr + row * WIDTH, rest, N, C, FULL)
        a, b = sums_of_tiles(u, v, a, b, C)
        store_row_values(sum_ptr + row * WIDTH, a, b, rest, N, C, FULL)
    x, z = tile_floats(a, b, C)
    index = tl.arange(0, ROWS)
    if NORM == "layer":
        mean = row_sums(x + z, ROWS, C) / WIDTH
        store(mean_ptr + row + index, mean, index < n, EVEN)
        x -= for_rows(mean, N, C)
        z -= for_rows(mean, N, C)
        if WIDTH != PADDED:
            inside = (numbers(N, C) * 8 < WIDTH).expand_dims(1)
            x = tl.where(inside, x, 0.0)
            z = tl.where(inside, z, 0.0)
    rstd = tl.rsqrt(row_sums(x * x + z * z, ROWS, C) / WIDTH + EPS)
    store(rstd_ptr + row + index, rstd, index < n, EVEN)
    x *= for_rows(rstd, N, C)
    z *= for_rows(rstd, N, C)
    x, z = scaled(x, z, weight_ptr, bias_ptr, WEIGHT, BIAS, WIDTH, PADDED, C)
    if C.dtype == 0:
        u = x.to(tl.int32, bitcast=True)
        v = z.to(tl.int32, bitcast=True)
    else:
        u = nearest_pair(x, z, C).to(tl.int32, bitcast=True)
        v = u
    store_row_values(y_ptr + row * WIDTH, u, v, rest, N, C, FULL)
    BLOCKS: tl.constexpr = ROWS * PADDED // C.block
    if STORES_INPUT:
        compress_tile(
            a, b, code32_ptr + group * (2 if C.width == 8 else 1), code16_ptr + group, code8_ptr + group,
            scale_ptr + block, outlier_ptr + block, x_ptr, x_ptr, 0, rest, C, BLOCKS, FULL,
        )  # fmt: skip
    if STORES_OUTPUT:
        compress_tile(
            u, v, y_code32_ptr + group * (2 if C.width == 8 else 1), y_code16_ptr + group, y_code8_ptr + group,
            y_scale_ptr + block, y_outlier_ptr + block, x_ptr, x_ptr, 0, rest, C, BLOCKS, FULL,
        )  # fmt: skip


@triton.jit
def load_row_values(x_ptr, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """As ``load_values``, of a number ``rest`` of whole groups: 16-bit values are always read by pairs, four at a time."""
    if C.dtype == 0:
        return load_values(x_ptr, rest, N, C, FULL)
    else:
        place = places(N, 4, C)
        keep = tl.max_constancy(place * 2 < rest, 4)
        pair = tl.reshape(load(x_ptr.to(tl.pointer_type(tl.int32)) + place, keep, FULL), [N, 4])
        return pair, pair


@triton.jit
def store_row_values(y_ptr, a, b, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """As ``store_loaded``, likewise."""
    if C.dtype == 0:
        store_loaded(y_ptr, a, b, rest, N, C, FULL)
    else:
        place = places(N, 4, C)
        keep = tl.max_constancy(place * 2 < rest, 4)
        store(y_ptr.to(tl.pointer_type(tl.int32)) + place, tl.reshape(a, [N * 4]), keep, FULL)


@triton.jit
def load_for_columns(weight_ptr, N: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, C: tl.constexpr):
    """The weights [WIDTH] of a tile's values, as floats."""
    FULL: tl.constexpr = WIDTH == PADDED
    bits_ptr = weight_ptr.to(tl.pointer_type(tl.int32))
    if C.dtype == 0:
        column = (numbers(N, C) * 8 % PADDED).expand_dims(1) + tl.arange(0, 4).expand_dims(0)
        return tile_floats(
            load(bits_ptr + column, column < WIDTH, FULL), load(bits_ptr + column + 4, column < WIDTH, FULL), C
        )
    else:
        column = tl.max_contiguous(tl.multiple_of(places(N, 4, C) % (PADDED // 2), 4), 4)
        keep = tl.max_constancy(column * 2 < WIDTH, 4)
        pair = tl.reshape(load(bits_ptr + column, keep, FULL), [N, 4])
        return tile_floats(pair, pair, C)


@triton.jit
def scaled(
    x, z, weight_ptr, bias_ptr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The floats of a tile times the weights, plus the biases, of their columns."""
    if WEIGHT:
        u, v = load_for_columns(weight_ptr, x.shape[0], WIDTH, PADDED, C)
        x *= u
        z *= v
    if BIAS:
        u, v = load_for_columns(bias_ptr, x.shape[0], WIDTH, PADDED, C)
        x += u
        z += v
    return x, z


@triton.jit
def tile_floats(a, b, C: tl.constexpr):
    """The values of a tile as ``load_values`` has it, as floats: the even and the odd ones, or the first and last four."""
    if C.dtype != 0:
        a, b = float_bits(a, C)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def row_sums(values, ROWS: tl.constexpr, C: tl.constexpr):
    """The sum [ROWS] of each row of a tile's ``values`` [N, 4]."""
    N: tl.constexpr = values.shape[0]
    RUN: tl.constexpr = run(N, C)
    of_groups = tl.reshape(tl.sum(values, axis=1), [RUN, ROWS, N // RUN // ROWS])
    return tl.sum(tl.sum(of_groups, axis=0), axis=1)


@triton.jit
def for_rows(values, N: tl.constexpr, C: tl.constexpr):
    """For each value [N, 4] of a tile what ``values`` [ROWS] have for its row."""
    ROWS: tl.constexpr = values.shape[0]
    RUN: tl.constexpr = run(N, C)
    of_groups = tl.broadcast_to(tl.reshape(values, [1, ROWS, 1]), [RUN, ROWS, N // RUN // ROWS])
    return tl.broadcast_to(tl.reshape(of_groups, [N]).expand_dims(1), [N, 4])


@triton.jit
def load_mask(mask_ptr, rest, N: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """The bools of the even and the odd values of a tile, 0 or 1 (int32)."""
    place = places(N, 4, C)
    keep = tl.max_constancy(place * 2 < rest, 4)
    pair = load(mask_ptr.to(tl.pointer_type(tl.int16)) + place, keep, FULL)
    pair = tl.reshape(pair, [N, 4]).to(tl.int32)
    return pair & 1, pair >> 8


@triton.jit
def mask_bits(u, v):
    """Bytes [N] of the bools of each group, of which the first is the lowest bit."""
    return tl.sum((u + (v << 1)) << (tl.arange(0, 4).expand_dims(0) * 2), axis=1).to(tl.uint8)


@triton.jit
def dropped(pair, u, v, KEPT: tl.constexpr, C: tl.constexpr):
    """16-bit values times the mask (u, v) and times KEPT, rounded once; infinities that are masked become NaN.

    Float32 values have no such function: the sum that follows would not see the rounded product, but the product.
    """
    tl.static_assert(C.dtype != 0)
    x, z = tile_floats(pair, pair, C)
    return nearest_pair(x * u.to(tl.float32) * KEPT, z * v.to(tl.float32) * KEPT, C).to(tl.int32, bitcast=True)
