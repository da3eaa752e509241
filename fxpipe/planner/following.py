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
    begin at ``starts[i]``. ``links``: seconds for each byte between the two stages."""

    rows: Ints
    starts: Ints
    places: Ints
    links: Floats


class Following:
    """The moves of a placement: those that differ as ``rows``, by the state that they leave, and all of them as places, by
    the state that they lead to. ``batches``: consecutive states, the first and one after the last, with no move between."""

    def __init__(self, placement: Placement, moves: Ints, serial_links: bool) -> None:
        self.placement, self.serial_links = placement, serial_links
        n_states = placement.n_states
        differ = moves[placement.like[moves] == moves]  # the others cost the same
        self.move_of_row, self.row_start = by_key(placement.source, differ, n_states)
        self.move_of_place, self.place_start = by_key(placement.target, moves, n_states)
        row = np.empty(placement.n, dtype=np.int64)
        row[self.move_of_row] = np.arange(len(differ))
        self.row_of_place = row[placement.like[self.move_of_place]]
        self.batches = self._batches()
        n_pairs = int((np.diff(self.row_start) * np.diff(self.place_start)).sum())
        self.rows_into, self.into_start = by_key(placement.target[self.move_of_row], np.arange(len(differ)), n_states)
        self.fewer = None
        if placement.fewer is not None and n_pairs > MOST_KEPT:
            self.fewer = np.append(row, -1)[placement.fewer(self.move_of_row)]
        self.kept = [self.pairs(batch) for batch in self.batches] if n_pairs <= MOST_KEPT else None

    def _batches(self) -> list[tuple[int, int]]:
        place, n = self.placement, self.placement.n_states
        latest = np.full(n, -1)
        np.maximum.at(latest, place.target, place.source)
        starts = [0]
        for state, before in enumerate(latest.tolist()):
            if before >= starts[-1]:
                starts.append(state)
        return list(zip(starts, [*starts[1:], n], strict=True))

    def pairs(self, batch: tuple[int, int], places: Ints | None = None) -> Follows:
        """Every row out of the states of a batch with every place into the same state, or with some of these."""
        first, last = batch
        if places is None:
            places = np.arange(*self.place_start[[first, last]])
        rows = np.arange(*self.row_start[[first, last]])
        states, source = self.placement.target[self.move_of_place[places]], self.placement.source[self.move_of_row[rows]]
        low, high = states.searchsorted(source, side="left"), states.searchsorted(source, side="right")
        some = high > low
        rows, low, n = rows[some], low[some], (high - low)[some]
        starts = np.cumsum(n) - n
        places = places[np.repeat(low - starts, n) + np.arange(n.sum())]
        return Follows(rows, starts, places, self.links(self.move_of_row[np.repeat(rows, n)], self.move_of_place[places]))

    def links(self, moves: Ints, next_moves: Ints) -> Floats:
        """Seconds for each byte between the stages of moves and those of the next ones."""
        if self.serial_links:
            return np.full(np.broadcast_shapes(moves.shape, next_moves.shape), LEAST_LINK)
        return np.maximum(self.placement.links(moves, next_moves), LEAST_LINK)
