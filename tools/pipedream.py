"""PipeDream's optimiser, faults included: the plans to compare with, and how long it takes to find them.

Written from Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training" (SOSP'19), section 3.1, and the
behaviour of the optimiser that the authors published (``optimizer_graph_hierarchical.py``), as it is with
``--activation_compression_ratio 1`` (without which it ignores all transfers) and without its other flags.

A state is a set of nodes with all that they depend on; the states are all that can be reached from the graph's first
source. For each level of the topology, innermost first, and states i..j on m units:

    T[i, j, m] = min of (T'[i, j] + AR(i, j, m)) / m, one stage on m units, and over k, m' of
                 max(T[i, k, m - m'], (T'[k + 1, j] + AR'(k + 1, j, m')) / m', 2 X_k / (B m'), 2 X_j / (B m'))

T' is the compute time, at upper levels the time of all units of the level below. What is wrong with it, and kept:

- the output of the first stage is charged with the replicas of the stage that receives it, never with its own;
- X counts what the newest nodes of a state put out and what any of their ancestors put out that some other node reads,
  even where that reader is in the state already;
- a state is compared with the one before it by its place in a sorted list: the difference of two states that do not
  contain each other is taken for the cost of the nodes between them;
- AR, 4 (m-1)/m P / B, is divided by the units of the level below in the first term and not in the second, whatever the
  replicas of the stages inside;
- a stage of an upper level is a number of whole machines, all of which are used alike; all devices are always used;
- of several sources only the first is seen.

Ties, which the published program breaks by the order of a Python set of objects, fall here to the smallest k, then m'.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from fxpipe.ir.topology import Topology
from fxpipe.planner.profile import Floats, Ints, Profile


class TooLargeError(Exception):
    """It cannot plan this graph within the limits; says why."""


@dataclass(frozen=True)
class States:
    """Sets of nodes (bits), sorted so that each comes after those that it contains; sums and X of each, shape (n,);
    ``before[j]``: the states that come before state j on some way to it, ascending."""

    members: tuple[int, ...]
    compute: Floats
    parameters: Floats
    sent: Floats
    before: tuple[Ints, ...]

    @property
    def n(self) -> int:
        return len(self.members)

    def between(self, sums: Floats) -> Floats:
        """``[i, j]``: the sum of state j less that of state i - 1; infinite where j comes before i. Shape (n, n)."""
        found = sums[None, :] - np.concatenate([[0.0], sums[:-1]])[:, None]
        return np.where(np.triu(np.ones_like(found)) > 0, found, inf)


@dataclass(frozen=True)
class Plan:
    """``stages`` as ``evaluate`` takes them; its own prediction; CPU seconds of the search."""

    stages: list[dict[str, Any]]
    predicted_seconds: float
    cpu_seconds: float


def states_of(profile: Profile, most: int) -> States:
    """Every state of a profile. Raises TooLargeError where there are more than ``most``."""
    graph = _Graph(profile)
    first = graph.closure[graph.source]
    after: dict[int, list[int]] = {}
    queue = [first]
    for state in queue:
        if state in after:
            continue
        after[state] = list(dict.fromkeys(state | graph.closure[v] for v in graph.next_nodes(state)))
        queue.extend(s for s in after[state] if s not in after)
        if len(after) > most:
            raise TooLargeError(f"more than {most} states")
    members = _sorted(first, after)
    place = {state: i for i, state in enumerate(members)}
    before = [0] * len(members)
    for i, state in enumerate(members):
        for s in after[state]:
            before[place[s]] |= before[i] | 1 << i
    return States(
        members=tuple(members),
        compute=np.array([graph.total(profile.compute_seconds, state) for state in members]),
        parameters=np.array([graph.total(profile.parameter_bytes, state) for state in members]),
        sent=np.array([graph.total(profile.output_bytes, graph.counted(state)) for state in members]),
        before=tuple(np.array(list(_bits(b)), dtype=np.int64) for b in before),
    )


class _Graph:
    """Successors, and each node with all that it depends on, as bits."""

    def __init__(self, profile: Profile) -> None:
        n = profile.n_nodes
        self.successors: list[list[int]] = [[] for _ in range(n)]
        for a, b in profile.edges.tolist():
            self.successors[a].append(b)
        self.readers = [sum(1 << b for b in set(s)) for s in self.successors]
        self.closure = [1 << v for v in range(n)]
        for v in profile.order.tolist():
            for reader in self.successors[v]:
                self.closure[reader] |= self.closure[v]
        read = set(profile.edges[:, 1].tolist())
        self.source = next(v for v in profile.order.tolist() if v not in read)
        self.extra = [self._extra(v) for v in range(n)]

    def _extra(self, v: int) -> int:
        """The ancestors of a node that some node which is no ancestor of it reads as well."""
        return sum(1 << p for p in _bits(self.closure[v] & ~(1 << v)) if self.readers[p] & ~self.closure[v])

    def counted(self, state: int) -> int:
        """The nodes whose outputs X adds up: the newest, and what else ``_extra`` finds."""
        newest = [v for v in _bits(state) if not self.readers[v] & state]
        return sum(1 << v for v in newest) | _union(self.extra[v] for v in newest)

    def next_nodes(self, state: int) -> Iterator[int]:
        for v in _bits(self.counted(state)):
            yield from (reader for reader in self.successors[v] if not state >> reader & 1)

    def total(self, values: Floats, state: int) -> float:
        return float(values[list(_bits(state))].sum())


def _union(sets: Iterator[int]) -> int:
    found = 0
    for bits in sets:
        found |= bits
    return found


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _sorted(first: int, after: dict[int, list[int]]) -> list[int]:
    """Depth first, each state before all that come after it."""
    done, left = {first}, [(first, iter(after[first]))]
    found: list[int] = []
    while left:
        state, rest = left[-1]
        new = next((s for s in rest if s not in done), None)
        if new is None:
            found.append(left.pop()[0])
        else:
            done.add(new)
            left.append((new, iter(after[new])))
    return found[::-1]


class _Level:
    """One level of the hierarchy: ``times[m]`` [i, j], the best time of states i..j on m + 1 units."""

    def __init__(self, states: States, below: Floats, size: int, bandwidth: float, size_below: int) -> None:
        self.states, self.below, self.size, self.bandwidth = states, below, size, bandwidth
        self.parameters = states.between(states.parameters)
        self.times = [(below + self._all_reduce(self.parameters, m) / size_below) / m for m in range(1, size + 1)]
        self.alone = [times.copy() for times in self.times]
        out = 2 * states.sent / bandwidth
        self.link = np.maximum(out[:, None], np.where(np.arange(states.n) < states.n - 1, out, 0.0))

    def _all_reduce(self, parameters: Any, m: int) -> Any:
        return 4 * (m - 1) * parameters / (self.bandwidth * m)

    def last_stage(self, k: Ints, j: int, m: int) -> Floats:
        """Of the stage of states k + 1..j on m units, its links included; shape of ``k``."""
        work = (self.below[k + 1, j] + self._all_reduce(self.parameters[k + 1, j], m)) / m
        return np.maximum(work, self.link[k, j] / m)

    def solve(self, only_first: bool, check: Callable[[], None]) -> None:
        """Fills ``times``; at the outermost level only for i = 0."""
        for m in range(2, self.size + 1):
            for j in range(1, self.states.n):
                check()
                before, rows = self.states.before[j], slice(0, 1 if only_first else j)
                best = self.times[m - 1][rows, j]
                for own in range(1, m):
                    stage = self.last_stage(before, j, own)
                    found = np.maximum(self.times[m - own - 1][rows][:, before], stage).min(axis=1)
                    best = np.minimum(best, found)
                self.times[m - 1][rows, j] = best

    def stages(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The stages of states start..end on all units: first and last state, and units."""
        found, j, m = [], end, self.size
        while True:
            split = self._split(start, j, m)
            if split is None:
                return [(start, j, m), *found[::-1]]
            k, own = split
            found.append((k + 1, j, own))
            j, m = k, m - own

    def _split(self, i: int, j: int, m: int) -> tuple[int, int] | None:
        """The last state before the last stage and the units of that stage; None where one stage takes no longer."""
        before = self.states.before[j]
        if self.alone[m - 1][i, j] <= self.times[m - 1][i, j]:
            return None
        found = np.stack(
            [np.maximum(self.times[m - own - 1][i, before], self.last_stage(before, j, own)) for own in range(1, m)], 1
        )
        k, own = divmod(int(np.argmin(found)), m - 1)
        return int(before[k]), own + 1


def plan(profile: Profile, topology: Topology, states: States, most_steps: float, most_seconds: float) -> Plan:
    """PipeDream's plan. Raises TooLargeError where it would take more steps, or takes more CPU seconds."""
    if (needed := steps(states, topology)) > most_steps:
        raise TooLargeError(f"{states.n} states, {needed:.1e} steps")
    start = time.process_time()

    def check() -> None:
        if time.process_time() - start > most_seconds:
            raise TooLargeError(f"{states.n} states, more than {most_seconds:.0f} s")

    levels: list[_Level] = []
    below, size_below = states.between(states.compute), 1
    for at, level in enumerate(topology.levels):
        levels.append(_Level(states, below, level.size, level.bandwidth_bytes_per_second, size_below))
        levels[-1].solve(at == len(topology.levels) - 1, check)
        below, size_below = levels[-1].times[-1], level.size
    stages = _expand(levels, 0, states.n - 1, [range(topology.n_devices)])
    return Plan(_with_nodes(profile, states, stages), float(below[0, -1]), time.process_time() - start)


def steps(states: States, topology: Topology) -> float:
    """How often the innermost line of the published program's five loops runs."""
    pairs = sum(len(b) for b in states.before)
    found = 0.0
    for at, level in enumerate(topology.levels):
        first = 1 if at == len(topology.levels) - 1 else states.n / 3  # i is less than j
        found += first * pairs * level.size * (level.size - 1) / 2
    return found


def _expand(levels: Sequence[_Level], start: int, end: int, blocks: list[range]) -> list[tuple[int, int, list[int]]]:
    """The stages of states start..end on blocks of devices that are all used alike: first and last state, and devices."""
    if not levels:
        return [(start, end, [device for block in blocks for device in block])]
    found, at, size = [], 0, len(blocks[0]) // levels[-1].size
    for first, last, units in levels[-1].stages(start, end):
        inner = [block[u * size : (u + 1) * size] for block in blocks for u in range(at, at + units)]
        found += _expand(levels[:-1], first, last, inner)
        at += units
    return found


def _with_nodes(profile: Profile, states: States, stages: list[tuple[int, int, list[int]]]) -> list[dict[str, Any]]:
    """Each stage with the nodes that its last state adds to those before; a stage without any is left out."""
    found, done = [], 0
    for _, last, devices in stages:
        new = states.members[last] & ~done
        done |= states.members[last]
        if new:
            found.append(
                {"nodes": [profile.ids[v] for v in profile.order.tolist() if new >> v & 1], "devices": devices}
            )
    return found


def plan_in_loops(states: States, topology: Topology, most_seconds: float) -> tuple[float, float, bool]:
    """The same search as the published program has it, in plain loops over lists: its prediction, CPU seconds, whether it
    came to an end within ``most_seconds``. Only for the time that it takes, and as a check of ``plan``."""
    begin, n = time.process_time(), states.n
    sent, before = states.sent.tolist(), [b.tolist() for b in states.before]
    below: Any = states.between(states.compute).tolist()
    parameters = states.between(states.parameters).tolist()
    size_below = 1
    for at, level in enumerate(topology.levels):
        bandwidth, size = level.bandwidth_bytes_per_second, level.size
        times = [
            [[(below[i][j] + 4 * m * parameters[i][j] / (bandwidth * (m + 1)) / size_below) / (m + 1) for m in range(size)]
             for j in range(n)]
            for i in range(n)
        ]  # fmt: skip
        for i in range(1 if at == len(topology.levels) - 1 else n):
            for m in range(1, size):
                if time.process_time() - begin > most_seconds:
                    return inf, time.process_time() - begin, False
                for j in range(i + 1, n):
                    best = times[i][j][m]
                    for k in before[j]:
                        if i > 0 and k in before[i - 1]:
                            continue
                        for own in range(1, m + 1):
                            link_in = 2.0 * sent[k] / (bandwidth * own)
                            link_out = 2.0 * sent[j] / (bandwidth * own) if j < n - 1 else 0.0
                            stage = below[k + 1][j]
                            stage += 4 * (own - 1) * parameters[k + 1][j] / (bandwidth * own)
                            stage /= own
                            best = min(best, max(times[i][k][m - own], stage, link_in, link_out))
                    times[i][j][m] = best
        below = [[times[i][j][-1] for j in range(n)] for i in range(n)]
        size_below = size
    return below[0][n - 1], time.process_time() - begin, True
