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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pipedream_states import States, TooLargeError

from fxpipe.ir.topology import Level, Topology
from fxpipe.planner.profile import Floats, Ints, Profile


@dataclass(frozen=True)
class Plan:
    """``stages`` as ``evaluate`` takes them; its own prediction; CPU seconds of the search."""

    stages: list[dict[str, Any]]
    predicted_seconds: float
    cpu_seconds: float


class _Level:
    """One level of the hierarchy: ``times[m - 1]`` [i, j], the best time of states i..j on m units; outermost, only i = 0."""

    def __init__(self, states: States, below: Floats, level: Level, size_below: int, outermost: bool) -> None:
        self.states, self.below, self.size = states, below, level.size
        self.bandwidth = level.bandwidth_bytes_per_second
        self.parameters = np.where(np.isfinite(below), states.between(states.parameters), 0.0)
        rows = slice(0, 1 if outermost else states.n)
        self.times = [
            (below[rows] + self._all_reduce(self.parameters[rows], m) / size_below) / m for m in range(1, self.size + 1)
        ]
        self.alone = [times.copy() for times in self.times]
        out = 2 * states.sent / self.bandwidth
        self.link = np.maximum(out[:, None], np.where(np.arange(states.n) < states.n - 1, out, 0.0))

    def _all_reduce(self, parameters: Any, m: int) -> Any:
        return 4 * (m - 1) * parameters / (self.bandwidth * m)

    def last_stage(self, k: Ints, j: int, m: int) -> Floats:
        """Of the stage of states k + 1..j on m units, its links included; shape of ``k``."""
        work = (self.below[k + 1, j] + self._all_reduce(self.parameters[k + 1, j], m)) / m
        return np.maximum(work, self.link[k, j] / m)

    def solve(self, check: Callable[[], None]) -> None:
        """Fills ``times``."""
        for m in range(2, self.size + 1):
            for j in range(1, self.states.n):
                check()
                before, best = self.states.before[j], self.times[m - 1][:j, j]
                for own in range(1, m):
                    stage = self.last_stage(before, j, own)
                    found = np.maximum(self.times[m - own - 1][:j, before], stage).min(axis=1)
                    best = np.minimum(best, found)
                self.times[m - 1][:j, j] = best

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
        levels.append(_Level(states, below, level, size_below, at == len(topology.levels) - 1))
        levels[-1].solve(check)
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
