"""The best plan along one order of a large graph: bisection of the time, each try a sweep over the devices.

``feasible(T)`` walks over the places where a stage may begin, from the last device to the first, and keeps for each place
and number of replicas of the stage that begins there the earliest cut that the stages so far can begin at: once among all
cuts, and once for each of a few thresholds on the bytes that cross, as a heavy cut may be no use to the stage before. How
far back a stage reaches is a binary search on prefix sums. What the devices left cannot finish in time is dropped, so that
times out of reach are refused quickly. Stages stand on consecutive devices, in each of a number of copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.cuts import CutsOfOrder
from fxpipe.planner.minimax import Limits
from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.ranges import Ranges

SmallInts: TypeAlias = NDArray[np.int32]

MOST_SIZES = 48  # of a stage; all sizes up to MOST_ALL_SIZES devices
MOST_ALL_SIZES = 64
MOST_LATER_ENDS = 8
MOST_LIGHT_CUTS = 1 << 18  # entries of the table of the next cut that few enough bytes cross
MOST_LINKS = 1 << 22  # entries of the table of links
SLACK = 1e-12
MOST_LAST_TRIES = 8
LAST_PRECISION = 1e-9
FIRST_GAIN = 0.02


@dataclass(frozen=True)
class LinePlan:
    """Cuts from 0 to n and, for each stage, its range of devices ``[start, end)`` in each copy."""

    seconds: float
    cuts: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class Line:
    """One order of the graph on one way to copy the devices."""

    def __init__(self, cuts: CutsOfOrder, ranges: Ranges, model: CostModel, limits: Limits) -> None:
        self.cuts, self.ranges, self.model, self.limits = cuts, ranges, model, limits
        self.block, self.n_copies = ranges.block, ranges.n_copies
        self.sizes = stage_sizes(ranges, limits)
        ends = np.arange(self.block + 1)[:, None]
        starts = np.maximum(ends - self.sizes, 0)
        self.all_reduce = ranges.all_reduce(starts, np.maximum(ends, starts + 1))  # by last device + 1, by size
        self.stored = cuts.parameters + cuts.activations
        self.has_parameters = bool(cuts.parameters[-1] > 0)
        self.label_reach = np.searchsorted(cuts.labelled, cuts.labelled - 1)
        self.single_reach = np.searchsorted(cuts.single, cuts.single)
        self.period = ranges.period if ranges.period * len(self.sizes) ** 2 <= MOST_LINKS else 0
        if self.period:
            middle, left, right = np.ix_(np.arange(self.period), self.sizes, self.sizes)
            self.link_table = ranges.link(middle - left, middle, middle, middle + right)
        self.some_links = self._some_links()
        self.refused_seconds = 0.0  # by the last search
        crossing = float(cuts.crossing.max()) * float(self.some_links[0])
        self.ceiling_seconds = float(
            cuts.compute[-1] + cuts.parameters[-1] * self.all_reduce.max(initial=0.0) + 2 * crossing
        )

    def _some_links(self) -> Floats:
        """Seconds for each byte on links that differ, descending from the slowest; shape (n,)."""
        slowest = 2 / self.n_copies / min(v.bandwidth_bytes_per_second for v in self.ranges.topology.levels)
        found = self.links(0) if not self.period else self.link_table
        found = np.unique(np.append(found[found > 0], slowest))[::-1]
        most = max(16, min(256, MOST_LIGHT_CUTS // self.cuts.n))
        if len(found) > most:
            wanted = np.geomspace(found[0], found[-1], most)
            found = found[np.unique(np.searchsorted(-found, -wanted))]
        return found

    def search(self, low: float, high: float, precision: float) -> LinePlan | None:
        """The best plan faster than ``high`` seconds, to the given relative precision; None where there is none.

        ``low`` is a time that no plan beats, ``high`` infinite or what the plan must beat. Without ``high``, tries grow from
        ``low``, as the times out of reach cost least.
        """
        low, step = max(low, 1e-30), 1.01
        time = low * (1 + 1e-9) if high == inf else high
        while (best := self.feasible(time)) is None:
            if high < inf or time > self.ceiling_seconds:
                return None  # what limits the plan is not time
            low, time, step = time, time * step, min(step**2, 16.0)
        gain = FIRST_GAIN if high < inf else 1.0  # a plan that had to beat another is seldom much better
        while best.seconds > low * (1 + precision):
            middle = max((low * best.seconds) ** 0.5, best.seconds * (1 - gain))
            if (found := self.feasible(middle)) is None:
                low = middle
            else:
                best, gain = found, min(2 * gain, 1.0)
        for _ in range(MOST_LAST_TRIES if precision <= 1e-4 else 0):
            time = best.seconds * (1 - LAST_PRECISION)
            if (found := self.feasible(time)) is None:
                low = max(low, time)
                break
            best = found
        self.refused_seconds = low
        return best

    def is_exact(self, time: float) -> bool:
        """Whether ``feasible(time)`` misses no plan along this order: every set of devices is as good as a range, every
        size is tried, and every link can carry every cut."""
        flat = len(self.ranges.topology.levels) == 1 and not self.model.serial_links
        most = min(self.block, self.limits.max_replicas or self.block)
        return flat and len(self.sizes) == most and bool(self.cuts.crossing.max() <= time / self.some_links[0])

    def feasible(self, time: float) -> LinePlan | None:
        """A plan of at most so many seconds, or None."""
        return _Sweep(self, time).run()

    def links(self, middle: int) -> Floats:
        """Seconds for each byte at a place, by the sizes of the stages before and after, shape (n sizes, n sizes)."""
        if self.period:
            return self.link_table[middle % self.period]  # type: ignore[no-any-return]
        at = np.full((1, 1), middle)
        return self.ranges.link(at - self.sizes[:, None], at, at, at + self.sizes[None, :])

    def seconds(self, cuts: Ints, starts: Ints, ends: Ints) -> float:
        """The time of the slowest stage of a plan."""
        of = self.cuts
        replicas = (ends - starts) * self.n_copies
        compute = np.diff(of.compute[cuts])
        all_reduce = np.diff(of.parameters[cuts]) * self.ranges.all_reduce(starts, ends)
        total = np.maximum(compute, all_reduce) if self.model.overlap_all_reduce else compute + all_reduce
        work = total / replicas
        crossing = of.crossing[cuts]
        if self.model.serial_links:
            own = self.ranges.own_link(ends - starts)
            return float((work + own * (crossing[:-1] + crossing[1:])).max())
        links = self.ranges.link(starts[:-1], ends[:-1], starts[1:], ends[1:]) * crossing[1:-1]
        return float(max(work.max(), links.max(initial=0.0)))


def stage_sizes(ranges: Ranges, limits: Limits) -> Ints:
    """How many devices of a block a stage may have: all numbers while they are few, then some, with whole units."""
    most = ranges.block if limits.max_replicas is None else min(ranges.block, limits.max_replicas // ranges.n_copies)
    if most <= MOST_ALL_SIZES:
        return np.arange(1, most + 1)
    some = np.unique(np.round(np.geomspace(1, most, MOST_SIZES)).astype(np.int64))
    whole = [unit * k for unit in ranges.units for k in (1, 2, 3, 4) if 1 < unit * k <= most]
    return np.unique(np.concatenate([some, np.array(whole, dtype=np.int64)]))


class _Sweep:
    """One try. ``first_cut[layer][place, size, threshold]`` is the cut where a stage of this size that begins at this
    place may begin; ``came_from`` the state behind it."""

    def __init__(self, line: Line, time: float) -> None:
        self.line, self.time = line, time * (1 + SLACK)
        self.slack = SLACK * float(line.cuts.compute[-1])  # of differences of prefix sums
        self.none = line.cuts.n
        self.thresholds = self._thresholds()
        self.shape = (line.block, len(line.sizes), len(self.thresholds))
        self.next_light = self._next_light()
        self.light = line.cuts.crossing <= self.thresholds[0]
        self.first_cut: list[SmallInts] = []
        self.came_from: list[SmallInts] = []
        self.lightest: list[
            tuple[int, int]
        ] = []  # of each layer: the earliest cut that every link can carry, its state

    def _thresholds(self) -> Floats:
        """Bytes that may cross, ascending: what every link can carry, then what only some can."""
        most = float(self.line.cuts.crossing.max())
        carried = self.time / (1 + SLACK) / self.line.some_links
        if most <= carried[0] or self.line.model.serial_links:
            return np.array([most])
        return np.append(carried[carried < most], most)

    def _next_light(self) -> Ints:
        """For each threshold and cut, the first cut from there on that is no heavier; shape (n thresholds, n + 1)."""
        heavy = self.line.cuts.crossing[None, :] > self.thresholds[:, None]
        at = np.where(heavy, self.none, np.arange(self.none))
        return np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]

    def run(self) -> LinePlan | None:
        """Layer after layer where the number of stages is given, else all in one."""
        n_stages, block = self.line.limits.n_stages, self.line.block
        for layer in range(n_stages or 1):
            self.first_cut.append(np.full(self.shape, self.none, dtype=np.int32))
            self.came_from.append(np.full(self.shape, -1, dtype=np.int32))
            self.lightest.append((self.none, -1))
            last = None if n_stages is None else n_stages - 1 - layer
            for place in range(block, 0, -1):
                if (states := self._states(place, layer)) is not None:
                    self._stages_before(place, layer, last, *states)
                    if last in (None, 0) and (end := self._finished(place, layer)) is not None:
                        return self._trace(layer, end)
        return None

    def _states(self, place: int, layer: int) -> tuple[Ints, Ints, NDArray[np.bool_]] | None:
        """The states at a place where a stage may end, by their cut: cut, number, and for which sizes of that stage its
        link can carry what crosses; shapes (n states,), (n states,), (n sizes, n states). None where there are none."""
        line = self.line
        source = layer if line.limits.n_stages is None else layer - 1
        always = np.ones((len(line.sizes), 1), dtype=bool)
        last = np.array([line.cuts.n - 1]), np.array([-1]), always  # of the last stage, which may leave devices idle
        may_end = layer == 0 and place >= line.block - line.ranges.most_idle
        if place == line.block or source < 0:
            return last if may_end else None
        flat = self.first_cut[source][place].ravel()
        found = np.flatnonzero(flat < self.none)
        found = found[np.argsort(flat[found], kind="stable")]
        ends, numbers = flat[found].astype(np.int64), found + place * self.shape[1] * self.shape[2]
        light = np.flatnonzero(self.light[ends])[:1]
        if len(light) and ends[light[0]] < self.lightest[source][0]:
            self.lightest[source] = int(ends[light[0]]), int(numbers[light[0]])
        # What every link can carry may also wait for this place, with the devices between left idle; later cuts are no use.
        cut, number = self.lightest[source]
        some = int(np.searchsorted(ends, cut))
        fits = line.links(place)[:, found[:some] // self.shape[2]] * line.cuts.crossing[ends[:some]] <= self.time
        if line.model.serial_links:
            fits[:] = True
        if cut == self.none and may_end:
            cut, number = int(last[0][0]), -1
        if cut == self.none:
            return (ends, numbers, fits) if len(ends) else None
        return np.append(ends[:some], cut), np.append(numbers[:some], number), np.append(fits, always, axis=1)

    def _stages_before(
        self, place: int, layer: int, layers_left: int | None, ends: Ints, number: Ints, fits: NDArray[np.bool_]
    ) -> None:
        """Enters every stage that ends at a place.

        A stage that ends earlier begins no later, whatever limits it, so each size takes the earliest cut that its link can
        carry. Only where there is no cut light enough to begin at before that one, a later one is tried.
        """
        line = self.line
        index = np.flatnonzero(line.sizes <= place - (layers_left or 0))
        beyond = np.full(len(index), -1)
        for _ in range(MOST_LATER_ENDS):
            open_ends = fits[index] & (ends > beyond[:, None])
            chosen = np.argmax(open_ends, axis=1)
            some = open_ends[np.arange(len(index)), chosen]
            index, chosen = index[some], chosen[some]
            if not len(index):
                return
            end, places = ends[chosen], place - line.sizes[index]
            first = np.maximum(self._reach(place, index, end), layers_left or 0)
            begin = self.next_light[:, np.minimum(first, self.none - 1)]
            compute = line.cuts.compute[np.minimum(begin, self.none - 1)]
            in_time = compute <= self.time * (places * line.n_copies) + self.slack
            old = self.first_cut[layer][places, index].T
            better = (begin < end) & in_time & (begin < old)
            self.first_cut[layer][places, index] = np.where(better, begin, old).T
            self.came_from[layer][places, index] = np.where(
                better, number[chosen], self.came_from[layer][places, index].T
            ).T
            later = (begin >= end) & in_time & (begin < self.none)
            index, beyond = index[later.any(axis=0)], np.where(later, begin, self.none).min(axis=0)[later.any(axis=0)]

    def _reach(self, place: int, index: Ints, ends: Ints) -> Ints:
        """The first cut that a stage of each size may begin at, which ends at a place and its cut."""
        line, of = self.line, self.line.cuts
        sizes = line.sizes[index]
        budget = np.float64(line.n_copies * self.time) * sizes.astype(np.float64)
        all_reduce = line.all_reduce[place, index]
        first = np.searchsorted(of.compute, of.compute[ends] - budget - self.slack)
        if line.model.serial_links:
            first = np.maximum(first, self._serial_reach(sizes, ends, budget, all_reduce))
        elif line.has_parameters:
            compute = 0.0 if line.model.overlap_all_reduce else 1.0
            all_of_end = compute * of.compute[ends] + all_reduce * of.parameters[ends] - budget - self.slack
            first = _bisect(
                first, ends, lambda at: compute * of.compute[at] + all_reduce * of.parameters[at] >= all_of_end
            )
        first = np.maximum(first, line.label_reach[ends])
        first = np.where(sizes * line.n_copies > 1, np.maximum(first, line.single_reach[ends]), first)
        if line.limits.memory_bytes is not None:
            held = -(-(line.block - place + sizes) // sizes)
            first = np.maximum(first, np.searchsorted(line.stored, line.stored[ends] - line.limits.memory_bytes / held))
        return first

    def _serial_reach(self, sizes: Ints, ends: Ints, budget: Floats, all_reduce: Floats) -> Ints:
        """With links added to the work, a light cut may lie before a heavy one: every cut is tried."""
        line, of = self.line, self.line.cuts
        own = line.ranges.own_link(sizes) * line.n_copies * sizes
        found = np.full(len(sizes), self.none)
        for at, end in enumerate(ends.tolist()):
            compute, shared = of.compute[end] - of.compute, all_reduce[at] * (of.parameters[end] - of.parameters)
            work = np.maximum(compute, shared) if line.model.overlap_all_reduce else compute + shared
            fits = work[:end] + own[at] * (of.crossing[:end] + of.crossing[end]) <= budget[at]
            if fits.any():
                found[at] = int(np.argmax(fits))
        return found

    def _finished(self, place: int, layer: int) -> int | None:
        """The state that begins with the first atom, if some stage that ends at ``place`` does."""
        sizes = self.line.sizes[: int(np.searchsorted(self.line.sizes, place, side="right"))]
        at = self.first_cut[layer][place - sizes, np.arange(len(sizes))]
        found = np.argwhere(at == 0)
        if not len(found):
            return None
        size, threshold = map(int, found[0])
        place -= int(sizes[size])
        return (place * self.shape[1] + size) * self.shape[2] + threshold

    def _trace(self, layer: int, number: int) -> LinePlan:
        cuts, starts, ends = [], [], []
        while number >= 0:
            at, threshold = divmod(number, self.shape[2])
            place, size = divmod(at, self.shape[1])
            cuts.append(int(self.first_cut[layer][place, size, threshold]))
            starts.append(place)
            ends.append(place + int(self.line.sizes[size]))
            number = int(self.came_from[layer][place, size, threshold])
            layer -= self.line.limits.n_stages is not None
        rows = np.array([*cuts, self.none - 1]), np.array(starts), np.array(ends)
        return LinePlan(self.line.seconds(*rows), *(tuple(row.tolist()) for row in rows))


def _bisect(low: Ints, high: Ints, fits: Callable[[Ints], NDArray[np.bool_]]) -> Ints:
    """The first position from ``low`` to ``high`` that fits; all after it do."""
    now = fits(low)
    if now.all():
        return low
    high, low = np.where(now, low, high), np.where(now, low, low + 1)
    for _ in range(int(np.max(high - low)).bit_length()):
        middle = (low + high) >> 1
        now = fits(middle)
        high, low = np.where(now, middle, high), np.where(now, low, middle + 1)
        low = np.minimum(low, high)
    return high
