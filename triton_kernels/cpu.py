"""The path for CPU tensors, equal to ``reference`` bit for bit: the compiled kernel of ``native``, else numba's loops where
they know the format, else eager operators.

In eager operators, values pass in chunks that stay in cache. Scaling, rounding and offset are a multiplication and an
addition that leave the code in a float's low bits; from there on eight codes are handled at a time, one a byte of an
int64.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import by_definition, jitted, native
from .format import EXPONENT_NAN, GROUP, BFPFormat
from .reference import dtype_name

CHUNK = 1 << 18
"""Values that are handled at a time: a whole number of blocks of any size."""

_ROUND = 1.5 * 2**23


def compress(x_flat: Tensor, fmt: BFPFormat, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """As ``reference.compress``."""
    if native.ready():
        return native.compress(x_flat.detach(), fmt, seed)
    if jitted.ready(fmt):
        return jitted.compress(x_flat, fmt)
    if not fmt.is_basic:
        return by_definition.compress(x_flat, fmt, seed, CHUNK)
    exponent_min = fmt.exponent_min(dtype_name(x_flat.dtype, fmt))
    x_flat = x_flat.detach()
    numel = x_flat.numel()
    planes = tuple(x_flat.new_empty(p.length, dtype=getattr(torch, p.dtype)) for p in fmt.planes(numel))
    scratch = x_flat.new_empty(min(CHUNK, fmt.n_blocks(numel) * fmt.block), dtype=torch.float32)
    for start in range(0, numel, CHUNK):
        values = _blocks(x_flat[start : start + CHUNK], fmt.block)
        work = scratch[: values.numel()].view_as(values)
        exponents = _shared_exponents(values, work, exponent_min)
        codes = _codes_unsigned(values, exponents, work, fmt) if fmt.unsigned else _codes(values, exponents, work, fmt)
        *codes_out, exponents_out = _of_chunk(planes, fmt, start)
        if fmt.width == 4:
            _pack_nibbles(codes, codes_out[0], fmt)
        else:
            _pack(codes.view(torch.int64), codes_out, fmt)
        finite = exponents != EXPONENT_NAN
        if not finite.all():
            for plane in codes_out:
                plane.view(finite.numel(), -1).mul_(finite.unsqueeze(1))
        exponents_out.copy_(exponents)
    return planes


def decompress(
    planes: Sequence[Tensor], fmt: BFPFormat, numel: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """As ``reference.decompress``."""
    if native.ready():
        return native.decompress(planes, fmt, numel, dtype, seed)
    if jitted.ready(fmt):
        return jitted.decompress(planes, fmt, numel, dtype)
    if not fmt.is_basic:
        return by_definition.decompress(planes, fmt, numel, dtype, seed, CHUNK)
    dtype_name(dtype, fmt)
    out = planes[0].new_empty(numel, dtype=dtype)
    scratch = out.new_empty(min(CHUNK, fmt.n_blocks(numel) * fmt.block), dtype=torch.float32)
    for start in range(0, numel, CHUNK):
        *codes_in, exponents = _of_chunk(planes, fmt, start)
        codes = _unpack_nibbles(codes_in[0], fmt) if fmt.width == 4 else _unpack(codes_in, fmt)
        values = scratch[: codes.numel()]
        values.copy_(codes)
        if fmt.unsigned:
            values.sub_(0.5).clamp_(min=0.0)
        else:
            values.sub_(1 << fmt.magnitude_bits)
        values.view(-1, fmt.block).mul_(_steps(exponents, fmt.magnitude_bits).unsqueeze(1))
        part = out[start : start + CHUNK]
        part.copy_(values[: part.numel()])
    return out


def _blocks(values: Tensor, block: int) -> Tensor:
    """[n] of any of the dtypes -> float32 [n_blocks, block], filled up with zeros."""
    values = values.float()
    if values.numel() % block:
        values = torch.nn.functional.pad(values, (0, -values.numel() % block))
    return values.view(-1, block)


def _shared_exponents(values: Tensor, work: Tensor, least: int) -> Tensor:
    largest = torch.abs(values, out=work).amax(dim=1)
    return (largest.view(torch.int32) >> 23).clamp_(min=least)


def _codes(values: Tensor, exponents: Tensor, work: Tensor, fmt: BFPFormat) -> Tensor:
    """Codes (uint8 [n]) plus 2^M. One bit of magnitude doubles all: 1/step may be no normal float."""
    double = 1 if fmt.magnitude_bits == 1 else 0
    offset = 1 << fmt.magnitude_bits
    reciprocals = ((253 + fmt.magnitude_bits + double - exponents) << 23).view(torch.float32)
    sums = torch.mul(values, reciprocals.unsqueeze(1), out=work).add_((_ROUND + offset) * (1 + double))
    if fmt.width == GROUP:
        sums.clamp_(max=_ROUND + 255)
    return sums.view(torch.int32).to(torch.uint8).clamp_(1, 2 * offset - 1).flatten()


def _codes_unsigned(values: Tensor, exponents: Tensor, work: Tensor, fmt: BFPFormat) -> Tensor:
    reciprocals = ((253 + fmt.magnitude_bits - exponents) << 23).view(torch.float32)
    cells = torch.mul(values, reciprocals.unsqueeze(1), out=work).sub_(0.5)
    cells.clamp_(max=(1 << fmt.width) - 2).add_(_ROUND)
    codes = cells.view(torch.int32).to(torch.uint8).add_(1)
    positive = torch.clamp(values.view(torch.int32), 0, 1, out=work.view(torch.int32))  # several times as fast as > 0
    return codes.mul_(positive.to(torch.uint8)).flatten()


def _steps(exponents: Tensor, magnitude_bits: int) -> Tensor:
    steps = ((exponents.to(torch.int32) - (magnitude_bits - 1)) << 23).view(torch.float32)
    return steps.masked_fill_(exponents == EXPONENT_NAN, torch.nan)


@cache
def _each(value: int, period: int, bits: int) -> int:
    """The integer of so many bits that holds ``value`` at each multiple of ``period``."""
    word = sum(value << shift for shift in range(0, bits, period))
    return word - (word >> (bits - 1) << bits)


def _pack_nibbles(codes: Tensor, plane: Tensor, fmt: BFPFormat) -> None:
    """As ``_pack``, for codes of 4 bits: two in a byte, and from there on eight in a word."""
    pairs = codes.view(torch.int16)
    plane.view(torch.uint8).copy_((pairs >> 4).bitwise_or_(pairs))  # keeps the low bits
    if not fmt.unsigned:
        _sign_and_magnitude(plane, 4, 4)


def _unpack_nibbles(plane: Tensor, fmt: BFPFormat) -> Tensor:
    """The inverse: codes (uint8), plus 2^M if signed."""
    if not fmt.unsigned:
        plane = _offset_codes(plane, 4, 4)
    pairs = plane.view(torch.uint8).to(torch.int16)
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)


def _pack(words: Tensor, planes: list[Tensor], fmt: BFPFormat) -> None:
    """Codes, one a byte of the int64 words [n / 8], plus 2^M if signed -> the planes."""
    if not fmt.unsigned:
        _sign_and_magnitude(words, fmt.width, GROUP)
    _deal(_narrow(words, fmt.width), planes, fmt)


def _unpack(planes: list[Tensor], fmt: BFPFormat) -> Tensor:
    words = _widen(_collect(planes, fmt), fmt.width)
    return (words if fmt.unsigned else _offset_codes(words, fmt.width, GROUP)).view(torch.uint8)


def _sign_and_magnitude(words: Tensor, width: int, period: int) -> None:
    """In place, of codes at each multiple of ``period`` bits."""
    bits = 8 * words.itemsize
    signs = _each(1 << (width - 1), period, bits)
    negative = (words & signs).bitwise_xor_(signs)
    ones = (negative >> (width - 1)).bitwise_and_(_each(1, period, bits))
    words.bitwise_xor_(negative - ones).bitwise_and_(~signs).add_(ones).bitwise_or_(negative)


def _offset_codes(words: Tensor, width: int, period: int) -> Tensor:
    bits = 8 * words.itemsize
    signs = _each(1 << (width - 1), period, bits)
    negative = words & signs
    ones = (negative >> (width - 1)).bitwise_and_(_each(1, period, bits))
    magnitudes = (words & ~signs).bitwise_xor_(negative - ones).add_(ones)
    return magnitudes.add_(negative.bitwise_xor_(signs))


def _narrow(words: Tensor, width: int) -> Tensor:
    """A code in each byte -> eight codes in the low bits."""
    for fields in (1, 2, 4) if width < GROUP else ():
        apart, bits = GROUP * fields, width * fields
        lower, upper = words & _runs(bits, 2 * apart), words >> (apart - bits)
        words = lower.bitwise_or_(upper.bitwise_and_(_runs(bits, 2 * apart) << bits))
    return words


def _widen(words: Tensor, width: int) -> Tensor:
    """Eight codes in the low bits, whatever lies above them -> a code in each byte."""
    for fields in (4, 2, 1) if width < GROUP else ():
        apart, bits = GROUP * fields, width * fields
        lower, upper = words & _runs(bits, 2 * apart), words << (apart - bits)
        words = lower.bitwise_or_(upper.bitwise_and_(_runs(bits, 2 * apart) << apart))
    return words


@cache
def _runs(ones: int, period: int) -> int:
    """The non-negative int64 with ``ones`` bits set at each multiple of ``period``."""
    return sum(((1 << ones) - 1) << shift for shift in range(0, 64, period))


def _of_chunk(planes: Sequence[Tensor], fmt: BFPFormat, start: int) -> list[Tensor]:
    """The parts of ``planes`` that store the chunk at value ``start``."""
    if start == 0 and planes[-1].numel() * fmt.block <= CHUNK:
        return list(planes)
    before, through = fmt.planes(start), fmt.planes(start + CHUNK)
    return [plane[a.length : b.length] for plane, a, b in zip(planes, before, through, strict=True)]


def _deal(words: Tensor, planes: list[Tensor], fmt: BFPFormat) -> None:
    """Write the low W bytes of each word to the planes of 4, 2 and 1 bytes."""
    if fmt.width == GROUP:
        planes[0].copy_(words.view(torch.int32))
        return
    for plane in planes:
        plane.copy_(words)  # keeps the low bits
        words = words >> (8 * plane.itemsize)


def _collect(planes: list[Tensor], fmt: BFPFormat) -> Tensor:
    if fmt.width == GROUP:
        return planes[0].view(torch.int64) if planes[0].data_ptr() % 8 == 0 else planes[0].clone().view(torch.int64)
    words, shift = None, 0
    for plane in planes:
        part = (plane.long() & ((1 << (8 * plane.itemsize)) - 1)) << shift
        words = part if words is None else words | part
        shift += 8 * plane.itemsize
    assert words is not None
    return words
