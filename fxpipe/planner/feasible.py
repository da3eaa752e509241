"""Whether there is a plan within a given time, over given cuts and a given placement, exactly: sets of cuts as bits.

From the last stage backward. For a move that gives a stage its devices, a row of 64-bit words holds every cut where that
stage may begin such that it and all later ones keep to the time. A stage ends at a cut where the next one may begin and that
is light enough for the link between the two, and begins where the cut can be reached in time on its devices. One try costs
a fraction of the dynamic programme over values (``minimax.py``), so that the best plan is found by tries just below the
best so far; a try that fails just below it is the proof that no other is better.
"""

from math import inf
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.cuts import Cuts, Pairs
from fxpipe.planner.minimax import SLACK, Found, Limits, allowed, grouped
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints

Words: TypeAlias = NDArray[np.uint64]
Key: TypeAlias = tuple[float, float, float, float]

MOST_CUTS = 512
NEAR = 1e-9  # relative: the gain of the try that is the proof
FIRST_GAIN = 0.02


class Stages:
    """What a stage between two cuts takes, in matrices by the cut after it and the cut before it, shape (n, n rounded up
    to 64); ``compute`` is infinite where there is no such stage. ``lightest[k]`` holds the k lightest cuts."""

    def __init__(self, cuts: Cuts, pairs: Pairs, model: CostModel, limits: Limits) -> None:
        self.cuts, self.model, self.limits = cuts, model, limits
        self.pairs = allowed(cuts, pairs, limits)
        self.width = -(-cuts.n // 64) * 64
        self.compute = self._matrix(cuts.compute, inf)
        self.parameters = self._matrix(cuts.parameters, 0.0)
        self.stored = None if limits.memory_bytes is None else self._matrix(cuts.parameters + cuts.activations, 0.0)
        self.single = self._matrix(cuts.single, 0.0) > 0 if cuts.single[-1] else None
        crossing = np.pad(cuts.crossing, (0, self.width - cuts.n))
        self.crossing = crossing + cuts.crossing[:, None] if model.serial_links else crossing
        self.room, self.room_of_bits = np.empty_like(self.compute), np.empty(self.compute.shape, dtype=bool)
        by_weight = np.argsort(cuts.crossing, kind="stable")
        self.weights = cuts.crossing[by_weight]
        lightest = np.zeros((cuts.n + 1, self.width), dtype=bool)
        lightest[:, by_weight] = np.tri(cuts.n + 1, cuts.n, -1, dtype=bool)
        self.lightest = words_of(lightest)

    def _matrix(self, sums: Floats | Ints, nothing: float) -> Floats:
        found = np.full((self.cuts.n, self.width), nothing)
        before, after = self.pairs.before, self.pairs.after
        found[after, before] = sums[after] - sums[before]
        return found

    def device_seconds(self, key: Key, which: Any = ..., out: Floats | None = None) -> Floats:
        """The work of all or some stages on certain devices, all replicas together; infinite where a limit forbids it."""
        replicas, all_reduce, own_link, held = key
        work = np.multiply(self.parameters[which], all_reduce, out=out)
        (np.maximum if self.model.overlap_all_reduce else np.add)(self.compute[which], work, out=work)
        if own_link:
            work += replicas * own_link * self.crossing[which]
        if self.stored is not None:
            work[held * self.stored[which] > (self.limits.memory_bytes or 0)] = inf
        if self.single is not None and replicas > 1:
            work[self.single[which]] = inf
        return work

    def within(self, keys: list[Key], time: float, found: Words) -> Words:
        """From which cuts a stage may reach each cut in time, by the cut after it and the devices; ``found`` is filled."""
        for at, key in enumerate(keys):
            found[:, at] = words_of(
                np.less_equal(self.device_seconds(key, out=self.room), time * key[0], out=self.room_of_bits)
            )
        return found

    def bits(self, words: Words) -> NDArray[np.uint8]:
        """Words as ones and zeros, shape (..., n cuts)."""
        return np.unpackbits(words.view(np.uint8), axis=-1, count=self.cuts.n, bitorder="little")


def words_of(bits: NDArray[np.bool_]) -> Words:
    """Rows of bits as rows of 64-bit words."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)


class Feasible:
    """All plans over some stages and a placement."""

    def __init__(self, stages: Stages, placement: Placement) -> None:
        self.stages, self.placement = stages, placement
        limits, moves = stages.limits, np.arange(placement.n)
        if limits.max_replicas is not None:
            moves = moves[placement.replicas <= limits.max_replicas]
        first = moves[placement.like[moves] == moves]  # the others cost the same
        self.into = grouped(placement.target, moves, placement.n_states)
        self.out_of = grouped(placement.source, first, placement.n_states)
        self.keys, self.key_of = self._keys(first)
        self.row = np.full(placement.n, -1)  # of each move among those that differ
        self.row[first] = np.arange(len(first))
        self.row[moves] = self.row[placement.like[moves]]
        n_words = stages.width // 64
        self.reach = np.empty((stages.cuts.n, len(self.keys), n_words), dtype=np.uint64)
        self.begin = np.empty((len(first), n_words), dtype=np.uint64)
        self.kept_links: dict[int, Floats] = {}

    def _keys(self, moves: Ints) -> tuple[list[Key], Ints]:
        """What the work of a stage depends on, each once, and which of them each move has."""
        place, limits = self.placement, self.stages.limits
        own = place.own_link[moves] * self.stages.model.serial_links
        held = -(-place.taken[moves] // place.replicas[moves]) * (limits.memory_bytes is not None)
        index: dict[Key, int] = {}
        key_of = np.zeros(place.n, dtype=np.int64)
        rows = zip(*(x.tolist() for x in (place.replicas[moves], place.all_reduce[moves], own, held)), strict=True)
        key_of[moves] = [index.setdefault(row, len(index)) for row in rows]
        return list(index), key_of

    def links(self, state: int) -> Floats:
        """Seconds for each byte between the stages of all moves into a state and those of all out of it; shape (n, n out)."""
        if state not in self.kept_links:
            self.kept_links[state] = self.links_of(self.out_of[state], state).T.copy()
        return self.kept_links[state]

    def links_of(self, moves: Ints, state: int) -> Floats:
        """Those of some moves out of a state; shape (n out, n in)."""
        if self.stages.model.serial_links:
            return np.zeros((len(moves), len(self.into[state])))
        return np.maximum(self.placement.links(moves, self.into[state]), 1e-100)

    def search(self, low: float, best: float) -> Found | None:
        """The fastest plan that takes less than ``best``; ``low`` is a time that none beats."""
        found, gain = None, 0.0
        while best > low * (1 + NEAR):
            time = max(best * (1 - max(gain, NEAR)), (low * best) ** 0.5 if gain else 0.0)
            new = _Try(self, time).run()
            if new is not None and new.cost < best:
                gain = max(FIRST_GAIN, 3 * (1 - new.cost / best), 2 * gain)
                found, best = new, new.cost
            elif gain:
                low, gain = time, 0.0
            else:
                break
        return found


class _Try:
    """One time. ``begin``: the cuts where the stage of each move that differs may begin, shape (n, n words)."""

    def __init__(self, of: Feasible, time: float) -> None:
        self.of, self.stages, self.time = of, of.stages, time * (1 + SLACK)
        self.begin, self.reach = of.begin, self.stages.within(of.keys, self.time, of.reach)
        self.begin[:] = 0

    def run(self) -> Found | None:
        """The plan with the best cuts for the devices of one that is quick enough; None where there is none."""
        for state, moves in enumerate(self.of.out_of):
            if len(moves) and (ends := self._ends(state)) is not None:
                able = -self.stages.bits(ends).T.astype(np.int64)
                reach = self.reach.take(self.of.key_of[moves], axis=1)
                reach &= able.view(np.uint64)[:, :, None]
                self.begin[self.of.row[moves]] = np.bitwise_or.reduce(reach, axis=0)
        done = np.flatnonzero(self.begin[:, 0] & np.uint64(1))
        return self._with_best_cuts(self._moves(int(np.flatnonzero(self.of.row == done[0])[0]))) if len(done) else None

    def _ends(self, state: int) -> Words | None:
        """The cuts where the stage of each move out of a state may end."""
        if state == 0:
            last = words_of(np.arange(self.stages.width) == self.stages.cuts.n - 1)
            return np.repeat(last[None], len(self.of.out_of[0]), axis=0)
        begin = self.begin[self.of.row[self.of.into[state]]]
        known = np.flatnonzero(begin.any(axis=1))
        if not len(known):
            return None
        light = self._light(self.of.links(state)[known])
        light &= begin[known, None]
        return np.bitwise_or.reduce(light, axis=0)

    def _light(self, links: Floats) -> Words:
        """The cuts that are light enough for each link."""
        return self.stages.lightest.take(self.stages.weights.searchsorted(self.time / links, side="right"), axis=0)

    def _moves(self, move: int) -> list[int]:
        """The moves of a plan, from the first stage, which has the given one, to the last."""
        place, moves, cut = self.of.placement, [move], 0
        while state := int(place.source[move]):
            into = self.of.into[state]
            ends = self.begin[self.of.row[into]] & self._light(self.of.links_of(np.array([move]), state)[0])
            reach = self.reach[:, self.of.key_of[place.like[move]], cut // 64] >> np.uint64(cut % 64) & np.uint64(1)
            which, cuts = np.nonzero(self.stages.bits(ends) & reach.astype(np.uint8))
            move, cut = int(into[which[0]]), int(cuts[0])
            moves.append(move)
        return moves

    def _with_best_cuts(self, moves: list[int]) -> Found:
        """The fastest plan with given moves, from the first stage to the last."""
        of, stages = self.of, self.stages
        after, rest = np.array([stages.cuts.n - 1]), np.zeros(1)
        chosen: list[dict[int, int]] = []
        for at, move in reversed(list(enumerate(moves))):
            before = np.flatnonzero(stages.bits(self.begin[of.row[move]])) if at else np.zeros(1, dtype=np.int64)
            key = of.keys[of.key_of[of.placement.like[move]]]
            values = np.maximum(stages.device_seconds(key, np.ix_(after, before)) / key[0], rest[:, None])
            chosen.append(dict(zip(before.tolist(), after[values.argmin(axis=0)].tolist(), strict=True)))
            after, rest = before, values.min(axis=0)
            if at and not stages.model.serial_links:
                link = of.placement.links(np.array(moves[at - 1 : at]), np.array([move]))[0, 0]
                rest = np.maximum(rest, link * stages.cuts.crossing[after])
        path = [0]
        for ends in reversed(chosen):
            path.append(ends[path[-1]])
        return Found(float(rest[0]), tuple(path), tuple(reversed(moves)))
