"""The search of ``pipedream.py`` in plain loops over lists, as the published program has it: for the time that it takes."""

import time
from math import ceil, inf, isfinite
from typing import Any, TypeAlias

from pipedream_states import States

from fxpipe.ir.topology import Topology
from fxpipe.planner.profile import Floats

Best: TypeAlias = tuple[float | None, tuple[int, int] | None, int | None]  # seconds; where it is split; units
Rows: TypeAlias = list[list[Any]]
COMPRESSION_RATIO = 1.0


def plan_in_loops(states: States, topology: Topology, most_seconds: float) -> tuple[float, float, bool]:
    """What it predicts, CPU seconds, and whether it came to an end within ``most_seconds``.

    Each step works out what the published program does there, the memory that nothing limits without a flag included.
    """
    begin, below, size_below = time.process_time(), _rows(states.between(states.compute)), 1
    for at, level in enumerate(topology.levels):
        loops = _Loops(states, below, level.size, level.bandwidth_bytes_per_second, size_below)
        for i in range(1 if at == len(topology.levels) - 1 else states.n):
            for m in range(1, level.size):
                if time.process_time() - begin > most_seconds:
                    return inf, time.process_time() - begin, False
                for j in range(i + 1, states.n):
                    loops.best[i][j][m] = loops.best_of(i, j, m)
        below, size_below = [[found[-1][0] for found in row] for row in loops.best], level.size
    return below[0][-1], time.process_time() - begin, True


def _rows(sums: Floats) -> Rows:
    return [[x if isfinite(x) else None for x in row] for row in sums.tolist()]


class _Loops:
    """One level: ``best[i][j][m]`` of states i..j on m + 1 units."""

    def __init__(self, states: States, below: Rows, size: int, bandwidth: float, size_below: int) -> None:
        self.n, self.below, self.size, self.bandwidth = states.n, below, size, bandwidth
        self.sent = states.sent.tolist()
        self.before = [set(b.tolist()) for b in states.before]
        self.parameters = _rows(states.between(states.parameters))
        self.activations = _rows(states.between(states.activations))
        self.best: list[list[list[Best]]] = [
            [[self._alone(i, j, m, size_below) for m in range(size)] for j in range(self.n)] for i in range(self.n)
        ]

    def _alone(self, i: int, j: int, m: int, size_below: int) -> Best:
        if self.below[i][j] is None:
            return None, None, None
        reduce = 4 * m * self.parameters[i][j] / (self.bandwidth * (m + 1)) / size_below
        return sum([self.below[i][j], reduce]) / (m + 1), None, m + 1

    def best_of(self, i: int, j: int, m: int) -> Best:
        """Over every state before the last stage, and every number of units of that stage."""
        best, before, below, bandwidth = self.best, self.before, self.below, self.bandwidth
        parameters, activations, sent = self.parameters, self.activations, self.sent
        least, split, units = best[i][j][m]
        for k in before[j]:
            if i > 0 and k in before[i - 1]:
                continue
            for own in range(1, m + 1):
                link_in = 2.0 * sent[k] / (bandwidth * own)
                link_out = None
                if j < self.n - 1:
                    link_out = 2.0 * sent[j] / (bandwidth * own)
                kept = activations[k + 1][j] + parameters[k + 1][j]
                kept *= ceil((self.size - (m + 1)) / own)
                stage = sum([below[k + 1][j], 4 * (own - 1) * parameters[k + 1][j] / (bandwidth * own)])
                stage /= own
                first = best[i][k][m - own][0]
                if first is None:
                    continue
                seconds = max(first, stage)
                link_in /= COMPRESSION_RATIO
                seconds = max(seconds, link_in)
                if link_out is not None:
                    link_out /= COMPRESSION_RATIO
                    seconds = max(seconds, link_out)
                if least is None or least > seconds:
                    least, split, units = seconds, (k, m - own), own
        return least, split, units
