"""Where stages may stand: the ways to give devices to the stages of a plan, from its last stage to its first.

A placement is an automaton. A state says which devices the later stages have taken; a move gives some more to the stage
before them. What the cost model charges depends on a move (all-reduce, replicas) or on two moves in a row (their link).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import comb, prod

import numpy as np

from fxpipe.ir.topology import Topology
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.profile import Floats, Ints
from fxpipe.planner.ranges import Ranges

MOST_KEYS = 1 << 20
MOST_LINKS = 1 << 20  # entries of the table of links between ranges


@dataclass(frozen=True, eq=False)
class Placement:
    """Moves 0..n-1 between states, state 0 being no device taken; a move leads to a later state.

    Per move, shape (n,): ``source`` and ``target`` states, ``replicas``, ``taken`` (at most so many devices are of this
    stage and all later ones), ``all_reduce`` (seconds for each byte of parameters), ``own_link`` (seconds for each byte
    that crosses, were nothing shared with the neighbour). ``links(moves, next moves)``: seconds for each byte that crosses
    between a stage and the one after it, as the two broadcast. ``like``: the first move that is the same but for
    the numbers of the machines, with all that may follow. ``complete``: no other placement can be better.
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

    @property
    def n(self) -> int:
        return len(self.source)

    @property
    def n_states(self) -> int:
        return int(self.target.max()) + 1


def n_moves_of_sets(topology: Topology) -> tuple[int, int]:
    """How many moves ``all_sets`` would have, and how many of them that differ in more than the numbers of machines."""
    inner = topology.levels[0].size
    in_group = (inner + 1) * (inner + 2) // 2
    different = in_group
    for level in topology.levels[1:]:
        different = comb(different + level.size - 1, level.size)
    return int(in_group ** (topology.n_devices // inner)), different


def all_sets(topology: Topology, model: CostModel) -> Placement:
    """Every set of devices. Devices of one innermost group are alike, so a set is its count in each of these groups."""
    inner = topology.levels[0].size
    n_groups = topology.n_devices // inner
    counts = np.array(list(product(range(inner + 1), repeat=n_groups)))
    counts = counts[np.argsort(counts.sum(axis=1), kind="stable")]
    digits = (inner + 1) ** np.arange(n_groups)[::-1]
    number = np.empty(len(counts), dtype=np.int64)
    number[counts @ digits] = np.arange(len(counts))
    in_group = np.array([(taken, more) for taken in range(inner + 1) for more in range(inner + 1 - taken)])
    which = np.indices((len(in_group),) * n_groups, dtype=np.int16).reshape(n_groups, -1).T  # by move and group
    before, more = (reduce(np.add.outer, np.multiply.outer(digits, column)).ravel() for column in in_group.T)
    which, before, more = which[more > 0], before[more > 0], more[more > 0]
    source, shape, target = number[before], number[more], number[before + more]
    links = _links_of_shapes(topology, counts)
    own, n_devices = np.zeros(len(counts)), counts.sum(axis=1)
    if model.serial_links:
        own[1:] = [
            _own_link(topology, [g * inner + i for g, c in enumerate(row) for i in range(c)])
            for row in counts[1:].tolist()
        ]

    def devices(path: Sequence[int]) -> list[tuple[int, ...]]:
        used, found, last = np.zeros(n_groups, dtype=np.int64), [], topology.n_devices - 1
        for move in path:  # the last stage gets the last devices
            row = counts[shape[move]]
            taken = [last - g * inner - int(used[g]) - i for g, c in enumerate(row.tolist()) for i in range(c)]
            found.append(tuple(sorted(taken)))
            used += row
        return found

    return Placement(
        source=source,
        target=target,
        replicas=n_devices[shape],
        taken=n_devices[target],
        all_reduce=_all_reduce_of_shapes(topology, model, counts)[shape],
        own_link=own[shape],
        links=lambda a, b: links[shape[a], shape[b]],
        devices=devices,
        complete=not model.serial_links or len(topology.levels) == 1,
        like=_first_alike(topology, which),
    )


def _first_alike(topology: Topology, which: Ints) -> Ints:
    """For each move the first that is the same but for the numbers of machines (of groups of machines, ...)."""
    key = which.astype(np.int64)
    for level in topology.levels[1:]:
        inside = np.sort(key.reshape(len(key), -1, level.size), axis=2)
        key = inside @ (int(key.max()) + 1) ** np.arange(level.size)
        if key.max() >= MOST_KEYS:
            key = np.unique(key, return_inverse=True)[1].reshape(key.shape)
    moves = np.arange(len(key))
    first = np.empty(int(key.max()) + 1, dtype=np.int64)
    first[key[::-1, 0]] = moves[::-1]
    return np.asarray(first[key[:, 0]])


def _all_reduce_of_shapes(topology: Topology, model: CostModel, counts: Ints) -> Floats:
    """Seconds for each byte of parameters on sets of devices, shape (n sets,)."""
    found, used = np.zeros(len(counts)), counts
    for level, outer in zip(topology.levels, [*topology.levels[1:], None], strict=True):
        groups = np.maximum(used.max(axis=1), 1)
        found += (2 if model.ring_all_reduce else 4) * (groups - 1) / groups / level.bandwidth_bytes_per_second
        if outer is not None:
            used = (used > 0).reshape(len(used), -1, outer.size).sum(axis=2)
    return found


def _links_of_shapes(topology: Topology, counts: Ints) -> Floats:
    """Seconds for each byte between sets of devices that are apart, shape (n sets, n sets)."""
    replicas = np.maximum(counts.sum(axis=1), 1)
    shares = counts / replicas[:, None]
    found: Floats = 2 / np.minimum(replicas[:, None], replicas) / topology.levels[0].bandwidth_bytes_per_second
    apart = np.empty_like(found)
    for level, size in zip(topology.levels[1:], [v.size for v in topology.levels[1:]], strict=True):
        for unit in range(shares.shape[1]):
            np.subtract.outer(shares[:, unit], shares[:, unit], out=apart)
            np.abs(apart, out=apart)
            apart *= 2 / level.bandwidth_bytes_per_second
            np.maximum(found, apart, out=found)
        shares = shares.reshape(len(shares), -1, size).sum(axis=2)
    return found


def _own_link(topology: Topology, devices: Sequence[int]) -> float:
    units, slowest = np.asarray(devices), 0.0
    for k, level in enumerate(topology.levels):
        inside = k > 0 and len(units) and topology.n_devices == prod(v.size for v in topology.levels[:k])
        if not inside:
            share = np.bincount(units).max() / len(units)
            slowest = max(slowest, 2 * share / level.bandwidth_bytes_per_second)
        units = units // level.size
    return slowest


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
