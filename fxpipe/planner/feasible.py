"""Whether there is a plan within a given time, over given cuts and a given placement, exactly: sets of cuts as bits.

From the last stage backward. For a move that gives a stage its devices, a row of 64-bit words holds every cut where that
stage may begin such that it and all later ones keep to the time. A stage ends at a cut where the next one may begin and that
is light enough for the link between the two, and begins where the cut can be reached in time on its devices, and where the
devices left have time for the rest. One try costs a fraction of the dynamic programme over values (``minimax.py``), so that
the best plan is found by bisection of the time, or by tries just below the best so far; a try that fails just below it is
the proof that no other is better.
"""

from math import inf

import numpy as np

from fxpipe.planner.minimax import SLACK, Found, grouped
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.stage_bits import Key, Stages, Words, words_of

NEAR = 1e-9  # relative: the gain of the try that is the proof
FIRST_GAIN = 0.02
NARROW = 0.08  # relative: where a plan is likely the best, so that the next try is the proof
LEAST_SECONDS = 1e-30
LEAST_LINK = 1e-100  # seconds per byte, in place of none


class Feasible:
    """All plans over some stages and a placement."""

    def __init__(self, stages: Stages, placement: Placement, max_replicas: int | None = None) -> None:
        self.stages, self.placement = stages, placement
        moves = np.arange(placement.n)
        if max_replicas is not None:
            moves = moves[placement.replicas <= max_replicas]
        first = moves[placement.like[moves] == moves]  # the others cost the same
        self.row = np.full(placement.n, -1)  # of each move among those that differ
        self.row[first] = np.arange(len(first))
        self.row[moves] = self.row[placement.like[moves]]
        self.keys, self.key_of_row = self._keys(first)
        self.into = grouped(placement.target, moves, placement.n_states)
        self.out_of = grouped(placement.source, first, placement.n_states)
        self.rows_into, self.rows_out_of = ([self.row[x] for x in by_state] for by_state in (self.into, self.out_of))
        self.kept_links: dict[int, Floats] = {}
        self.devices_before = int(placement.taken.max()) - placement.taken[first]
        n_words = stages.width // 64
        self.reach = np.zeros((stages.cuts.n, len(self.keys), n_words), dtype=np.uint64)
        self.begin = np.empty((len(first), n_words), dtype=np.uint64)

    def _keys(self, moves: Ints) -> tuple[list[Key], Ints]:
        """What the work of a stage depends on, each once, and which of them each of some moves has."""
        place, replicas = self.placement, self.placement.replicas[moves]
        own = place.own_link[moves] * replicas * self.stages.model.serial_links
        held = -(-place.taken[moves] // replicas) * (self.stages.stored is not None)
        columns = (place.all_reduce[moves], own, held, replicas > 1, replicas)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        keys = sorted(set(rows))
        index = {key: at for at, key in enumerate(keys)}
        return keys, np.array([index[row] for row in rows], dtype=np.int64)

    def links(self, state: int) -> Floats:
        """Seconds for each byte between the stages of all moves into a state and those of all out of it; shape (n, n out)."""
        if state not in self.kept_links:
            self.kept_links[state] = self.links_of(self.out_of[state], self.into[state][:, None])
        return self.kept_links[state]

    def links_of(self, moves: Ints, next_moves: Ints) -> Floats:
        """Seconds for each byte between the stages of moves and those of the next ones."""
        if self.stages.model.serial_links:
            return np.full(np.broadcast_shapes(moves.shape, next_moves.shape), LEAST_LINK)
        return np.maximum(self.placement.links(moves, next_moves), LEAST_LINK)

    def _first(self, low: float) -> tuple[Found | None, float]:
        """All in one stage; where a limit forbids that, the plan of the first try that finds one. The last time without one."""
        if (found := self._single_stage()) is not None:
            return found, low
        time, step = low, 2.0
        while (found := _Try(self, time).run()) is None and time <= self.ceiling_seconds:
            low, time, step = time, time * step, min(step**2, 16.0)
        return found, low

    def _single_stage(self) -> Found | None:
        """All in one stage on the devices that make it fastest, unless a limit forbids that."""
        place, cuts, moves = self.placement, self.stages.cuts, self.out_of[0]
        if not len(moves):
            return None
        all_reduce = cuts.parameters[-1] * place.all_reduce[moves]
        both = np.maximum if self.stages.model.overlap_all_reduce else np.add
        move = int(moves[np.argmin(both(cuts.compute[-1], all_reduce) / place.replicas[moves])])
        key = self.keys[self.key_of_row[self.row[move]]]
        cost = float(self.stages.device_seconds(key, np.array(cuts.n - 1), np.array(0)) / key[-1])
        return Found(cost, (0, cuts.n - 1), (move,)) if cost < inf else None

    @property
    def ceiling_seconds(self) -> float:
        """Every plan takes less."""
        cuts, place = self.stages.cuts, self.placement
        all_reduce = float(cuts.parameters[-1] * place.all_reduce.max())
        own = place.own_link.max() if self.stages.model.serial_links else 0.0
        link = max(float(self.links(state).max(initial=0.0)) for state in range(place.n_states))
        return 1.01 * (float(cuts.compute[-1]) + all_reduce + 2 * (own + link) * float(cuts.crossing.max()))

    def search(self, low: float, best: float) -> Found | None:
        """The fastest plan that takes less than ``best`` seconds, None where there is none; ``low`` is a time that none beats.

        First a try just below the best: most placements are refused by it. While tries find plans, the steps grow. With
        nothing to beat (``best`` infinite), bisection below a single stage.
        """
        found, gain, low = None, 0.0, max(low, LEAST_SECONDS)
        if best == inf:
            found, low = self._first(low)
            best, gain = (-inf, 0.0) if found is None else (found.cost, 1.0)
        while best > low * (1 + NEAR):
            time = max(best * (1 - max(gain, NEAR)), (low * best) ** 0.5 if gain else 0.0)
            new = _Try(self, time).run()
            if new is not None and new.cost < best:
                gain = max(FIRST_GAIN, 2 * (1 - new.cost / best), 2 * gain)
                found, best = new, new.cost
            elif gain:
                low = time
                gain = gain if best > low * (1 + NARROW) else 0.0
            else:
                break
        return found


class _Try:
    """One time. ``begin``: the cuts where the stage of each move that differs may begin, shape (n, n words); ``in_time``: the
    cuts before which the devices left for the stages before can compute everything, of the same shape."""

    def __init__(self, of: Feasible, time: float) -> None:
        self.of, self.stages, self.time = of, of.stages, time * (1 + SLACK)
        self.begin, self.reach = of.begin, of.reach
        self.stages.within(of.keys, self.time, self.reach)
        self.begin[:] = 0
        slack = SLACK * float(self.stages.cuts.compute[-1])
        self.in_time = self.stages.early(self.time * of.devices_before + slack)

    def run(self) -> Found | None:
        """The plan with the best cuts for the devices of one that is quick enough; None where there is none."""
        of = self.of
        for state, rows in enumerate(of.rows_out_of):
            if len(rows) and (ends := self._ends(state)) is not None:
                able = self.stages.bits(ends)
                after = able.max(axis=0).nonzero()[0]
                if not len(after):
                    continue
                some = slice(after[0], after[-1] + 1)
                reach = self.reach[some].take(of.key_of_row[rows], axis=1)
                reach *= able[:, some].T.astype(np.uint64)[:, :, None]
                self.begin[rows] = np.bitwise_or.reduce(reach, axis=0) & self.in_time[rows]
        done = np.flatnonzero(self.begin[:, 0] & np.uint64(1))
        return self._with_best_cuts(self._moves(int(np.flatnonzero(of.row == done[0])[0]))) if len(done) else None

    def _ends(self, state: int) -> Words | None:
        """The cuts where the stage of each move out of a state may end."""
        if state == 0:
            last = words_of(np.arange(self.stages.width) == self.stages.cuts.n - 1)
            return np.repeat(last[None], len(self.of.out_of[0]), axis=0)
        begin = self.begin[self.of.rows_into[state]]
        known = begin.any(axis=1).nonzero()[0]
        if not len(known):
            return None
        light = self.stages.light(self.time / self.of.links(state)[known])
        light &= begin[known, None]
        ends: Words = np.bitwise_or.reduce(light, axis=0)
        return ends

    def _moves(self, move: int) -> list[int]:
        """The moves of a plan, from the first stage, which has the given one, to the last."""
        place, moves, cut = self.of.placement, [move], 0
        while state := int(place.source[move]):
            links = self.of.links_of(np.array([move]), self.of.into[state])
            ends = self.begin[self.of.rows_into[state]] & self.stages.light(self.time / links)
            reach = self.reach[:, self.of.key_of_row[self.of.row[move]]]
            able = self.stages.bits(np.bitwise_or.reduce(ends, axis=0)) * _bit(reach, cut)
            cut = int(able.argmax())
            move = int(self.of.into[state][_bit(ends, cut).argmax()])
            moves.append(move)
        return moves

    def _with_best_cuts(self, moves: list[int]) -> Found:
        """The fastest plan with given moves, from the first stage to the last."""
        of, stages = self.of, self.stages
        after, rest = np.array([stages.cuts.n - 1]), np.zeros(1)
        chosen: list[dict[int, int]] = []
        for at, move in reversed(list(enumerate(moves))):
            before = np.flatnonzero(stages.bits(self.begin[of.row[move]])) if at else np.zeros(1, dtype=np.int64)
            key = of.keys[of.key_of_row[of.row[move]]]
            values = np.maximum(stages.device_seconds(key, after[:, None], before) / key[-1], rest[:, None])
            chosen.append(dict(zip(before.tolist(), after[values.argmin(axis=0)].tolist(), strict=True)))
            after, rest = before, values.min(axis=0)
            if at and not stages.model.serial_links:
                link = of.placement.links(np.array(moves[at - 1]), np.array(move))
                rest = np.maximum(rest, link * stages.cuts.crossing[after])
        path = [0]
        for ends in reversed(chosen):
            path.append(ends[path[-1]])
        return Found(float(rest[0]), tuple(path), tuple(reversed(moves)))


def _bit(words: Words, at: int) -> Words:
    """One bit of each row of words."""
    return words[:, at // 64] >> np.uint64(at % 64) & np.uint64(1)
