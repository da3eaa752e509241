"""What each PTX opcode computes, on numpy arrays with one element a thread: see section 9.7 of the PTX ISA.

``OPCODES`` has the operands' types, the result's type, and a function, under the whole spelling of an opcode; with
"of 3" behind it where it has more operands than usual. A type is
one of PTX: ``u32`` is a uint32. ``f32x2`` is two float32 in a row.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    **{f"{kind}{8 * n}": np.dtype(f"{letter}{n}") for n in (1, 2, 4, 8) for kind, letter in ("uu", "si", "bu")},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f32x2": np.dtype("f4"),
    "pred": np.dtype("?"),
}


@dataclass(frozen=True)
class Opcode:
    """``result = function(*operands)``."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Array]


OPCODES: dict[str, Opcode] = {}


def _define(spelling: str, result: str, operands: list[str], function: Callable[..., Array]) -> None:
    OPCODES[spelling] = Opcode(result, tuple(operands), function)


def _shift(function: Callable[[Array, Array], Array], size: int) -> Callable[[Array, Array], Array]:
    """Amounts beyond the size shift as far as it goes."""

    def shifted(value: Array, amount: Array) -> Array:
        rest = value >> (size - 1) >> 1 if function is operator.rshift else value * 0  # the sign, or zero
        return np.where(amount < size, function(value, (amount & (size - 1)).astype(value.dtype)), rest)

    return shifted


def _number(result: Array) -> Array:
    """Every NaN that arithmetic makes is this one."""
    bits = np.where(np.isnan(result), np.uint32(0x7FFFFFFF), result.view(np.uint32))
    return bits.view(np.float32)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once. In float64 the product is exact, and the sum is rounded to odd before float32."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # of the sum, exactly
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return _number((bits + np.where(inexact, away, 0)).view(np.float64).astype(np.float32))


def _extreme(choose: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """fmin or fmax, where -0 is less than +0, and a number is preferred to a NaN."""

    def chosen(a: Array, b: Array) -> Array:
        signs = a.view(np.uint32) | b.view(np.uint32) if choose is np.fmin else a.view(np.uint32) & b.view(np.uint32)
        return _number(np.where((a == 0) & (b == 0), signs.view(np.float32), choose(a, b)))

    return chosen


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for place in range(4):
        nibble = (selector >> (4 * place)).astype(np.uint64) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte)
        result |= byte.astype(np.uint64) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _funnel(left: bool) -> Callable[[Array, Array, Array], Array]:
    def shifted(low: Array, high: Array, amount: Array) -> Array:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        by = (amount & 31).astype(np.uint64)
        return ((both << by >> np.uint64(32)) if left else (both >> by)).astype(np.uint32)

    return shifted


def _extract(value: Array, start: Array, length: Array) -> Array:
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return ((value.astype(np.uint64) >> start.astype(np.uint64)) & mask).astype(np.uint32)


def _extract_signed(value: Array, start: Array, length: Array) -> Array:
    up = 32 - start.astype(np.int32) - length.astype(np.int32)
    if (up < 0).any() or (length == 0).any():
        raise ValueError("bfe.s32 of bits that are not there")
    return (value << up) >> (up + start.astype(np.int32))


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    terms = [
        (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        for row in range(8)
        if int(table.flat[0]) >> row & 1
    ]
    return np.bitwise_or.reduce(np.broadcast_arrays(a & 0, *terms))


_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}

for _size in (16, 32, 64):
    _b, _u, _s = f"b{_size}", f"u{_size}", f"s{_size}"
    for _t in (_u, _s):
        _define(f"add.{_t}", _t, [_t, _t], operator.add)
        _define(f"sub.{_t}", _t, [_t, _t], operator.sub)
        _define(f"min.{_t}", _t, [_t, _t], np.minimum)
        _define(f"max.{_t}", _t, [_t, _t], np.maximum)
        _define(f"mul.lo.{_t}", _t, [_t, _t], operator.mul)
        _define(f"mad.lo.{_t}", _t, [_t, _t, _t], lambda a, b, c: a * b + c)
        _define(f"shr.{_t}", _t, [_t, "u32"], _shift(operator.rshift, _size))
        if _size < 64:
            _w = f"{_t[0]}{2 * _size}"
            _define(f"mul.wide.{_t}", _w, [_t, _t], lambda a, b, w=_w: a.astype(DTYPES[w]) * b)
            _define(f"mad.wide.{_t}", _w, [_t, _t, _w], lambda a, b, c, w=_w: a.astype(DTYPES[w]) * b + c)
    _define(f"neg.{_s}", _s, [_s], operator.neg)
    _define(f"shl.{_b}", _b, [_b, "u32"], _shift(operator.lshift, _size))
    for _t in (_b, _u, _s):
        for _name, _function in _COMPARE.items():
            _define(f"setp.{_name}.{_t}", "pred", [_t, _t], _function)
        _define(f"selp.{_t}", _t, [_t, _t, "pred"], lambda a, b, p: np.where(p, a, b))
        _define(f"mov.{_t}", _t, [_t], lambda a: a)
for _b in ("b16", "b32", "b64", "pred"):
    _define(f"and.{_b}", _b, [_b, _b], operator.and_)
    _define(f"or.{_b}", _b, [_b, _b], operator.or_)
    _define(f"xor.{_b}", _b, [_b, _b], operator.xor)
    _define(f"not.{_b}", _b, [_b], operator.invert)
for _t in (f"{kind}{size}" for kind in "us" for size in (8, 16, 32, 64)):
    for _from in (f"{kind}{size}" for kind in "us" for size in (8, 16, 32, 64)):
        _define(f"cvt.{_t}.{_from}", _t, [_from], lambda a, t=_t: a.astype(DTYPES[t]))

_define("mul.hi.u32", "u32", ["u32", "u32"], lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32))
_define("min.relu.s32", "s32", ["s32", "s32"], lambda a, b: np.maximum(np.minimum(a, b), 0))
_define("max.relu.s32", "s32", ["s32", "s32"], lambda a, b: np.maximum(np.maximum(a, b), 0))
_define("prmt.b32", "b32", ["b32", "b32", "b32"], _permute)
_define("shf.l.wrap.b32", "b32", ["b32", "b32", "b32"], _funnel(left=True))
_define("shf.r.wrap.b32", "b32", ["b32", "b32", "b32"], _funnel(left=False))
_define("bfe.u32", "u32", ["u32", "u32", "u32"], _extract)
_define("bfe.s32", "s32", ["s32", "u32", "u32"], _extract_signed)
_define("lop3.b32", "b32", ["b32", "b32", "b32", "u32"], _logic)

for _t in ("f32", "f32x2"):
    _define(f"add.{_t}", _t, [_t, _t], lambda a, b: _number(a + b))
    _define(f"sub.{_t}", _t, [_t, _t], lambda a, b: _number(a - b))
    _define(f"mul.{_t}", _t, [_t, _t], lambda a, b: _number(a * b))
    _define(f"fma.rn.{_t}", _t, [_t, _t, _t], fused)
_define(
    "fma.rn.sat.f32", "f32", ["f32"] * 3, lambda a, b, c: np.fmin(np.fmax(fused(a, b, c), np.float32(0)), np.float32(1))
)
for _name, _function in _COMPARE.items():
    for _t in ("f16", "f32"):
        _define(f"setp.{_name}.{_t}", "pred", [_t, _t], _function)
_define("selp.f32", "b32", ["b32", "b32", "pred"], lambda a, b, p: np.where(p, a, b))
_define("mov.f32", "b32", ["b32"], lambda a: a)
_define("min.f32", "f32", ["f32", "f32"], _extreme(np.fmin))
_define("max.f32", "f32", ["f32", "f32"], _extreme(np.fmax))
_define("min.f32 of 3", "f32", ["f32"] * 3, lambda a, b, c: _extreme(np.fmin)(_extreme(np.fmin)(a, b), c))
_define("max.f32 of 3", "f32", ["f32"] * 3, lambda a, b, c: _extreme(np.fmax)(_extreme(np.fmax)(a, b), c))
_define("cvt.f32.bf16", "f32", ["u16"], lambda a: _number((a.astype(np.uint32) << np.uint32(16)).view(np.float32)))
_define("add.rn.f32.f16", "f32", ["f16", "f32"], lambda a, b: _number(a.astype(np.float32) + b))
_define("fma.rn.f32.f16", "f32", ["f16", "f16", "f32"], lambda a, b, c: fused(a.astype("f4"), b.astype("f4"), c))
_define("cvt.rn.f32.s32", "f32", ["s32"], lambda a: a.astype(np.float32))
_define("cvt.rn.f32.u16", "f32", ["u16"], lambda a: a.astype(np.float32))
_define("cvt.rn.f32.u32", "f32", ["u32"], lambda a: a.astype(np.float32))
_define("neg.s32", "s32", ["s32"], operator.neg)
_define("cvt.f32.f16", "f32", ["f16"], lambda a: _number(a.astype(np.float32)))
_define("cvt.rn.f16.f32", "f16", ["f32"], lambda a: np.where(np.isnan(a), np.uint16(0x7FFF), a.astype("f2").view("u2")))


def _bfloat(value: Array) -> Array:
    """The bits of the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _half(value: Array) -> Array:
    """The bits of the nearest float16, ties to even."""
    return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype("f2").view("u2"))


def _pair(of_one: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda high, low: of_one(low) | of_one(high).astype(np.uint32) << 16


_define("cvt.rn.bf16.f32", "u16", ["f32"], _bfloat)
_define("cvt.rn.bf16x2.f32", "b32", ["f32", "f32"], _pair(_bfloat))
_define("cvt.rn.f16x2.f32", "b32", ["f32", "f32"], _pair(_half))
# Devices err by up to 2 units in the last place in these three, and the ISA does not say how: here they are the nearest.
_define("ex2.approx.f32", "f32", ["f32"], lambda a: _number(np.exp2(a.astype(np.float64)).astype(np.float32)))
_define(
    "rsqrt.approx.ftz.f32", "f32", ["f32"], lambda a: _number((1 / np.sqrt(a.astype(np.float64))).astype(np.float32))
)
_define("div.full.f32", "f32", ["f32", "f32"], lambda a, b: _number(a / b))
_define("abs.f32", "f32", ["f32"], lambda a: (a.view(np.uint32) & 0x7FFFFFFF).view(np.float32))
_define("neg.f32", "f32", ["f32"], lambda a: (a.view(np.uint32) ^ 0x80000000).view(np.float32))


def _of_halves(choose: Callable[[Array, Array], Array], to_float: Callable[[Array], Array]) -> Callable[..., Array]:
    """The greater or the lesser of two 16-bit floats in each half of a word; a NaN wins; -0 is less than +0."""

    def chosen(a: Array, b: Array) -> Array:
        result = np.zeros_like(a)
        for shift in (0, 16):
            x, y = ((value >> shift).astype(np.uint16) for value in (a, b))
            signs = x | y if choose is np.minimum else x & y
            x_float, y_float = to_float(x), to_float(y)
            best = np.where(choose(x_float, y_float) == x_float, x, y)
            best = np.where((x_float == 0) & (y_float == 0), signs, best)
            best = np.where(np.isnan(x_float) | np.isnan(y_float), np.uint16(0x7FFF), best)
            result |= best.astype(np.uint32) << shift
        return result

    return chosen


for _kind, _to_float in (
    ("bf16x2", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)),
    ("f16x2", lambda bits: bits.view(np.float16)),
):
    _define(f"abs.{_kind}", "b32", ["b32"], lambda a: a & 0x7FFF7FFF)
    _define(f"max.NaN.{_kind}", "b32", ["b32", "b32"], _of_halves(np.maximum, _to_float))
    _define(f"min.NaN.{_kind}", "b32", ["b32", "b32"], _of_halves(np.minimum, _to_float))


def _bfloat_pairs(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in each half of a word. In float64, which may round twice."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for shift in (0, 16):
        x, y, z = ((value >> shift << 16).astype(np.uint32).view(np.float32).astype(np.float64) for value in (a, b, c))
        result |= _bfloat((x * y + z).astype(np.float32)).astype(np.uint32) << shift
    return result


_define("fma.rn.bf16x2", "b32", ["b32", "b32", "b32"], _bfloat_pairs)
_define("popc.b32", "u32", ["b32"], lambda a: np.unpackbits(a[..., None].view(np.uint8), axis=-1).sum(-1, np.uint32))
_define("add.s16x2", "b32", ["b32", "b32"], lambda a, b: ((a & 0xFFFF) + b & 0xFFFF) | ((a >> 16) + (b >> 16) << 16))


def _halves_less(a: Array, b: Array) -> Array:
    """a - b in each half of a word, rounded once."""
    result = np.zeros(np.broadcast(a, b).shape, np.uint32)
    for shift in (0, 16):
        x, y = ((value >> shift).astype(np.uint16).view(np.float16) for value in (a, b))
        result |= _half(x.astype(np.float32) - y).astype(np.uint32) << shift
    return result


def _squares_of_bytes(a: Array, b: Array, c: Array) -> Array:
    products = [(a >> shift & 255) * (b >> shift & 255) for shift in (0, 8, 16, 24)]
    return np.add.reduce(products) + c


_define("sub.rn.f16x2", "b32", ["b32", "b32"], _halves_less)
_define("dp4a.u32.u32", "u32", ["u32", "u32", "u32"], _squares_of_bytes)
_define(
    "cvt.rzi.s32.f32",
    "s32",
    ["f32"],
    lambda a: np.nan_to_num(a.astype(np.float64)).clip(-(2**31), 2**31 - 1).astype(np.int32),
)
for _name, _function in (("min", np.minimum), ("max", np.maximum)):
    _define(
        f"{_name}.u16x2",
        "b32",
        ["b32", "b32"],
        lambda a, b, f=_function: f(a & 0xFFFF, b & 0xFFFF) | f(a >> 16, b >> 16) << 16,
    )
_define(
    "bfe.u64",
    "u64",
    ["u64", "u32", "u32"],
    lambda a, start, length: a >> start.astype(np.uint64) & (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1),
)
for _from in ("u16", "s16"):  # exact
    _define(f"cvt.rn.f32.{_from}", "f32", [_from], lambda a: a.astype(np.float32))
