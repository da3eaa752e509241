"""The placement of stages on any sets of devices.

Devices of one innermost group are alike, so a set is its count in each of these groups. Groups are alike too, and groups of
groups: of all states that differ in the numbers of groups alone one is kept, whose counts ascend in each group ("sorted").
A move is written in two such numberings: that of its source, in which it is one of the sorted ways to go on from there, and
that of its target, in which the moves that follow it are written.
"""

from collections.abc import Sequence
from math import comb, prod

import numpy as np

from fxpipe.ir.topology import Topology
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.placement import Placement
from fxpipe.planner.profile import Floats, Ints


def n_moves_of_sets(topology: Topology) -> tuple[int, int]:
    """How many moves any sets of devices have, and how many of them that differ in more than the numbers of groups."""
    inner = topology.levels[0].size
    in_group = (inner + 1) * (inner + 2) // 2
    different = in_group
    for level in topology.levels[1:]:
        different = comb(different + level.size - 1, level.size)
    return int(in_group ** (topology.n_devices // inner)), different


def all_sets(topology: Topology, model: CostModel) -> Placement:
    """Every set of devices."""
    inner = topology.levels[0].size
    n_groups = topology.n_devices // inner
    counts = np.indices((inner + 1,) * n_groups).reshape(n_groups, -1).T  # of each set, in the order of its code
    n_devices, nothing = counts.sum(axis=1), np.zeros_like(counts)
    states = np.flatnonzero(_sorted_codes(topology, counts, nothing)[0] == np.arange(len(counts)))
    states = states[np.argsort(n_devices[states], kind="stable")]
    state_of = np.empty(len(counts), dtype=np.int64)
    state_of[states] = np.arange(len(states))

    fits = counts <= counts[states[:, None]].reshape(len(states), 1, n_groups)
    target, into = np.nonzero(fits.all(axis=2) & (n_devices > 0))
    source, out_of = _sorted_codes(topology, counts[states[target]] - counts[into], counts[into])
    source = state_of[source]
    like, first_of = _first_of_each(source * len(counts) + out_of, len(states) * len(counts))
    links = _Links(topology, counts)
    own = np.zeros(len(counts))
    if model.serial_links:
        own[1:] = [_own_link(topology, _first_devices(inner, row)) for row in counts[1:].tolist()]

    def devices(path: Sequence[int]) -> list[tuple[int, ...]]:
        group_of, found = np.arange(n_groups), []  # by its number in the state
        used, last = nothing[0].copy(), topology.n_devices - 1
        for move in path:  # the last stage gets the last devices
            row = counts[out_of[move]]
            places = zip(group_of.tolist(), row.tolist(), strict=True)
            taken = [last - g * inner - int(used[g]) - i for g, count in places for i in range(count)]
            found.append(tuple(sorted(taken)))
            used[group_of] += row
            before = counts[states[target[move]]] - counts[into[move]]
            renumbered = _sorting(topology, before, counts[into[move]])
            group_of[renumbered] = group_of.copy()
        return found

    def fewer(moves: Ints) -> Ints:
        before, more = counts[states[source[moves]]], counts[out_of[moves]]
        move, group = before.nonzero()
        one_less = before[move]
        one_less[np.arange(len(move)), group] -= 1
        states_less, sets = _sorted_codes(topology, one_less, more[move])
        found = np.full(before.shape, -1)
        found[move, group] = first_of[state_of[states_less] * len(counts) + sets]
        return found

    return Placement(
        source=source,
        target=target,
        replicas=n_devices[into],
        taken=n_devices[states[target]],
        all_reduce=_all_reduce_of_shapes(topology, model, counts)[into],
        own_link=own[into],
        links=lambda a, b: links(out_of[a], into[b]),
        devices=devices,
        complete=not model.serial_links or len(topology.levels) == 1,
        like=like,
        fewer=fewer,
    )


def _first_of_each(keys: Ints, n_keys: int) -> tuple[Ints, Ints]:
    """For each place where its key is first, and for each key as well."""
    first_of = np.empty(n_keys, dtype=np.int64)
    first_of[keys[::-1]] = np.arange(len(keys))[::-1]
    return first_of[keys], first_of


def _sorted_codes(topology: Topology, before: Ints, more: Ints) -> tuple[Ints, Ints]:
    """The codes of pairs of sets, shape (n, n groups), when the groups are sorted by the first set, then by the second: as
    digits of one number each, the first group's first."""
    inner = topology.levels[0].size
    base = inner + 1  # digits of one group
    for level in topology.levels[1:]:
        both = (before * base + more).reshape(len(before), -1, level.size)
        both.sort(axis=2)
        digits = base ** np.arange(level.size)[::-1]
        before, more = (both // base) @ digits, (both % base) @ digits
        base **= level.size
    return before[:, 0], more[:, 0]


def _sorting(topology: Topology, before: Ints, more: Ints) -> Ints:
    """The groups of one pair of sets in the order of ``_sorted_codes``."""
    order: Ints = np.arange(len(before))[:, None]
    base = topology.levels[0].size + 1
    for level in topology.levels[1:]:
        both = (before * base + more).reshape(-1, level.size)
        by = np.argsort(both, axis=1, kind="stable")
        both = np.take_along_axis(both, by, axis=1)
        order = order.reshape(len(both), level.size, -1)
        order = np.take_along_axis(order, by[:, :, None], axis=1).reshape(len(both), -1)
        digits = base ** np.arange(level.size)[::-1]
        before, more = (both // base) @ digits, (both % base) @ digits
        base **= level.size
    first: Ints = order[0]
    return first


def _all_reduce_of_shapes(topology: Topology, model: CostModel, counts: Ints) -> Floats:
    """Seconds for each byte of parameters on sets of devices, shape (n sets,)."""
    found, used = np.zeros(len(counts)), counts
    for level, outer in zip(topology.levels, [*topology.levels[1:], None], strict=True):
        groups = np.maximum(used.max(axis=1), 1)
        found += (2 if model.ring_all_reduce else 4) * (groups - 1) / groups / level.bandwidth_bytes_per_second
        if outer is not None:
            used = (used > 0).reshape(len(used), -1, outer.size).sum(axis=2)
    return found


class _Links:
    """Seconds for each byte between sets of devices that are apart, by their codes."""

    def __init__(self, topology: Topology, counts: Ints) -> None:
        self.replicas = np.maximum(counts.sum(axis=1), 1)
        self.seconds = 2 / topology.levels[0].bandwidth_bytes_per_second
        of_levels = []
        shares = counts / self.replicas[:, None]
        for level in topology.levels[1:]:
            of_levels.append(2 / level.bandwidth_bytes_per_second * shares.T)
            shares = shares.reshape(len(shares), -1, level.size).sum(axis=2)
        # Of each unit, times its uplink's seconds.
        self.shares = np.concatenate([*of_levels, np.zeros((1, len(counts)))])

    def __call__(self, before: Ints, after: Ints) -> Floats:
        """As the two broadcast."""
        before, after = np.broadcast_arrays(before, after)
        apart = self.shares.take(before, axis=1) - self.shares.take(after, axis=1)
        of_units = np.abs(apart, out=apart).max(axis=0)
        seconds: Floats = np.maximum(of_units, self.seconds / np.minimum(self.replicas[before], self.replicas[after]))
        return seconds


def _first_devices(inner: int, row: Sequence[int]) -> list[int]:
    return [group * inner + i for group, count in enumerate(row) for i in range(count)]


def _own_link(topology: Topology, devices: Sequence[int]) -> float:
    units, slowest = np.asarray(devices), 0.0
    for k, level in enumerate(topology.levels):
        inside = k > 0 and len(units) and topology.n_devices == prod(v.size for v in topology.levels[:k])
        if not inside:
            share = np.bincount(units).max() / len(units)
            slowest = max(slowest, 2 * share / level.bandwidth_bytes_per_second)
        units = units // level.size
    return slowest
