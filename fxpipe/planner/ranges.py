"""The cost model for stages on consecutive devices, in closed form over arrays of ranges.

``cost_model.py`` says what is charged; this file says the same for the range ``[start, end)`` of a block, which ``n_copies``
blocks of consecutive devices repeat. A block holds whole units of a level, or is held by one.
"""

from math import prod

import numpy as np

from fxpipe.ir.topology import Level, Topology
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.profile import Floats, Ints

MOST_IDLE = 7


class Ranges:
    """Ranges of the devices of one block; all arrays broadcast against each other."""

    def __init__(self, topology: Topology, model: CostModel, n_copies: int) -> None:
        self.topology, self.model, self.n_copies = topology, model, n_copies
        self.block = topology.n_devices // n_copies

    @property
    def units(self) -> list[int]:
        """The devices in a unit of each level that a block holds several of."""
        return [unit for unit, _ in self._levels() if unit < self.block]

    @property
    def period(self) -> int:
        """Ranges that are shifted by this many devices have the same links."""
        return max(self.units, default=1)

    @property
    def most_idle(self) -> int:
        """How many devices may stay idle after the last stage of a block: that shifts the ranges against the units."""
        return min(MOST_IDLE, min((unit for unit in self.units if unit > 1), default=1) - 1)

    def _levels(self) -> list[tuple[int, Level]]:
        """Each level with the devices in one of its units."""
        sizes = [level.size for level in self.topology.levels]
        return [(prod(sizes[:k]), level) for k, level in enumerate(self.topology.levels)]

    def all_reduce(self, start: Ints, end: Ints) -> Floats:
        """Seconds for each byte of parameters."""
        found: Floats = np.zeros(np.broadcast_shapes(np.shape(start), np.shape(end)))
        for unit, level in self._levels():
            if unit >= self.block:
                groups = np.full(found.shape, level.size if unit * level.size <= self.topology.n_devices else 1)
            else:
                groups = _most_units(start // unit, (end - 1) // unit, level.size)
                groups = groups * max(1, unit * level.size // self.block)
            found = found + (2 if self.model.ring_all_reduce else 4) * (groups - 1) / groups / (
                level.bandwidth_bytes_per_second
            )
        return found

    def link(self, start: Ints, end: Ints, next_start: Ints, next_end: Ints) -> Floats:
        """Seconds for each byte between a stage on ``[start, end)`` and the next on ``[next_start, next_end)``."""
        left, right = end - start, next_end - next_start
        found: Floats = 2 / np.minimum(left, right) / self.n_copies / self.topology.levels[0].bandwidth_bytes_per_second
        for unit, level in self._levels()[1:]:
            if unit >= self.block:
                continue  # each unit holds as much of both
            last, first = (end - 1) // unit * unit, next_start // unit * unit  # the units at the cut: where they begin
            x, y = np.minimum(end - last, left), np.minimum(first + unit - next_start, right)
            share = np.where(last == first, np.abs(x / left - y / right), np.maximum(x / left, y / right))
            share = np.maximum(share, np.clip(last - start, 0, unit) / left)
            share = np.maximum(share, np.clip(next_end - first - unit, 0, unit) / right)
            found = np.maximum(found, 2 * share / self.n_copies / level.bandwidth_bytes_per_second)
        return found

    def own_link(self, size: Ints) -> Floats:
        """Seconds for each byte, were nothing shared with the stage on the other side."""
        found: Floats = np.zeros(np.shape(size))
        for unit, level in self._levels():
            if unit < self.block:
                share = np.minimum(size, unit) / size / self.n_copies
                found = np.maximum(found, 2 * share / level.bandwidth_bytes_per_second)
        return found

    def devices(self, start: int, end: int) -> tuple[int, ...]:
        """The devices of a range, in all blocks."""
        return tuple(copy * self.block + d for copy in range(self.n_copies) for d in range(start, end))


def numbers_of_copies(topology: Topology) -> list[int]:
    """Into how many equal blocks the devices can be cut, each holding whole units of a level or being held by one."""
    total, found = topology.n_devices, []
    units = [prod(level.size for level in topology.levels[:k]) for k in range(len(topology.levels))]
    for n_copies in range(1, total + 1):
        block = total // n_copies
        if total % n_copies == 0 and all(block % unit == 0 or unit % block == 0 for unit in units):
            found.append(n_copies)
    return found if len(topology.levels) > 1 else [1]


def _most_units(first: Ints, last: Ints, size: int) -> Ints:
    """The most of the units first..last that one group of ``size`` units holds."""
    apart = last // size - first // size
    at_ends = np.maximum(size - first % size, last % size + 1)
    return np.where(apart == 0, last - first + 1, np.where(apart == 1, at_ends, size))
