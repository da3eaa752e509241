"""The formats once more, in exact rational arithmetic, one value at a time, written from the text of ``BFPFormat``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

NAN = 255


@dataclass(frozen=True)
class Oracle:
    """A format by its numbers; ``exponent_min`` is 24, or 103 + W for unsigned float16."""

    width: int
    block: int
    unsigned: bool
    exponent_min: int

    @property
    def magnitude_bits(self) -> int:
        return self.width if self.unsigned else self.width - 1

    def blocks(self, values: Sequence[float]) -> list[list[float]]:
        filled = [*values, *[0.0] * (-len(values) % self.block)]
        return [filled[start : start + self.block] for start in range(0, len(filled), self.block)]

    def exponent(self, block: Sequence[float]) -> int:
        if not all(map(math.isfinite, block)):
            return NAN
        largest = max(map(abs, block))
        if largest == 0:
            return self.exponent_min
        return max(self.exponent_min, math.frexp(largest)[1] - 1 + 127)

    def step(self, exponent: int) -> Fraction:
        return Fraction(2) ** (exponent - 127 - (self.magnitude_bits - 1))

    def code(self, value: float, exponent: int) -> int:
        if exponent == NAN:
            return 0
        top = 2**self.magnitude_bits - 1
        steps = Fraction(value) / self.step(exponent)
        if self.unsigned:
            return min(round(steps - Fraction(1, 2)) + 1, top) if value > 0 else 0
        q = max(-top, min(round(steps), top))  # Fractions round ties to even
        return q if q >= 0 else 2**self.magnitude_bits - q

    def value(self, code: int, exponent: int) -> float:
        if exponent == NAN:
            return math.nan
        if self.unsigned:
            return float((code - Fraction(1, 2)) * self.step(exponent)) if code else 0.0
        sign, magnitude = divmod(code, 2**self.magnitude_bits)
        return float(magnitude * self.step(exponent) * (-1) ** sign)

    def store(self, values: Sequence[float]) -> tuple[bytes, bytes]:
        """The bytes of all groups, and the exponents."""
        groups, exponents = b"", b""
        for block in self.blocks(values):
            exponent = self.exponent(block)
            codes = [self.code(value, exponent) for value in block]
            for start in range(0, self.block, 8):
                bits = sum(code << (self.width * j) for j, code in enumerate(codes[start : start + 8]))
                groups += bits.to_bytes(self.width, "little")
            exponents += bytes([exponent])
        return groups, exponents

    def restore(self, groups: bytes, exponents: bytes, n: int) -> list[float]:
        """The first ``n`` values."""
        values = []
        for start in range(0, len(groups), self.width):
            bits = int.from_bytes(groups[start : start + self.width], "little")
            exponent = exponents[start // self.width * 8 // self.block]
            values += [self.value(bits >> (self.width * j) & (2**self.width - 1), exponent) for j in range(8)]
        return values[:n]


def group_bytes(planes: Sequence[bytes], width: int) -> bytes:
    """The bytes of all groups, gathered from the planes of codes: 4, 2 and 1 bytes a group, 8 for width 8."""
    sizes = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[width]
    n_groups = len(planes[0]) // sizes[0]
    parts = [
        [plane[size * g : size * (g + 1)] for g in range(n_groups)] for plane, size in zip(planes, sizes, strict=True)
    ]
    return b"".join(b"".join(part[g] for part in parts) for g in range(n_groups))
