"""Where stages may stand: the ways to give devices to the stages of a plan, from its last stage to its first.

A placement is an automaton. A state says which devices the later stages have taken; a move gives some more to the stage
before them. What the cost model charges depends on a move (all-reduce, replicas) or on two moves in a row (their link).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.ranges import Ranges

MOST_LINKS = 1 << 20  # entries of the table of links between ranges


@dataclass(frozen=True, eq=False)
class Placement:
    """Moves 0..n-1 between states, state 0 being no device taken; a move leads to a later state.

    Per move, shape (n,): ``source`` and ``target`` states, ``replicas``, ``taken`` (at most so many devices are of this
    stage and all later ones), ``all_reduce`` (seconds for each byte of parameters), ``own_link`` (seconds for each byte
    that crosses, were nothing shared with the neighbour). ``links(moves, next moves)``: seconds for each byte that crosses
    between a stage and the one after it, as the two broadcast. ``like``: the first move that is the same but for
    the numbers of the machines, with all that may follow. ``complete``: no other placement can be better.
    ``fewer(moves)``, shape (n moves, k): the first moves that give a stage the same devices after one less is taken, -1 for
    none; None: not known.
    """

    source: Ints
    target: Ints
    replicas: Ints
    taken: Ints
    all_reduce: Floats
    own_link: Floats
    links: Callable[[Ints, Ints], Floats]
    devices: Callable[[Sequence[int]], list[tuple[int, ...]]]
    like: Ints
    complete: bool
    fewer: Callable[[Ints], Ints] | None = None

    @property
    def n(self) -> int:
        return len(self.source)

    @property
    def n_states(self) -> int:
        return int(self.target.max()) + 1


def contiguous(ranges: Ranges) -> Placement:
    """Ranges of consecutive devices in each equal block of devices, from the last device down or, where that shifts them
    against the machines, from one of the few before it."""
    block, n_copies = ranges.block, ranges.n_copies
    last, start = (at[::-1] for at in np.tril_indices(block))
    end = last + 1
    idle = (end < block) & (end >= block - ranges.most_idle)  # the last stage may end there too
    source = np.append(block - end, np.zeros(np.count_nonzero(idle), dtype=np.int64))
    start, end = np.append(start, start[idle]), np.append(end, end[idle])
    size = end - start

    table = None
    if (block + 1) ** 3 <= MOST_LINKS:
        table = np.zeros([block + 1] * 3)  # by the place between two stages and their sizes
        middle, left, right = np.ix_(*[np.arange(1, block + 1)] * 3)
        middle, left, right = (at + 1 for at in np.nonzero((left <= middle) & (middle + right <= block)))
        table[middle, left, right] = ranges.link(middle - left, middle, middle, middle + right)

    def links(moves: Ints, next_moves: Ints) -> Floats:
        middle, left, right = end[moves], size[moves], size[next_moves]
        if table is None:
            return ranges.link(middle - left, middle, middle, middle + right)
        found: Floats = table[middle, left, right]
        return found

    def devices(path: Sequence[int]) -> list[tuple[int, ...]]:
        return [ranges.devices(int(start[move]), int(end[move])) for move in path]

    return Placement(
        source=source,
        target=block - start,
        replicas=size * n_copies,
        taken=np.where(source == 0, size, block - start) * n_copies,
        all_reduce=ranges.all_reduce(start, end),
        own_link=ranges.own_link(size),
        links=links,
        devices=devices,
        like=np.arange(len(size)),
        complete=len(ranges.topology.levels) == 1 and n_copies == 1,
    )


def one_device_each(n_stages: int) -> Placement:
    """Stage s on device s, links free: for objectives that do not look at links."""
    states = np.arange(n_stages)
    ones = np.ones(n_stages, dtype=np.int64)
    return Placement(
        source=states,
        target=states + 1,
        replicas=ones,
        taken=states + 1,
        all_reduce=np.zeros(n_stages),
        own_link=np.zeros(n_stages),
        links=lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape)),
        devices=lambda path: [(n_stages - 1 - at,) for at in range(len(path))],
        like=states,
        complete=True,
    )
