"""Which move may follow which in a placement, in arrays: for a search that goes through the states batch by batch."""

from dataclasses import dataclass

import numpy as np

from fxpipe.planner.minimax import by_key
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints

MOST_KEPT = 1 << 15  # pairs of moves
LEAST_LINK = 1e-100  # seconds per byte, in place of none


@dataclass(frozen=True, eq=False)
class Follows:
    """Pairs of a row (a move out of some state) and a place (one of the moves into it), sorted by row: those of ``rows[i]``
    begin at ``starts[i]``. ``next_rows``: the rows of the places. ``links``: seconds for each byte between the two stages."""

    rows: Ints
    starts: Ints
    next_rows: Ints
    links: Floats


class Following:
    """The moves of a placement: those that differ as ``rows``, by the state that they leave, and all of them as places, by
    the state that they lead to. ``batches``: consecutive states, the first and one after the last, with no move between.

    ``kept``: the pairs of all states together, where they are few, with the first row and the first pair of each batch and
    the ends of the last. ``fewer``: see ``Placement``; in rows,
    which ``rows_into`` has by the state that they lead to, those into state s from ``into_start[s]`` on.
    """

    def __init__(self, placement: Placement, moves: Ints, serial_links: bool) -> None:
        self.placement, self.serial_links = placement, serial_links
        n_states = placement.n_states
        differ = moves[placement.like[moves] == moves]  # the others cost the same
        self.move_of_row, self.row_start = by_key(placement.source, differ, n_states)
        self.move_of_place, self.place_start = by_key(placement.target, moves, n_states)
        row = np.empty(placement.n, dtype=np.int64)
        row[self.move_of_row] = np.arange(len(differ))
        self.row_of_place = row[placement.like[self.move_of_place]]
        self.state_of_row = placement.source[self.move_of_row]
        self.state_of_place = placement.target[self.move_of_place]
        self.batches = self._batches()
        self.kept: tuple[Follows, list[int], list[int]] | None = None
        self.fewer: Ints | None = None
        if int((np.diff(self.row_start) * np.diff(self.place_start)).sum()) <= MOST_KEPT:
            self.kept = self._all_pairs()
        elif placement.fewer is not None:
            self.fewer = np.append(row, -1)[placement.fewer(self.move_of_row)]
            leads_to = placement.target[self.move_of_row]
            self.rows_into, self.into_start = by_key(leads_to, np.arange(len(differ)), n_states)

    def _batches(self) -> list[tuple[int, int]]:
        place, n = self.placement, self.placement.n_states
        latest = np.full(n, -1)
        np.maximum.at(latest, place.target, place.source)
        starts = [0]
        for state, before in enumerate(latest.tolist()):
            if before >= starts[-1]:
                starts.append(state)
        return list(zip(starts, [*starts[1:], n], strict=True))

    def _all_pairs(self) -> tuple[Follows, list[int], list[int]]:
        found = self.pairs((0, self.placement.n_states), np.arange(len(self.move_of_place)))
        row_ends = self.row_start[[0, *(last for _, last in self.batches)]]
        first_rows = found.rows.searchsorted(row_ends)
        return found, first_rows.tolist(), np.append(found.starts, len(found.links))[first_rows].tolist()

    def pairs(self, batch: tuple[int, int], places: Ints) -> Follows:
        """Every row out of the states of a batch with those of some places that lead to the same state."""
        rows = np.arange(self.row_start[batch[0]], self.row_start[batch[1]])
        states, sources = self.state_of_place[places], self.state_of_row[rows]
        low, high = states.searchsorted(sources, side="left"), states.searchsorted(sources, side="right")
        n = high - low
        some = n.nonzero()[0]
        rows, low, n = rows[some], low[some], n[some]
        ends = n.cumsum()
        starts = ends - n
        places = places[np.repeat(low - starts, n) + np.arange(n.sum())]
        links = self.links(np.repeat(self.move_of_row[rows], n), self.move_of_place[places])
        return Follows(rows, starts, self.row_of_place[places], links)

    def links(self, moves: Ints, next_moves: Ints) -> Floats:
        """Seconds for each byte between the stages of moves and those of the next ones."""
        if self.serial_links:
            return np.full(np.broadcast_shapes(moves.shape, next_moves.shape), LEAST_LINK)
        return np.maximum(self.placement.links(moves, next_moves), LEAST_LINK)
