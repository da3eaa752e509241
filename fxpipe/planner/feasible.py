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

from fxpipe.planner.following import Following, Follows
from fxpipe.planner.minimax import SLACK, Found
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.stage_bits import Key, Stages, Words

NEAR = 1e-9  # relative: the gain of the try that is the proof
FIRST_GAIN = 0.02
MOST_SMALL_STEPS = 3
NARROW = 0.08  # relative: where a plan is likely the best, so that the next try is the proof
LEAST_SECONDS = 1e-30
ANY_SECONDS = 1e150


class Feasible:
    """All plans over some stages and a placement."""

    def __init__(self, stages: Stages, placement: Placement, max_replicas: int | None = None) -> None:
        self.stages, self.placement = stages, placement
        moves = np.arange(placement.n)
        if max_replicas is not None:
            moves = moves[placement.replicas <= max_replicas]
        self.following = Following(placement, moves, stages.model.serial_links)
        self.move_of_row = self.following.move_of_row
        self.n_devices = int(placement.taken.max())
        self.keys, self.key_of_row = self._keys(self.move_of_row)
        self.devices_before = self.n_devices - placement.taken[self.move_of_row]
        n_words = stages.width // 64
        self.reach = np.zeros((stages.cuts.n, len(self.keys), n_words), dtype=np.uint64)
        self.begin = np.empty((len(self.move_of_row), n_words), dtype=np.uint64)

    def _keys(self, moves: Ints) -> tuple[list[Key], Ints]:
        """What the work of a stage depends on, each once, those that differ in replicas alone side by side; and which of them
        each of some moves has."""
        place, replicas = self.placement, self.placement.replicas[moves]
        own = place.own_link[moves] * replicas * self.stages.model.serial_links
        held = -(-place.taken[moves] // replicas) * (self.stages.stored is not None)
        number = np.zeros(len(moves), dtype=np.int64)
        for column in (place.all_reduce[moves], own, held):
            if len(moves) and column.any():
                values, which = np.unique(column, return_inverse=True)
                number = number * len(values) + which
        number = number * (self.n_devices + 1) + replicas
        _, first, key_of_move = np.unique(number, return_index=True, return_inverse=True)
        columns = place.all_reduce[moves], own, held, replicas > 1, replicas
        return list(zip(*(column[first].tolist() for column in columns), strict=True)), key_of_move

    def _single_stage(self) -> Found | None:
        """All in one stage on the devices that make it fastest, unless a limit forbids that."""
        place, cuts = self.placement, self.stages.cuts
        moves = self.move_of_row[: self.following.row_start[1]]
        if not len(moves):
            return None
        all_reduce = cuts.parameters[-1] * place.all_reduce[moves]
        both = np.maximum if self.stages.model.overlap_all_reduce else np.add
        row = int(np.argmin(both(cuts.compute[-1], all_reduce) / place.replicas[moves]))
        key = self.keys[self.key_of_row[row]]
        cost = float(self.stages.device_seconds(key, np.array(cuts.n - 1), np.array(0)) / key[-1])
        return Found(cost, (0, cuts.n - 1), (int(moves[row]),)) if cost < inf else None

    def search(self, low: float, best: float, least_gain: float = NEAR) -> Found | None:
        """The fastest plan that takes less than ``best`` seconds, None where there is none; ``low`` is a time that none beats.

        First tries just below the best: most placements are refused by it. While more of them find plans, the steps grow. With
        nothing to beat (``best`` infinite), bisection below a single stage or, where a limit forbids that, any plan. What is
        found may be ``least_gain`` above the best.
        """
        found, gain, low, n_found = None, 0.0, max(low, LEAST_SECONDS), 0
        if best == inf:
            found = self._single_stage() or _Try(self, ANY_SECONDS).run()
            best, gain = (-inf, 0.0) if found is None else (found.cost, 1.0)
        while best > low * (1 + least_gain):
            time = max(best * (1 - max(gain, least_gain)), (low * best) ** 0.5 if gain else 0.0)
            new = _Try(self, time).run()
            if new is not None and new.cost < best:
                n_found += 1
                if gain or n_found > MOST_SMALL_STEPS:
                    gain = max(FIRST_GAIN, 2 * (1 - new.cost / best), 2 * gain)
                found, best = new, new.cost
            elif gain:
                low = time
                gain = gain if best > low * (1 + NARROW) else 0.0
            else:
                break
        return found


class _Try:
    """One time. ``begin``: the cuts where the stage of each row may begin, shape (n rows, n words); ``in_time``: the cuts
    before which so many devices can compute everything, shape (n devices + 1, n words)."""

    def __init__(self, of: Feasible, time: float) -> None:
        self.of, self.stages, self.time = of, of.stages, time * (1 + SLACK)
        self.begin, self.reach = of.begin, of.reach
        self.stages.within(of.keys, self.time, self.reach)
        self.begin[:] = 0
        self.new = self.begin
        if of.following.kept is not None:
            self.light = self._light(of.following.kept[0])
        if of.following.fewer is not None:
            self.new = np.empty_like(self.begin)
            self.begun = np.zeros((len(self.begin) + 1, self.begin.shape[1]), np.uint64)
        slack = SLACK * float(self.stages.cuts.compute[-1])
        devices: Floats = np.arange(of.n_devices + 1, dtype=np.float64)
        self.in_time = self.stages.early(self.time * devices + slack)

    def run(self) -> Found | None:
        """The plan with the best cuts for the devices of the first one that is quick enough; None where there is none."""
        following = self.of.following
        for at, batch in enumerate(following.batches):
            if at:
                self._enter(*self._ends(at))
            else:
                rows = np.arange(following.row_start[1])
                self._enter_reached(rows, self.reach[-1, self.of.key_of_row[rows]])
            first, last = following.row_start[list(batch)]
            done = np.flatnonzero(self.begin[first:last, 0] & np.uint64(1))
            if len(done):
                return self._with_best_cuts(self._moves(int(self.of.move_of_row[first + done[0]])))
        return None

    def _ends(self, at: int) -> tuple[Ints, Words]:
        """The rows out of the states of a batch, and the cuts where the stage of each may end."""
        if self.of.following.kept is None:
            pairs = self._pairs(at)
            rows, starts, next_rows, light = pairs.rows, pairs.starts, pairs.next_rows, self._light(pairs)
        else:
            pairs, first_rows, firsts = self.of.following.kept
            here, those = slice(*firsts[at : at + 2]), slice(*first_rows[at : at + 2])
            rows, starts = pairs.rows[those], pairs.starts[those] - firsts[at]
            next_rows, light = pairs.next_rows[here], self.light[here]
        if not len(rows):
            return rows, self.begin[:0]
        ends: Words = np.bitwise_or.reduceat(light & self.new[next_rows], starts, axis=0)
        return rows, ends

    def _light(self, pairs: Follows) -> Words:
        """For each pair the cuts that are light enough for the link."""
        return self.stages.light(self.time / pairs.links)

    def _pairs(self, at: int) -> Follows:
        """Rows with places before a batch that a plan may come through."""
        following = self.of.following
        first, last = batch = following.batches[at]
        if following.fewer is not None:
            rows = following.rows_into[following.into_start[first] : following.into_start[last]]
            self._drop_begun(rows, following.fewer)
        places = np.arange(following.place_start[first], following.place_start[last])
        known = self.new[following.row_of_place[places]].any(axis=1)
        return following.pairs(batch, places[known])

    def _drop_begun(self, rows: Ints, fewer: Ints) -> None:
        """Of where the stages of some rows may begin drops where they may with fewer devices taken: what goes before them
        may then as well be left with more."""
        begun = np.bitwise_or.reduce(self.begun[fewer[rows]], axis=1)
        begin = self.begin[rows]
        self.new[rows], self.begun[rows] = begin & ~begun, begin | begun

    def _enter(self, rows: Ints, ends: Words) -> None:
        """Where the stages of some rows may begin."""
        n = self.stages.cuts.n
        able = np.flatnonzero(self.stages.bits(ends).view(np.bool_))
        if not len(able):
            return
        which = able // n
        keys = self.of.key_of_row[rows[which]]
        reach = self.reach.reshape(-1, self.reach.shape[2]).take((able - which * n) * len(self.of.keys) + keys, axis=0)
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        self._enter_reached(rows[which[starts]], np.bitwise_or.reduceat(reach, starts, axis=0))

    def _enter_reached(self, rows: Ints, reached: Words) -> None:
        self.begin[rows] = reached & self.in_time[self.of.devices_before[rows]]

    def _moves(self, move: int) -> list[int]:
        """The moves of a plan, from the first stage, which has the given one, to the last."""
        of, following, moves, cut = self.of, self.of.following, [move], 0
        row = int(np.flatnonzero(of.move_of_row == move)[0])
        while state := int(of.placement.source[move]):
            places = slice(*following.place_start[state : state + 2])
            rows, next_moves = following.row_of_place[places], following.move_of_place[places]
            ends = self.begin[rows] & self.stages.light(self.time / following.links(np.array([move]), next_moves))
            reach = self.reach[:, of.key_of_row[row]]
            able = self.stages.bits(np.bitwise_or.reduce(ends, axis=0)) * _bit(reach, cut)
            cut = int(able.argmax())
            at = int(_bit(ends, cut).argmax())
            move, row = int(next_moves[at]), int(rows[at])
            moves.append(move)
        return moves

    def _with_best_cuts(self, moves: list[int]) -> Found:
        """The fastest plan with given moves, from the first stage to the last."""
        of, stages = self.of, self.stages
        after, rest = np.array([stages.cuts.n - 1]), np.zeros(1)
        chosen: list[dict[int, int]] = []
        rows = np.flatnonzero(np.isin(of.move_of_row, of.placement.like[moves]))
        row_of = dict(zip(of.move_of_row[rows].tolist(), rows.tolist(), strict=True))
        for at, move in reversed(list(enumerate(moves))):
            row = row_of[int(of.placement.like[move])]
            before = np.flatnonzero(stages.bits(self.begin[row])) if at else np.zeros(1, dtype=np.int64)
            key = of.keys[of.key_of_row[row]]
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
