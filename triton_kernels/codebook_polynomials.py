"""The index of the nearest level as a rounded polynomial of the value: some multiplies and adds, and no comparison.

Imports neither torch nor triton. The polynomial is fitted to the thresholds between levels and is used only if it is
right for every n of the grid, with room for the rounding of float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_MOST_DEGREES = 8
_ROOM = 1e-3
_ROUNDS = 30
_SLACKS = (4.0, 20.0, 100.0, 1e6)
"""How little the ends of the grid count, against thresholds."""


@dataclass(frozen=True)
class Thresholds:
    """Whole numbers between which the index rises by one, on the grid from ``least`` to ``greatest``."""

    values: tuple[int, ...]
    least: int
    greatest: int

    def serve(self, origin: int, coefficients: _Floats) -> bool:
        """Whether the polynomial rounds to how many thresholds n exceeds.

        Above the last threshold it may come to more, and for ``least`` < 0 below the first to less.
        """
        n = np.arange(self.least, self.greatest + 1)
        wanted = np.searchsorted(np.array(self.values) + 0.5, n)
        found = np.polynomial.polynomial.polyval((n - origin) / 128, coefficients)
        found = np.where(wanted == len(self.values), np.minimum(found, wanted), found)
        if self.least < 0:
            found = np.where(wanted == 0, np.maximum(found, 0), found)
        return bool((np.abs(found - wanted) < 0.5 - _ROOM).all())


@lru_cache(maxsize=256)
def polynomial(thresholds: Thresholds) -> tuple[int, tuple[float, ...]]:
    """(origin, coefficients) of u = (n - origin) / 128, that of u^0 first: float32 each, the first a whole number.

    So adding it and rounding are one instruction. Empty if there is none of few degrees.
    """
    for degree in range(1, _MOST_DEGREES + 1):
        for slack in _SLACKS:
            free = _fitted(thresholds, degree, slack, 0, None)
            if free is None:
                continue
            n = np.arange(thresholds.least, thresholds.greatest + 1)
            values = np.polynomial.polynomial.polyval(n / 128, free)
            inside = (values > 0.5) & (values < len(thresholds.values) - 0.5)
            distance = np.where(inside, np.abs(values - values.round()), 1)
            for place in np.argsort(distance)[:3]:
                fixed = _fitted(thresholds, degree, slack, int(n[place]), round(values[place]))
                if fixed is not None:
                    return int(n[place]), tuple(map(float, fixed))
    return 0, ()


def _fitted(thresholds: Thresholds, degree: int, slack: float, origin: int, first: int | None) -> _Floats | None:
    """A polynomial that serves, with that first coefficient if there is one."""
    for found in _fits(thresholds, degree, slack, origin, first):
        if thresholds.serve(origin, found):
            return found
    return None


def _fits(thresholds: Thresholds, degree: int, slack: float, origin: int, first: int | None) -> Iterator[_Floats]:
    """Least squares, weighted ever more to the least greatest error: Lawson's algorithm."""
    places, index, scale = _targets(thresholds, slack)
    fixed = 0 if first is None else 1
    rows = np.vander(places - origin / 128, degree + 1, increasing=True)[:, fixed:] / scale[:, None]
    aim = (index - (first or 0)) / scale
    weights = np.ones(len(aim))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(rows * root[:, None], aim * root, rcond=None)[0].astype(np.float32).astype(np.float64)
        yield found if first is None else np.concatenate([[float(first)], found])
        weights *= np.abs(rows @ found - aim) + 1e-9
        weights /= weights.sum()


def _targets(thresholds: Thresholds, slack: float) -> tuple[_Floats, _Floats, _Floats]:
    """Places in units of 128, what the polynomial is to be there, and how far off it may be, more or less."""
    values = np.array([threshold + 0.5 for threshold in thresholds.values]) / 128
    index = np.arange(len(values)) + 0.5
    slopes = np.gradient(index, values)
    least, greatest = thresholds.least / 128, thresholds.greatest / 128
    first = index[0] - slopes[0] * (values[0] - least)
    last = index[-1] + slopes[-1] * (greatest - values[-1])
    ends = [first if least < 0 else max(first, -0.2), last]
    return (
        np.array([least, *values, greatest]),
        np.array([ends[0], *index, ends[1]]),
        np.array([slack * slopes[0], *slopes, slack * slopes[-1]]),
    )
