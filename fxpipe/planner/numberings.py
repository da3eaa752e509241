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
        self.within = [self._counts(unit) for unit, _ in self._levels()]
        self.all_reduce_table = self._all_reduce_table()

    def _counts(self, unit: int) -> Ints:
        """How many of the first devices each unit of so many devices holds, shape (block + 1, n units)."""
        member = np.asarray(self.numbering)[:, None] // unit == np.arange(self.block // unit)
        return np.concatenate([np.zeros((1, member.shape[1]), dtype=np.int64), np.cumsum(member, axis=0)])

    @property
    def period(self) -> int:
        """Ranges are not alike anywhere else."""
        return self.block

    def _all_reduce_table(self) -> Floats:
        """By start and end, shape (block + 1, block + 1)."""
        found = np.zeros((self.block + 1, self.block + 1))
        for counts, (_, level) in zip(self.within, self._levels(), strict=True):
            used = counts[None, :, :] > counts[:, None, :]
            groups = used.reshape(*used.shape[:2], -1, level.size).sum(axis=3).max(axis=2)
            share = (2 if self.model.ring_all_reduce else 4) * (groups - 1) / np.maximum(groups, 1)
            found += np.maximum(share, 0) / level.bandwidth_bytes_per_second
        return found

    def all_reduce(self, start: Ints, end: Ints) -> Floats:
        """As in ``Ranges``."""
        return self.all_reduce_table[start, end]

    def link(self, start: Ints, end: Ints, next_start: Ints, next_end: Ints) -> Floats:
        """As in ``Ranges``."""
        start, end, next_start, next_end = (np.clip(at, 0, self.block) for at in (start, end, next_start, next_end))
        left, right = np.maximum(end - start, 1), np.maximum(next_end - next_start, 1)
        found: Floats = 2 / np.minimum(left, right) / self.topology.levels[0].bandwidth_bytes_per_second
        for counts, (_, level) in zip(self.within[1:], self._levels()[1:], strict=True):
            before = (counts[end] - counts[start]) / left[..., None]
            after = (counts[next_end] - counts[next_start]) / right[..., None]
            for unit in range(counts.shape[1]):
                apart = np.abs(before[..., unit] - after[..., unit])
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
