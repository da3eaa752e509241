"""Ranges of consecutive devices under other numberings of them, which alternate between machines.

Two stages side by side then share the uplinks of all their machines. In place of the closed form of ``ranges.py``: tables.
"""

from collections.abc import Sequence

import numpy as np

from fxpipe.ir.topology import Topology
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.ranges import Ranges

MOST_DEVICES = 64


class NumberedRanges(Ranges):
    """``Ranges`` of one copy, place ``i`` being device ``numbering[i]``; not for links in series with the work."""

    def __init__(self, topology: Topology, model: CostModel, numbering: Sequence[int]) -> None:
        super().__init__(topology, model, 1)
        self.numbering = tuple(numbering)
        self.shares = [self._shares(unit) for unit, _ in self._levels()]
        self.all_reduce_table = self._all_reduce_table()

    def _shares(self, unit: int) -> Floats:
        """The share of each range in each unit of so many devices, by start and end, shape (n units, block + 1, block + 1)."""
        member = np.arange(self.block // unit)[:, None] == np.asarray(self.numbering) // unit
        counts = np.cumsum(np.pad(member, ((0, 0), (1, 0))), axis=1)  # of the first devices
        places = np.arange(self.block + 1)
        found: Floats = (counts[:, None, :] - counts[:, :, None]) / np.maximum(places - places[:, None], 1)
        return found

    @property
    def period(self) -> int:
        """Ranges are not alike anywhere else."""
        return self.block

    def _all_reduce_table(self) -> Floats:
        """By start and end, shape (block + 1, block + 1)."""
        found = np.zeros((self.block + 1, self.block + 1))
        for shares, (_, level) in zip(self.shares, self._levels(), strict=True):
            groups = np.maximum((shares > 0).reshape(-1, level.size, *found.shape).sum(axis=1).max(axis=0), 1)
            found += (2 if self.model.ring_all_reduce else 4) * (groups - 1) / groups / level.bandwidth_bytes_per_second
        return found

    def all_reduce(self, start: Ints, end: Ints) -> Floats:
        """As in ``Ranges``."""
        return self.all_reduce_table[start, end]

    def link(self, start: Ints, end: Ints, next_start: Ints, next_end: Ints) -> Floats:
        """As in ``Ranges``."""
        start, end, next_start, next_end = (np.clip(at, 0, self.block) for at in (start, end, next_start, next_end))
        left, right = np.maximum(end - start, 1), np.maximum(next_end - next_start, 1)
        found: Floats = 2 / np.minimum(left, right) / self.topology.levels[0].bandwidth_bytes_per_second
        before, after = start * (self.block + 1) + end, next_start * (self.block + 1) + next_end
        for shares, (_, level) in zip(self.shares[1:], self._levels()[1:], strict=True):
            for of_range in shares:
                apart = np.abs(of_range.take(before) - of_range.take(after))
                found = np.maximum(found, 2 / level.bandwidth_bytes_per_second * apart)
        return found

    def devices(self, start: int, end: int) -> tuple[int, ...]:
        """The devices of a range."""
        return tuple(sorted(self.numbering[start:end]))


def numberings(topology: Topology, model: CostModel) -> list[NumberedRanges]:
    """Numberings that deal the devices out to 2 machines in turn, or to all machines of a group; none where there is one
    level, or where the tables would be large."""
    if len(topology.levels) == 1 or topology.n_devices > MOST_DEVICES or model.serial_links:
        return []
    inner, n_machines = topology.levels[0].size, topology.levels[1].size
    places = np.arange(topology.n_devices).reshape(-1, inner)
    widths = sorted({width for width in (2, n_machines) if width > 1 and n_machines % width == 0}) if inner > 1 else []
    dealt = [places.reshape(-1, width, inner).transpose(0, 2, 1).ravel().tolist() for width in widths]
    return [NumberedRanges(topology, model, numbering) for numbering in dealt]
