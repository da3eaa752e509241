"""Predicted step times beside measured ones: costs measured node by node in the whole model, then stages run in this process.

    python tools/bench_prediction.py [--rounds 5] [--cuts 20] [--models gpt,cnn] [--json] [--check]

Each demo model is cut into 1, 2 and 4 stages that run one after the other; the prediction of a step is the sum over stages
and microbatches. Each round measures the profile anew, then a few steps; the error is the median over rounds. Then the GPT is
cut in 4 ``--cuts`` times at random, and Kendall's tau compares the order of their slowest stages, predicted and measured.
All times are CPU seconds of this process, one thread, which other processes disturb less than the clock's; numbers of
stages, and cuts, take turns. ``--check`` exits with 1 where a figure misses its bound.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

import fxpipe
from fxpipe.api import call_arguments
from fxpipe.costs.stage_costs import costs_as_trained
from fxpipe.demos import demo
from fxpipe.ir.cost import CostTable
from fxpipe.ir.partition import StagePlan
from fxpipe.runtime.local import LocalPipe

SIZES: dict[str, dict[str, Any]] = {
    "gpt": {"batch": 16, "length": 64, "width": 128, "n_layers": 4, "n_heads": 4},
    "llama": {"batch": 16, "length": 64, "width": 128},
    "bert": {"batch": 16, "length": 64, "width": 128},
    "vit": {"batch": 16, "width": 128},
    "cnn": {"batch": 32, "size": 32},
}
N_MICROBATCHES = 4
N_STAGES = (1, 2, 4)
STEPS = 5
MOST_ERROR = 0.15
LEAST_TAU = 0.8


class Bench:
    """One demo model with its measured profile."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = demo(name)(**SIZES[name])
        self.args, self.kwargs = call_arguments(self.inputs)
        self.costs = self.measured()

    def measured(self) -> CostTable:
        """The profile, measured now."""
        return costs_as_trained(self.model, self.args, self.kwargs, N_MICROBATCHES)

    def pipe(self, n_stages: int, costs: CostTable) -> tuple[LocalPipe, tuple[StagePlan, ...]]:
        """The model cut by these costs, and its stages."""
        options = fxpipe.Options(n_ranks=n_stages, n_microbatches=N_MICROBATCHES)
        plan = fxpipe.compile(self.model, self.inputs, options, costs=costs)
        return LocalPipe(plan.spec(), self.model), plan.partition.stages

    def random_costs(self, seed: int) -> CostTable:
        """Costs under which the best cut is some other."""
        source = random.Random(seed)
        factors = [source.paretovariate(0.7) for _ in self.costs.nodes]
        rows = [
            replace(row, forward_seconds=row.forward_seconds * f, backward_seconds=row.backward_seconds * f)
            for row, f in zip(self.costs.nodes, factors, strict=True)
        ]
        return replace(self.costs, nodes=tuple(rows))

    def step(self, pipe: LocalPipe) -> tuple[float, dict[int, float]]:
        """Seconds of one step, and of each stage for one microbatch."""
        self.model.zero_grad()
        start = time.perf_counter()
        pipe.step(*self.args, **self.kwargs)
        total = time.perf_counter() - start
        stages: dict[int, float] = defaultdict(float)
        for event in pipe.events:
            stages[event.action.stage_index] += (event.end_seconds - event.start_seconds) / N_MICROBATCHES
        return total, stages


def predicted(stages: Sequence[StagePlan], costs: CostTable) -> list[float]:
    """Forward and backward seconds of each stage for one microbatch."""
    rows = [[costs[node] for node in (*s.nodes, *s.recomputed) if node in costs] for s in stages]
    return [sum(float(r.forward_seconds) + float(r.backward_seconds) for r in stage) for stage in rows]


def steps(name: str, n_rounds: int) -> list[dict[str, Any]]:
    """For each number of stages: the step predicted and measured; the error is the median of those of the rounds."""
    bench = Bench(name)
    pipes = {n: bench.pipe(n, bench.costs) for n in N_STAGES}
    pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(n_rounds):
        costs = bench.measured()
        seconds: dict[int, list[float]] = defaultdict(list)
        for _step, (n, (pipe, _)) in itertools.product(range(1 + STEPS), pipes.items()):
            seconds[n].append(bench.step(pipe)[0])
        for n, (_, stages) in pipes.items():
            pairs[n].append((sum(predicted(stages, costs)) * N_MICROBATCHES, statistics.median(seconds[n][1:])))
    rows = []
    for n, found in pairs.items():
        expected, measured = (statistics.median(column) for column in zip(*found, strict=True))
        error = statistics.median(a / b for a, b in found) - 1
        rows.append({"model": name, "stages": n, "predicted": expected, "measured": measured, "error": error})
    return rows


def ranking(name: str, n_cuts: int, n_rounds: int) -> tuple[float, list[dict[str, float]]]:
    """Kendall's tau between the predicted and the measured slowest stage of random cuts, and the pairs."""
    bench = Bench(name)
    pipes = [bench.pipe(N_STAGES[-1], bench.random_costs(seed)) for seed in range(n_cuts)]
    slowest: list[list[float]] = [[] for _ in pipes]
    for round_, (i, (pipe, _)) in itertools.product(range(n_rounds + 2), enumerate(pipes)):
        _total, stages = bench.step(pipe)
        if round_ >= 2:
            slowest[i].append(max(stages.values()))
    rows = [
        {"predicted": max(predicted(stages, bench.costs)), "measured": statistics.median(found)}
        for (_, stages), found in zip(pipes, slowest, strict=True)
    ]
    return kendall_tau(rows), rows


def kendall_tau(rows: list[dict[str, float]]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs."""
    signs = [
        1 if (a["predicted"] - b["predicted"]) * (a["measured"] - b["measured"]) > 0 else -1
        for a, b in itertools.combinations(rows, 2)
    ]
    return sum(signs) / len(signs)


def main() -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with mock.patch.object(time, "perf_counter", time.process_time):
        rows = [row for name in chosen.models.split(",") for row in steps(name, chosen.rounds)]
        tau, cuts = ranking("gpt", chosen.cuts, chosen.rounds)
    passed = all(abs(row["error"]) <= MOST_ERROR for row in rows) and tau >= LEAST_TAU
    result: Mapping[str, Any] = {"steps": rows, "kendall_tau": tau, "cuts": cuts, "passed": passed}
    if chosen.json:
        print(json.dumps(result, indent=1))
    else:
        print(tabulate([list(row.values()) for row in rows], list(rows[0]), floatfmt=".4f"))
        print(f"\nerror at most {MOST_ERROR}; Kendall's tau of {len(cuts)} random cuts {tau:.3f}, at least {LEAST_TAU}")
        print("passed" if passed else "MISSED")
    return int(chosen.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
