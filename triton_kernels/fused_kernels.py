"""A Triton kernel that computes an activation or a sum, writes it, and stores what it read or wrote compressed, in one pass.

Of a value that is kept for backward, this saves reading it once more: an activation of 16-bit values in 4 bits moves 4.5 bytes
instead of 6.5, a sum 6.5 instead of 8.5.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton knows no Python types)

import triton
import triton.language as tl

from .kernels import compress_tile
from .memory_tiles import load_values, store_loaded
from .pair_tiles import float_bits


@triton.jit
def fused_kernel(
    x_ptr,
    z_ptr,
    y_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    numel,
    PRODUCER: tl.constexpr,
    STORED: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program i computes y[i * BLOCKS * block : (i + 1) * BLOCKS * block] from x, and from z if PRODUCER is ``add``.

    All are [numel] of one dtype. PRODUCER: ``add`` or one of ``activated``. STORED: what goes to the planes, ``input``
    (x), ``output`` or, for comparison, ``none``.
    The other arguments are those of ``compress_kernel``; formats that need a seed have no such kernel.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    rest = tl.minimum(numel - block * C.block, BLOCKS * C.block).to(tl.int32)
    group = block * (C.block // 8)
    x_ptr += block * C.block
    z_ptr += block * C.block
    y_ptr += block * C.block
    code32_ptr += group * (2 if C.width == 8 else 1)
    code16_ptr += group
    code8_ptr += group
    scale_ptr += block
    outlier_ptr += block * C.outliers
    if EVEN or rest == BLOCKS * C.block:
        _fused_tile(
            x_ptr, z_ptr, y_ptr, code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, rest, PRODUCER, STORED,
            C, BLOCKS, True,
        )  # fmt: skip
    else:
        _fused_tile(
            x_ptr, z_ptr, y_ptr, code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, rest, PRODUCER, STORED,
            C, BLOCKS, False,
        )  # fmt: skip


@triton.jit
def _fused_tile(
    x_ptr,
    z_ptr,
    y_ptr,
    code32_ptr,
    code16_ptr,
    code8_ptr,
    scale_ptr,
    outlier_ptr,
    level_ptr,
    rest,
    PRODUCER: tl.constexpr,
    STORED: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
):
    N: tl.constexpr = BLOCKS * (C.block // 8)
    a, b = load_values(x_ptr, rest, N, C, FULL)
    if PRODUCER == "add":
        u, v = load_values(z_ptr, rest, N, C, FULL)
        u, v = sums_of_tiles(a, b, u, v, C)
    elif C.dtype == 0:
        u = activated(a, PRODUCER).to(tl.int32, bitcast=True)
        v = activated(b, PRODUCER).to(tl.int32, bitcast=True)
    else:
        even, odd = float_bits(a, C)
        u = nearest_pair(activated(even, PRODUCER), activated(odd, PRODUCER), C).to(tl.int32, bitcast=True)
        v = u
    store_loaded(y_ptr, u, v, rest, N, C, FULL)
    if STORED == "output":
        a = u
        b = v
    if STORED != "none":
        compress_tile(
            a, b, code32_ptr, code16_ptr, code8_ptr, scale_ptr, outlier_ptr, level_ptr, x_ptr, 0, rest, C, BLOCKS, FULL
        )  # fmt: skip


@triton.jit
def sums_of_tiles(a, b, c, d, C: tl.constexpr):
    """The tile (a, b) and the tile (c, d) as ``load_values`` has them, added value by value, each sum rounded once."""
    if C.dtype == 0:
        u = a.to(tl.float32, bitcast=True) + c.to(tl.float32, bitcast=True)
        v = b.to(tl.float32, bitcast=True) + d.to(tl.float32, bitcast=True)
        return u.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True)
    else:
        even, odd = float_bits(a, C)
        other_even, other_odd = float_bits(c, C)
        u = even.to(tl.float32, bitcast=True) + other_even.to(tl.float32, bitcast=True)
        v = odd.to(tl.float32, bitcast=True) + other_odd.to(tl.float32, bitcast=True)
        pair = nearest_pair(u, v, C).to(tl.int32, bitcast=True)
        return pair, pair


@triton.jit
def activated(bits, ACTIVATION: tl.constexpr):
    """The activation of a tile of float32 bits, as floats."""
    x = bits.to(tl.float32, bitcast=True)
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        return x / (1.0 + tl.exp((x * x * x * 0.044715 + x) * -1.5957691216057308))


@triton.jit
def nearest_pair(a, b, C: tl.constexpr):
    """Pairs of the nearest 16-bit floats (uint32), ties to even."""
    if C.packs:
        INSTRUCTION: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, $2;" if C.dtype == 1 else "cvt.rn.f16x2.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(INSTRUCTION, "=r,r,r", [b, a], dtype=tl.uint32, is_pure=True, pack=1)
    elif C.dtype == 1:
        return (_nearest_bfloat(a) >> 16) | (_nearest_bfloat(b) & 0xFFFF0000)
    else:
        low = a.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = b.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high << 16)


@triton.jit
def _nearest_bfloat(value):
    """Float32 bits whose upper half is the nearest bfloat16."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
