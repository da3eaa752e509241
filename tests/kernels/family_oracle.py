"""The whole family once more, in exact rational arithmetic, one value at a time, written from the text of ``BFPFormat``.

Of the code it takes a format's fields, its levels, ``peak_factor``, ``search_offsets`` and ``least_scale``: numbers, which
``test_family.py`` looks at by themselves.
"""

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fxpipe.triton_kernels import BFPFormat

BASES = {
    "e8": (0, 0),
    "e6m2": (2, 127 - 31),
    "se5m2": (2, 127 - 15),
    "e5m3": (3, 127 - 15),
    "e5": (0, 112),
    "e4": (0, 120),
}
NANS = {"e8": 255, "e6m2": 255, "se5m2": 127, "e5m3": 255, "e5": 31, "e4": 15}


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def philox(seed: int, group: int, purpose: int) -> bytes:
    counter, key = [group % 2**32, ((seed >> 32) + purpose) % 2**32], seed % 2**32
    for _ in range(7):
        product = counter[0] * 0xD256D193
        counter = [product >> 32 ^ key ^ counter[1], product % 2**32]
        key = (key + 0x9E3779B9) % 2**32
    return struct.pack("<II", *counter)


def hashed(value: float) -> int:
    bits = bits_of(value) & 0x7FFFFFFF
    return (bits ^ bits >> 15) * 0x9E3779B9 % 2**32 >> 24


def nearest(x: Fraction) -> int:
    return round(x)  # Fractions round ties to even


class Block:
    """One block under encoding; ``noise`` is a byte a value."""

    def __init__(
        self, fmt: BFPFormat, values: Sequence[float], least: int, levels: Sequence[int], noise: Sequence[int]
    ):
        self.fmt, self.values, self.least, self.levels, self.noise = fmt, values, least, levels, noise
        self.mantissa_bits, self.bias = BASES[fmt.scale]
        self.M = fmt.width if fmt.unsigned else fmt.width - 1
        self.nan = NANS[fmt.scale]

    def scale(self, code: int) -> float:
        one = 1 << self.mantissa_bits
        return (1 + code % one / one) * 2.0 ** (code // one + self.bias - 127)

    def exponent(self, code: int) -> int:
        return (code >> self.mantissa_bits) + self.bias

    def encode(self) -> tuple[int, list[int], list[int]]:
        """The scale, the codes, the outliers' entries."""
        fmt = self.fmt
        none = [0] * fmt.outliers
        if not all(map(math.isfinite, self.values)):
            return self.nan, [0] * fmt.block, none
        apart = self.outliers()
        rest = [0.0 if i in apart else x for i, x in enumerate(self.values)]
        first = self.first(max(map(abs, rest)), apart)
        if first >= self.nan:
            return self.nan, [0] * fmt.block, none
        if fmt.zero_scale and not any(self.values):
            return 0, [self.code(0.0, math.inf, 0)] * fmt.block, none
        sign = -1 if fmt.scale == "se5m2" and max(rest) < -min(rest) else 1
        best = None
        for offset in fmt.search_offsets:
            code = max(min(max(first + offset, self.least), self.nan - 1), self.floor(apart))
            shared = sign * self.scale(code)
            codes = [self.code(x, shared, u) for x, u in zip(self.values, self.noise, strict=True)]
            error = sum(
                self.error(x, c, shared) ** 2
                for i, (x, c) in enumerate(zip(rest, codes, strict=True))
                if i not in apart
            )
            weighted = error * Fraction(shared) ** 2
            if best is None or weighted < best[0]:
                best = weighted, code, codes
        _, code, codes = best
        entries = []
        for i in self.chosen:
            entry = 0
            if i in apart:
                entry, codes[i] = self.entry(i, apart[i], code, codes[i])
            entries.append(entry)
        return code | (sign < 0) << 7, codes, entries

    def outliers(self) -> dict[int, int]:
        """The index of each outlier -> its bits, rounded, shifted down."""
        bits = [bits_of(abs(x)) if x > 0 or not self.fmt.unsigned else 0 for x in self.values]
        by_key = sorted(range(len(bits)), key=lambda i: (bits[i] >> 7, -i), reverse=True)
        self.chosen = by_key[: self.fmt.outliers]
        rest = max([bits[i] for i in by_key[self.fmt.outliers :]], default=0)
        if self.fmt.outlier_threshold:
            times = 2**self.fmt.outlier_threshold
            kept = [
                i
                for i in self.chosen
                if Fraction(float_of(bits[i])) >= times * Fraction(float_of(rest))
                and bits[i] >> 23 >= self.fmt.outlier_threshold
            ]
        else:
            kept = self.chosen
        drop = 2 ** (23 - self.M - self.extra)
        return {i: min(nearest(Fraction(bits[i], drop)), 0x7F800000 // drop - 1) for i in kept}

    @property
    def extra(self) -> int:
        return 12 - int(math.log2(self.fmt.block))

    def floor(self, apart: dict[int, int]) -> int:
        exponents = [rounded >> (self.M + self.extra) for rounded in apart.values()]
        return (max(exponents, default=0) - 13 - self.bias) << self.mantissa_bits

    def first(self, largest: float, apart: dict[int, int]) -> int:
        with np.errstate(over="ignore"):
            product = float(np.float32(largest) * np.float32(self.fmt.peak_factor))
        target = Fraction(min(product, 2.0**128))
        if self.fmt.absmax:
            below = [c for c in range(self.least, self.nan + 1) if self.scale(c) <= target]
            code = max(below, default=self.least)
            up = code < self.nan and target - self.scale(code) >= (self.scale(code + 1) - self.scale(code)) / 2
            return max(code + up, self.floor(apart))
        up = self.fmt.scale in ("e5m3", "e6m2", "se5m2") or self.fmt.rounding in ("sr", "hash")
        if up:
            code = next((c for c in range(self.least, self.nan) if self.scale(c) >= target), self.nan)
        else:
            code = next((c for c in range(self.nan - 1, self.least, -1) if self.scale(c) <= target), self.least)
            code = self.nan if target >= 2 * self.scale(self.nan - 1) else code
        return max(code, self.floor(apart))

    def steps(self, x: float, shared: float) -> Fraction:
        bits = self.M if not self.fmt.codebook else 7 if self.fmt.scale == "se5m2" else 8
        reciprocal = np.float64(1) / np.float64(shared)
        power = abs(math.frexp(shared)[0]) == 0.5
        reciprocal = 1 / Fraction(shared) if power else Fraction(float(np.float32(reciprocal)))
        return Fraction(x) * reciprocal * 2 ** (bits - 1)

    def code(self, x: float, shared: float, u: int) -> int:
        fmt, top = self.fmt, 2**self.M - 1
        t = self.steps(x, shared) if math.isfinite(shared) else Fraction(0)
        if fmt.scale == "se5m2":
            return self.level_index(max(-127, min(nearest(t), 127)), self.levels)
        if fmt.codebook:
            n = min(nearest(abs(t)), 255)
            if fmt.unsigned:
                return 1 + self.level_index(n, self.levels[1:]) if x > 0 else 0
            c = self.level_index(n, self.levels)
            return c + 2**self.M if x < 0 and self.levels[c] > 0 else c
        if fmt.rounding != "nearest":
            n = nearest(256 * abs(t)) + u + (128 if fmt.unsigned else 0)
            q = n // 256
        elif fmt.unsigned:
            q = nearest(Fraction(float(np.float32(float(t - Fraction(1, 2)))))) + 1
        else:
            q = nearest(abs(t))
        if fmt.unsigned:
            return max(1, min(q, top)) if x > 0 else 0
        q = min(q, top)
        if fmt.twos:
            return (-q if x < 0 else q) % 2**fmt.width
        return q + 2**self.M if x < 0 and q else q

    @staticmethod
    def level_index(n: int, levels: Sequence[int]) -> int:
        return min(range(len(levels)), key=lambda c: (abs(n - levels[c]), c))

    def magnitude(self, code: int) -> int:
        return 2**self.fmt.width - code if self.fmt.twos and code >> self.M else code % 2**self.M

    def error(self, x: float, code: int, shared: float) -> Fraction:
        if self.fmt.unsigned and x <= 0:
            return 0
        t = self.steps(x, shared)
        if self.fmt.scale == "se5m2":
            return min(abs(max(-255, min(nearest(t), 255)) - self.levels[code]), 2047)
        if self.fmt.codebook:
            return min(abs(min(nearest(abs(t)), 511) - self.levels[code % 2**self.M]), 2047)
        level = 16 * self.magnitude(code) - (8 if self.fmt.unsigned else 0)
        return min(abs(nearest(16 * abs(t)) - level), 2047)

    def entry(self, i: int, rounded: int, scale_code: int, code: int) -> tuple[int, int]:
        field = (rounded >> (self.M + self.extra)) - self.exponent(scale_code) + 2
        if field < 1:
            return 0, code
        mantissa = rounded % 2 ** (self.M + self.extra)
        entry = (field << 12) | (mantissa % 2**self.extra) << (12 - self.extra) | i
        return entry, mantissa >> self.extra | (0 if self.fmt.unsigned else (self.values[i] < 0) << self.M)


def store(values, fmt: BFPFormat, dtype: str, levels: Sequence[int], seed: int = 0):
    """Scale codes, codes and entries of all blocks."""
    filled = [*values, *[0.0] * (-len(values) % fmt.block)]
    noise = [0] * len(filled)
    if fmt.rounding == "sr":
        noise = [byte for g in range(len(filled) // 8) for byte in philox(seed, g, 0)]
    if fmt.rounding == "hash":
        noise = list(map(hashed, filled))
    parts = [slice(start, start + fmt.block) for start in range(0, len(filled), fmt.block)]
    blocks = [Block(fmt, filled[p], fmt.least_scale(dtype), levels, noise[p]).encode() for p in parts]
    return [b[0] for b in blocks], [b[1] for b in blocks], [b[2] for b in blocks]


def restore(stored, fmt: BFPFormat, levels: Sequence[int], seed: int = 0) -> list[list[Fraction | float]]:
    """The values of each block, exactly; NaN where the block is."""
    blocks = []
    for number, (scale, codes, entries) in enumerate(zip(*stored, strict=True)):
        block = Block(fmt, [], 0, levels, [])
        if scale & block.nan == block.nan:
            blocks.append([math.nan] * fmt.block)
            continue
        shared = Fraction(block.scale(scale & block.nan)) * (-1 if scale > block.nan else 1)
        if fmt.zero_scale and scale == 0:
            shared = Fraction(0)
        values = []
        for i, code in enumerate(codes):
            group, j = divmod(number * fmt.block + i, 8)
            v, w = (philox(seed, group, purpose)[j] for purpose in (1, 2)) if fmt.dither else (0, 0)
            away = min(v, w) if fmt.dither == "density" and w % 2 else v
            value = decoded(block, code, v, away)
            values.append(value * shared if value and shared else math.copysign(0.0, value or shared))
        for entry in entries:
            if entry >> 12:
                i = entry % 2 ** (12 - block.extra)
                code = codes[i]
                mantissa = (code % 2**block.M) << block.extra | (entry >> (12 - block.extra)) % 2**block.extra
                magnitude = (1 + Fraction(mantissa, 2 ** (block.M + block.extra))) * Fraction(2) ** (
                    block.exponent(scale & block.nan) + (entry >> 12) - 2 - 127
                )
                values[i] = -magnitude if not fmt.unsigned and code >> block.M else magnitude
        blocks.append(values)
    return blocks


def decoded(block: Block, code: int, v: int, away: int) -> Fraction:
    """In units of S."""
    fmt = block.fmt
    if fmt.codebook:
        signed = fmt.scale == "se5m2"
        place = min(code if signed else code % 2**block.M, len(block.levels) - 1)
        n = block.levels[place]
        if fmt.dither and n:
            first, last = cell(block, place, signed)
            shift = away * (last - first + 1) // 256
            n = first + shift if n > 0 else last - shift
        sign = 1 if signed or not code >> block.M else -1
        return Fraction(sign * n, 2 ** (6 if signed else 7))
    magnitude = Fraction(block.magnitude(code))
    if fmt.unsigned and not code:
        return magnitude
    if fmt.dither:
        magnitude += (Fraction(away if magnitude else v) + Fraction(1, 2)) / 256 - Fraction(1, 2)
    magnitude -= Fraction(1, 2) * fmt.unsigned
    return (-magnitude if not fmt.unsigned and code >> block.M else magnitude) / 2 ** (block.M - 1)


def cell(block: Block, place: int, signed: bool) -> tuple[int, int]:
    levels, grid = block.levels, range(-127, 128) if signed else range(1 if block.fmt.unsigned else 0, 256)
    candidates = levels[1:] if block.fmt.unsigned else levels
    nearest_to = [n for n in grid if Block.level_index(n, candidates) == place - block.fmt.unsigned]
    first, last = nearest_to[0], nearest_to[-1]
    if place == len(levels) - 1:
        last = min(grid[-1], 2 * levels[-1] - first)
    if signed and place == 0:
        first = max(-127, 2 * levels[0] - last)
    return first, last
