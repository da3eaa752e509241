"""The index of the nearest level as a rounded curve of the value: some multiplies and adds, and no comparison.

Imports neither torch nor triton. Of a value's n on the grid two instructions make u, which is 0 at the first level and 1 at
the last; where a processor has a multiply-add that clips its result to 0 .. 1, they are one. The index is u times a
polynomial, rounded: of u, or of another such ramp v, which is 0 before a knee, so that the curve may bend there. It is
fitted to the thresholds between levels, and used only if it is right for every n of the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
ROUND = 12582912
"""1.5 * 2^23: what is added to it is rounded to a whole number."""

_MOST_DEGREES = 7
_ROOM = 1e-4
_ROUNDS = 60
_ENDS = (1, 2, 4, 6, 9, 13, 19)
_STARTS = tuple(i / 16 for i in range(-2, 16))
_KNEES = (0.2, 0.3, 0.4, 0.5)


class Ramp(NamedTuple):
    """min(max(x * slope + offset, 0), 1), of two float32."""

    slope: float
    offset: float

    def __call__(self, x: _Floats) -> _Floats:
        return _float32(x * self.slope + self.offset).clip(0, 1)


class Curve(NamedTuple):
    """u = first(1.5 * 2^23 + n), v = second(u) if there is one, else u; the index is u * (c[0] + c[1] * v + ...), rounded."""

    first: Ramp
    second: Ramp | None
    coefficients: tuple[float, ...]

    def values(self, n: _Floats) -> _Floats:
        """What is rounded, for each n, in float32's arithmetic."""
        u = self.first(ROUND + n)
        v = self.second(u) if self.second else u
        value = np.full_like(u, self.coefficients[-1])
        for coefficient in self.coefficients[-2::-1]:
            value = _float32(value * v + coefficient)
        return u * value


@dataclass(frozen=True)
class Thresholds:
    """Whole numbers between which the index rises by one, on the grid from ``least`` to ``greatest``."""

    values: tuple[int, ...]
    least: int
    greatest: int

    def serve(self, curve: Curve) -> bool:
        """Whether the curve rounds to how many thresholds n exceeds, for each n and whatever is beyond the grid."""
        n = np.arange(self.least, self.greatest + 1)
        wanted = np.searchsorted(np.array(self.values) + 0.5, n)
        return bool((np.abs(curve.values(n.astype(np.float64)) - wanted) < 0.5 - _ROOM).all())


@lru_cache(maxsize=256)
def curve(thresholds: Thresholds) -> Curve | None:
    """The curve of fewest instructions that serves; none if it would take many."""
    for degree in range(1, _MOST_DEGREES + 1):
        for knee in (None, *(_KNEES if degree > 3 else ())):
            for first in _first_ramps(thresholds):
                found = _fitted(thresholds, first, knee, degree - (knee is not None))
                if found:
                    return found
    return None


def _first_ramps(thresholds: Thresholds) -> Iterator[Ramp]:
    for part in _STARTS:
        start = thresholds.least + part * (thresholds.values[0] - thresholds.least)
        for further in _ENDS:
            length = thresholds.values[-1] + further - start
            yield _ramp(1 / length, -(ROUND + start) / length)


def _ramp(slope: float, offset: float) -> Ramp:
    return Ramp(*map(float, _float32(np.array([slope, offset]))))


def _float32(values: _Floats) -> _Floats:
    return values.astype(np.float32).astype(np.float64)


def _fitted(thresholds: Thresholds, first: Ramp, knee: float | None, degree: int) -> Curve | None:
    second = None if knee is None else _ramp(1 / (1 - knee), -knee / (1 - knee))
    for coefficients in _fits(thresholds, first, second, degree):
        found = Curve(first, second, tuple(map(float, coefficients)))
        if thresholds.serve(found):
            return found
    return None


def _fits(thresholds: Thresholds, first: Ramp, second: Ramp | None, degree: int) -> Iterator[_Floats]:
    """Least squares, weighted ever more to the least greatest error: Lawson's algorithm."""
    below = np.array(thresholds.values, dtype=np.float64)
    aim = np.append(np.arange(len(below)) + 0.5, len(below))

    def rows(n: _Floats) -> _Floats:
        u = np.append(first(ROUND + n), 1)
        powers: _Floats = np.vander(second(u) if second else u, degree, increasing=True)
        return u[:, None] * powers

    before, behind = rows(below), rows(below + 1)
    middle, across = (before + behind) / 2, (behind - before) / 2
    room = np.append(
        np.gradient(aim, np.append(below, 2 * below[-1] - below[-2] if len(below) > 1 else 256))[:-1] / 2, 0.49
    )
    weights = np.full(len(aim), 1 / len(aim))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights) / room
        found = _float32(np.linalg.lstsq(middle * root[:, None], aim * root, rcond=None)[0])
        far = np.abs(middle @ found - aim) / room
        if weights @ far**2 > 1.2:  # no other has less
            return
        if far.max() < 1.1:
            yield found
        room[:-1] = np.maximum(across @ found, 1e-3)[:-1]
        weights *= far + 1e-9
        weights /= weights.sum()
