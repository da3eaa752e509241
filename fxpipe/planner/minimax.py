"""The best plan over given cuts and a given placement, exactly: dynamic programming over pairs of cuts and moves.

From the last stage backward. For a move that gives a stage its devices and the cut where it begins, ``best[move][cut]`` is
the least cost of this stage and all later ones: over every cut where the stage may end, the stage's own cost combined
with the best continuation. Costs combine by max (times) or by sum (bytes). O(pairs x moves), in numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from fxpipe.planner.cost_model import CostModel, versions
from fxpipe.planner.cuts import Cuts, Pairs
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints

SLACK = 1e-12
MOST_AT_ONCE = 1 << 13  # pairs


@dataclass(frozen=True)
class Limits:
    """What forbids a stage; None: nothing. ``n_stages``: exactly so many; ``max_seconds``: compute of a stage."""

    memory_bytes: float | None = None
    max_replicas: int | None = None
    n_stages: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """The cost of a plan, its cuts from the empty to the full one, and the move of each stage from the last to the first."""

    cost: float
    cuts: tuple[int, ...]
    moves: tuple[int, ...]


def allowed(cuts: Cuts, pairs: Pairs, limits: Limits) -> Pairs:
    """The pairs that a stage may be whatever its devices are: one label at most, within memory and load."""
    mask = np.diff(cuts.labelled[np.stack([pairs.before, pairs.after])], axis=0)[0] <= 1
    if limits.memory_bytes is not None:
        stored = cuts.parameters + cuts.activations
        mask &= stored[pairs.after] - stored[pairs.before] <= limits.memory_bytes
    if limits.max_seconds is not None:
        slack = 1e-12 * max(1e-300, float(cuts.compute[-1]))
        mask &= cuts.compute[pairs.after] - cuts.compute[pairs.before] <= limits.max_seconds + slack
    return pairs if mask.all() else pairs.keep(mask)


@dataclass(frozen=True)
class Work:
    """The pairs that are quick enough as stages on certain devices: their time, the cut after them, and the cuts before
    them, whose pairs begin at ``starts`` (one more: where the last ones end)."""

    seconds: Floats
    after: Ints
    before: Ints
    starts: Ints


def minimax(
    cuts: Cuts, pairs: Pairs, placement: Placement, model: CostModel, limits: Limits, below: float = inf
) -> Found | None:
    """The plan whose slowest stage is fastest, in seconds; None where the limits leave none of less than ``below``."""
    return _Search(cuts, pairs, placement, model, limits, sum_of_bytes=False, below=below).run()


def least_bytes(cuts: Cuts, pairs: Pairs, placement: Placement, limits: Limits) -> Found | None:
    """The plan whose cuts are crossed by the fewest bytes, one way."""
    return _Search(cuts, pairs, placement, CostModel(), limits, sum_of_bytes=True).run()


class _Search:
    def __init__(
        self,
        cuts: Cuts,
        pairs: Pairs,
        placement: Placement,
        model: CostModel,
        limits: Limits,
        sum_of_bytes: bool,
        below: float = inf,
    ) -> None:
        self.below, self.slack = below, SLACK * float(cuts.compute[-1])
        self.n_taken = int(placement.taken.max())
        self.cuts, self.placement, self.model, self.limits = cuts, placement, model, limits
        self.sum_of_bytes = sum_of_bytes
        self.pairs = allowed(cuts, pairs, limits)
        self.compute, self.parameters = self._between(cuts.compute), self._between(cuts.parameters)
        self.stored = self._between(cuts.parameters + cuts.activations)
        self.single = self._between(cuts.single) > 0
        self.moves = np.arange(placement.n)
        if limits.max_replicas is not None:
            self.moves = self.moves[placement.replicas[self.moves] <= limits.max_replicas]
        self.into = grouped(placement.target, self.moves, placement.n_states)
        first = self.moves[placement.like[self.moves] == self.moves]  # the others cost the same
        self.out_of = grouped(placement.source, first, placement.n_states)
        self.keys = self._keys()
        self.kept_work: dict[tuple[float, ...], Work] = {}

    def _keys(self) -> dict[int, tuple[float, ...]]:
        """What the work of a stage depends on, by move."""
        place, moves = self.placement, np.concatenate(self.out_of)
        own = place.own_link[moves] * self.model.serial_links
        costs = place.replicas[moves].tolist(), place.all_reduce[moves].tolist(), own.tolist()
        held = map(self._held, moves.tolist())
        return dict(zip(moves.tolist(), zip(*costs, held, strict=True), strict=True))

    def _between(self, sums: Floats | Ints) -> Floats:
        return np.asarray(sums[self.pairs.after] - sums[self.pairs.before], dtype=np.float64)

    def run(self) -> Found | None:
        """One layer of ``best`` where the number of stages is free, else one for each stage."""
        layers: list[dict[int, Floats]] = []
        if self.limits.n_stages is None:
            layers.append({})
            for state in range(self.placement.n_states):
                self._leave(state, layers[0], layers[0], first=state == 0)
        for index in range(self.limits.n_stages or 0):
            layers.append({})
            for state in range(self.placement.n_states) if index else [0]:
                self._leave(state, layers[index - 1] if index else {}, layers[index], first=index == 0)
        best = min(((values[0], move) for move, values in layers[-1].items()), default=(inf, -1))
        return None if best[0] == inf else self._trace(layers, *best)

    def _leave(self, state: int, before: dict[int, Floats], here: dict[int, Floats], first: bool) -> None:
        """Fills in the moves out of a state from those into it."""
        moves = self.out_of[state]
        if not len(moves):
            return
        rest = self._continuations(moves, state, before, first)
        if rest is None:
            return
        begin = self._may_begin(moves, rest)
        some = begin.any(axis=1)
        moves, values = moves[some], self._values(moves[some].tolist(), rest[some], begin[some])
        found = values.min(axis=1, initial=inf) < inf
        here.update(zip(moves[found].tolist(), values[found], strict=True))

    def _may_begin(self, moves: Ints, rest: Floats) -> NDArray[np.bool_]:
        """Where the stage of each move may begin with less than ``below`` seconds of compute on each of its devices and of
        those left for the stages before; shape (n moves, n cuts)."""
        if self.below == inf:
            return np.ones(rest.shape, dtype=bool)
        compute, place = self.cuts.compute, self.placement
        least = np.where(rest < inf, compute, inf).min(axis=1) - self.below * place.replicas[moves] - self.slack
        most = self.below * (self.n_taken - place.taken[moves]) + self.slack
        begin: NDArray[np.bool_] = (least[:, None] <= compute) & (compute <= most[:, None])
        return begin

    def _values(self, moves: list[int], rest: Floats, able: NDArray[np.bool_]) -> Floats:
        """The least cost of a stage on the devices of each move and all after it, for each cut where it may begin; shape
        (n moves, n cuts)."""
        values, n = np.full(rest.shape, inf), self.cuts.n
        windows = np.stack([able.argmax(axis=1), n - able[:, ::-1].argmax(axis=1)], axis=1)
        parts: list[Work] = []
        size = 0
        for row, (move, window) in enumerate(zip(moves, windows, strict=True)):
            work = self._work(move)
            first, last = work.before.searchsorted(window).tolist()
            low, high = work.starts[[first, last]].tolist()
            if low < high:
                chosen, shift = slice(low, high), row * n
                starts = work.starts[first:last] - (low - size)
                parts.append(
                    Work(work.seconds[chosen], work.after[chosen] + shift, work.before[first:last] + shift, starts)
                )
                size += high - low
            if size > MOST_AT_ONCE:
                self._enter(values, rest, parts)
                parts, size = [], 0
        self._enter(values, rest, parts)
        values[~able | (values >= self.below)] = inf
        return values

    def _enter(self, values: Floats, rest: Floats, parts: Sequence[Work]) -> None:
        """The values of several moves at once, whose cuts are numbered through the rows of ``values`` and ``rest``."""
        if parts:
            cost = rest.ravel()[np.concatenate([part.after for part in parts])]
            if not self.sum_of_bytes:
                cost = np.maximum(np.concatenate([part.seconds for part in parts]), cost)
            starts = np.concatenate([part.starts for part in parts])
            values.ravel()[np.concatenate([part.before for part in parts])] = np.minimum.reduceat(cost, starts)

    def _continuations(self, moves: Ints, state: int, before: dict[int, Floats], first: bool) -> Floats | None:
        """The least cost of all after each cut, for each of the moves; shape (n moves, n cuts)."""
        if first:
            rest = np.full((len(moves), self.cuts.n), inf)
            rest[:, -1] = 0.0
            return rest
        known = self._known(state, before)
        if not len(known):
            return None
        values = np.stack([before[move] for move in self.placement.like[known].tolist()])
        if self.sum_of_bytes:
            return np.broadcast_to(values.min(axis=0) + self.cuts.crossing, (len(moves), self.cuts.n))
        if self.model.serial_links:
            return np.broadcast_to(values.min(axis=0), (len(moves), self.cuts.n))
        links, crossing = self.placement.links(moves[:, None], known), self.cuts.crossing
        at = np.flatnonzero(values.min(axis=0) < inf)
        values, crossing = values[:, at], crossing[at]
        rest = np.full((len(moves), self.cuts.n), inf)
        for row, seconds_per_byte in zip(rest, links, strict=True):
            row[at] = np.maximum(values, seconds_per_byte[:, None] * crossing).min(axis=0)
        return rest

    def _known(self, state: int, before: dict[int, Floats]) -> Ints:
        """The moves into a state that may be part of a plan."""
        into = self.into[state]
        return into[[first in before for first in self.placement.like[into].tolist()]]

    def _work(self, move: int) -> Work:
        """The pairs that may be a stage on the devices of a move, with less than ``below`` seconds of work."""
        key = self.keys[move]
        if key not in self.kept_work:
            if (len(self.kept_work) + 1) * len(self.compute) > 1 << 23:
                self.kept_work.clear()
            self.kept_work[key] = self._quick_enough(self._seconds(move))
        return self.kept_work[key]

    def _quick_enough(self, seconds: Floats) -> Work:
        pairs, fits = self.pairs, seconds < self.below
        before, after = pairs.before, pairs.after
        if not fits.all():
            seconds, before, after = seconds[fits], before[fits], after[fits]
        starts = np.flatnonzero(np.diff(before, prepend=-1))
        return Work(seconds, after, before[starts], np.append(starts, len(after)))

    def _held(self, move: int) -> int:
        if self.limits.memory_bytes is None:
            return 0
        return versions(int(self.placement.taken[move]), int(self.placement.replicas[move]))

    def _seconds(self, move: int) -> Floats:
        """The work of every pair; infinite where a limit forbids it."""
        r, held = int(self.placement.replicas[move]), self._held(move)
        all_reduce = self.placement.all_reduce[move] * self.parameters
        both = np.maximum(self.compute, all_reduce) if self.model.overlap_all_reduce else self.compute + all_reduce
        work: Floats = both / r
        if self.model.serial_links:
            crossing = self.cuts.crossing
            work += self.placement.own_link[move] * (crossing[self.pairs.before] + crossing[self.pairs.after])
        if self.limits.memory_bytes is not None:
            work[held * self.stored > self.limits.memory_bytes] = inf
        if r > 1:
            work[self.single] = inf
        return work

    def _trace(self, layers: list[dict[int, Floats]], cost: float, move: int) -> Found:
        """Follows the best values from the first stage to the last."""
        cut, moves, path = 0, [move], [0]
        index, value = len(layers) - 1, cost
        while True:
            chosen = slice(int(self.pairs.start[cut]), int(self.pairs.start[cut + 1]))
            state = int(self.placement.source[move])
            last = state == 0 and (index == 0)
            before = layers[index if self.limits.n_stages is None else index - 1]
            rest = self._continuations(np.array([move]), state, before, last)
            assert rest is not None
            work, after = self._seconds(move)[chosen], rest[0][self.pairs.after[chosen]]
            costs = np.where(work == inf, inf, after) if self.sum_of_bytes else np.maximum(work, after)
            cut = int(self.pairs.after[chosen][int(np.argmax(costs <= value))])
            path.append(cut)
            if cut == self.cuts.n - 1:
                return Found(cost, tuple(path), tuple(moves[::-1]))
            move, value = self._next(before, move, state, cut, float(rest[0, cut]))
            moves.append(move)
            index -= self.limits.n_stages is not None

    def _next(self, before: dict[int, Floats], move: int, state: int, cut: int, value: float) -> tuple[int, float]:
        """The move of the stage after, which begins at a cut and gives the value of all after it; its own value."""
        known = self._known(state, before)
        costs = np.array([before[other][cut] for other in self.placement.like[known].tolist()])
        total = costs
        if self.sum_of_bytes:
            total = costs + self.cuts.crossing[cut]
        elif not self.model.serial_links:
            links = self.placement.links(np.array([move]), known)
            total = np.maximum(costs, links * self.cuts.crossing[cut])
        fits = np.flatnonzero(total <= value)
        if not len(fits):
            raise AssertionError("a value of the table has no move that gives it")
        return int(known[fits[0]]), float(costs[fits[0]])


def grouped(keys: Ints, moves: Ints, n: int) -> list[Ints]:
    """The moves by key, each in ascending order."""
    moves, start = by_key(keys, moves, n)
    return np.split(moves, start[1:-1])


def by_key(keys: Ints, moves: Ints, n: int) -> tuple[Ints, Ints]:
    """Moves sorted by key, then in ascending order, and where those of each key begin; shape (n + 1,)."""
    keys = keys[moves]
    small = keys.astype(np.uint16) if n < 1 << 16 else keys  # these are sorted in linear time
    order = np.argsort(small, kind="stable")
    return moves[order], np.searchsorted(keys[order], np.arange(n + 1))
