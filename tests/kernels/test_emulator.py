"""The PTX emulator: what opcodes compute, against other arithmetic; and what it refuses."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from kernels.emulator import Memory, emulate
from kernels.ptx import PtxError, parse
from kernels.ptx_opcodes import OPCODES

N = 4096
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-126), 3.4e38, 65504.0, 65520.0, 2.0**-25]


def bits(size: int, seed: int) -> np.ndarray:
    g = np.random.default_rng(seed)
    return g.integers(0, 2**size, N, dtype=np.uint64).astype(f"u{size // 8}")


def floats(seed: int) -> np.ndarray:
    """Any bits, near numbers, and the special ones."""
    g = np.random.default_rng(seed)
    near = np.ldexp(g.standard_normal(N // 2), g.integers(-4, 4, N // 2)).astype(np.float32)
    made = np.concatenate([near, bits(32, seed).view(np.float32)[: N // 2]])
    made[g.integers(0, N, 8 * len(SPECIAL))] = np.float32(SPECIAL * 8)
    return made


def run(spelling: str, *operands: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return OPCODES[spelling].function(*operands)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    assert a.dtype == b.dtype == np.float32
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan].view(np.int32), b[~nan].view(np.int32))


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.u32", lambda a, b: a * b >> 32),
        ("min.u32", min),
        ("max.u32", max),
        ("min.s32", lambda a, b: min(a, b, key=signed)),
        ("max.s32", lambda a, b: max(a, b, key=signed)),
        ("min.relu.s32", lambda a, b: max(min(signed(a), signed(b)), 0)),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
    ],
)
def test_two_integers(spelling, expected):
    kind = {"u": "u4", "s": "i4", "b": "u4"}[spelling.rpartition(".")[2][0]]
    a, b = bits(32, 1), bits(32, 2)
    found = run(spelling, a.view(kind), b.view(kind)).astype(np.int64) % 2**32
    assert found.tolist() == [expected(int(x), int(y)) % 2**32 for x, y in zip(a, b, strict=True)]


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@pytest.mark.parametrize("amount", [0, 1, 7, 31, 32, 40])
def test_shifts_run_out(amount):
    a, by = bits(32, 3), np.full(1, amount, np.uint32)
    assert run("shl.b32", a, by).tolist() == [(int(x) << amount) % 2**32 for x in a]
    assert run("shr.u32", a, by).tolist() == [int(x) >> amount for x in a]
    assert run("shr.s32", a.view("i4"), by).tolist() == [signed(int(x)) >> amount for x in a]
    wide = [int(x) + (int(y) << 32) for x, y in zip(a, bits(32, 4), strict=True)]
    assert run("shf.l.wrap.b32", a, bits(32, 4), by).tolist() == [x << amount % 32 >> 32 & 0xFFFFFFFF for x in wide]
    assert run("shf.r.wrap.b32", a, bits(32, 4), by).tolist() == [x >> amount % 32 & 0xFFFFFFFF for x in wide]


def test_bytes_and_fields():
    a, b = np.uint32([0x33221100]), np.uint32([0x7766F544])
    assert run("prmt.b32", a, b, np.uint32([0x7632])).tolist() == [0x77663322]
    assert run("prmt.b32", a, b, np.uint32([0xD541])).tolist() == [0xFFF54411]
    assert run("bfe.u32", a, np.uint32([8]), np.uint32([9])).tolist() == [0x011]
    for table, logic in [(0x80, a & b & 5), (0x96, a ^ b ^ 5), (0xF8, a | (b & 5)), (0x00, a * 0)]:
        assert run("lop3.b32", a, b, np.uint32([5]), np.uint32([table])).tolist() == logic.tolist()


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_two_floats(name):
    a, b = floats(5), floats(6)
    assert same(run(f"{name}.f32", a, b), getattr(torch, name)(torch.from_numpy(a), torch.from_numpy(b)).numpy())


def test_fused_multiply_add_rounds_once():
    a, b = floats(7), floats(8)
    with np.errstate(all="ignore"):
        c = np.where(np.arange(N) % 3 == 0, -(a * b), floats(9))  # and where most of it cancels
    found = run("fma.rn.f32", a, b, c)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    assert finite.sum() > N / 2
    for x, y, z, r in zip(a[finite], b[finite], c[finite], found[finite], strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if not np.isfinite(r):
            assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
            continue
        for other in (np.nextafter(r, np.float32(-np.inf)), np.nextafter(r, np.float32(np.inf))):
            if np.isfinite(other):
                ours, its = abs(Fraction(float(r)) - exact), abs(Fraction(float(other)) - exact)
                assert ours < its or (ours == its and int(r.view(np.int32)) % 2 == 0)
    with np.errstate(all="ignore"):
        assert np.array_equal(np.isnan(found[~finite]), np.isnan((a.astype("f8") * b + c)[~finite]))


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_prefer_numbers_and_order_zeros(name):
    a, b = floats(10), floats(11)
    found = run(f"{name}.f32", a, b)
    assert same(found, np.where((a == 0) & (b == 0), found, getattr(np, "f" + name)(a, b)))
    zeros = run(f"{name}.f32", np.float32([0.0, -0.0, 0.0]), np.float32([-0.0, 0.0, 0.0]))
    assert np.signbit(zeros).tolist() == ([True, True, False] if name == "min" else [False] * 3)


def test_half_precision():
    a = floats(12)
    half = torch.from_numpy(a).half()
    found = torch.from_numpy(run("cvt.rn.f16.f32", a).view(np.float16))
    assert torch.equal(found.isnan(), half.isnan())
    assert torch.equal(found.nan_to_num(7.0).view(torch.int16), half.nan_to_num(7.0).view(torch.int16))
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert same(run("cvt.f32.f16", every), torch.from_numpy(every).float().numpy())


def kernel(body: str) -> str:
    """Of one warp; parameter 0 is read, parameter 1 written."""
    return f""".visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1
)
.reqntid 32
{{
	mov.u32 %r1, %tid.x;
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	mad.wide.u32 %rd3, %r1, 4, %rd1;
	mad.wide.u32 %rd4, %r1, 4, %rd2;
	ld.global.b32 {{ %r2 }}, [ %rd3 + 0 ];
	{body}
	ret;
}}
"""


EXCHANGE = """shl.b32 %r5, %r1, 2;
st.shared.b32 [%r5], %r2;
bar.sync 0;
xor.b32 %r6, %r5, 4;
ld.shared.b32 %r2, [%r6];
"""


def ran(body: str, store: str = "st.global.b32 [ %rd4 + 0 ], { %r2 };") -> list[int]:
    memory = Memory()
    source = memory.place(np.arange(32, dtype=np.uint32) * 3)
    target = memory.place(np.zeros(32, np.uint32), writable=True)
    emulate(parse(kernel(f"{body}\n{store}")), memory, [source, target], [0])
    return memory.at(target, 128).view(np.uint32).tolist()


def test_a_kernel():
    assert ran("") == [3 * i for i in range(32)]
    assert ran("shfl.sync.bfly.b32 %r2, %r2, 5, 31, -1;") == [3 * (i ^ 5) for i in range(32)]
    assert ran("setp.lt.s32 %p1, %r1, 9;\n@%p1 mov.b32 %r2, 1;") == [1 if i < 9 else 3 * i for i in range(32)]
    assert ran("mov.b32 {%rs1, %rs2}, %r2;\nmov.b32 %r2, {%rs2, %rs1};") == [3 * i << 16 for i in range(32)]


def test_shared_memory_and_shuffles_by_lane():
    assert ran(EXCHANGE) == [3 * (i ^ 1) for i in range(32)]
    assert ran("xor.b32 %r6, %r1, 9;\nshfl.sync.idx.b32 %r2, %r2, %r6, 31, -1;") == [3 * (i ^ 9) for i in range(32)]
    shared = "mov.b32 %r5, global_smem;\nsetp.lt.s32 %p1, %r1, 1;\n@%p1 st.shared.b32 [%r5+8], %r1;\nbar.sync 0;\n"
    assert ran(f"{shared}ld.shared.b32 %r2, [%r5+8];") == [0] * 32


def test_threads_part_at_a_branch():
    body = "setp.lt.s32 %p1, %r1, 9;\n@!%p1 bra $L1;\nadd.s32 %r2, %r2, 100;\n$L1:\n"
    assert ran(body) == [3 * i + 100 * (i < 9) for i in range(32)]


def test_a_loop_goes_on_in_the_threads_that_take_the_branch():
    body = "mov.b32 %r2, 0;\n$L0:\nadd.s32 %r2, %r2, 5;\nsetp.lt.s32 %p1, %r2, %r1;\n@%p1 bra $L0;"
    assert ran(body) == [max(1, -(-i // 5)) * 5 for i in range(32)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("wgmma.fence.sync.aligned;", "unknown opcode 'wgmma.fence.sync.aligned', at instruction 6: wgmma.fence"),
        ("ld.shared.b32 %r2, [%r1];", "shared memory is not aligned"),
        ("shl.b32 %r5, %r1, 8;\nld.shared.b32 %r2, [%r5];", "or outside of it"),
        ("shl.b32 %r5, %r1, 2;\nld.shared.b32 %r2, [%r5];", "shared memory is read before it is written"),
        (EXCHANGE.replace("bar.sync 0;", ""), "shared memory that another thread uses, without a barrier between them"),
        (EXCHANGE + "st.shared.b32 [%r5], %r2;", "shared memory that another thread uses, without a barrier"),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n", "a barrier that not all threads come to"),
        ("red.shared.add.u32 [%r1], 1;", "unknown opcode 'red.shared.add.u32'"),
        ("add.s32 %r2, %r2, %r9;", "%r9 is read before it is written"),
        ("$L0:\nbra $L0;", "no loops"),
        ("ld.global.b32 { %r2 }, [ %rd3 + 4 ];", "4 bytes lies outside of the buffers"),
        ("ld.global.b32 { %r2 }, [ %rd3 + 2 ];", "4 bytes is not aligned"),
        ("ld.global.v2.b32 { %r2, %r3 }, [ %rd3 + 0 ];", "8 bytes is not aligned"),
        ("ld.global.b32 { %r2 }, [ %rd4 + 0 ];", "outside of the buffers"),
        ("st.global.b32 [ %rd3 + 0 ], { %r2 };", "outside of the buffers"),
        ("mov.b64 %rd4, 0;", "outside of the buffers"),
        ("st.global.b32 [ %rd4 + 0 ], { %r2 };", "a byte is written more than once"),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 bra $L1;\nshfl.sync.bfly.b32 %r2, %r2, 1, 31, -1;\n$L1:\n", "whole warps"),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 mov.b32 %r7, 1;", "%r7 is first written by some threads only"),
        ("what is this?", "cannot read 'what is this?'"),
    ],
)
def test_what_it_refuses(body, why):
    with pytest.raises(PtxError, match=r"(?s).*") as refusal:
        ran(body)
    assert why in str(refusal.value)


def test_bytes_that_nothing_writes():
    with pytest.raises(PtxError, match="or not at all"):
        ran("setp.lt.s32 %p1, %r1, 9;", store="@%p1 st.global.b32 [ %rd4 + 0 ], { %r2 };")


def test_what_the_search_for_scales_takes():
    a, b = bits(32, 41), bits(32, 42)
    bytes_of = [word.view(np.uint8).reshape(-1, 4).astype(np.int64) for word in (a, b)]
    dots = (bytes_of[0] * bytes_of[1]).sum(axis=1) + 7
    assert np.array_equal(run("dp4a.u32.u32", a, b, np.full(N, 7, np.uint32)), dots)
    x, y = (np.random.default_rng(seed).integers(-2047, 2048, 2 * N).astype(np.float16) for seed in (43, 44))
    less = run("sub.rn.f16x2", x.view(np.uint32), y.view(np.uint32)).view(np.float16)
    assert np.array_equal(less, torch.sub(torch.from_numpy(x), torch.from_numpy(y)).numpy())
    assert list(run("cvt.rzi.s32.f32", np.array([2.9, -2.9, np.nan, 3e9], np.float32))) == [2, -2, 0, 2**31 - 1]
    assert [hex(v) for v in run("max.u16x2", np.array([0x0001FFFF], np.uint32), np.array([0x8000], np.uint32))] == [
        "0x1ffff"
    ]
    assert list(run("cvt.rn.f32.u16", np.array([65535], np.uint16))) == [65535.0]
    assert list(run("bfe.u64", np.array([0xABCD << 20], np.uint64), np.array([20]), np.array([8]))) == [0xCD]
