"""How good and how quick the planner is: random graphs against brute force, and growth to 100,000 nodes and 1,024 devices.

    python tools/bench_planner.py [--seeds 1000] [--first 0] [--seconds 540] [--workers 2] [--part growth] [--json] [--check]

"optimality": for each seed one graph of every family (chain, branchy, series-parallel, dense) of up to 12 nodes, planned on 4
flat devices and on 2 machines of 2, for each objective, and set against the best of every plan there is
(``tests/planner/brute_force.py``, which shares no code with the planner). Seeds are spread over processes and stop after
``--seconds``; the table says how many were done, and ``--check`` wants all of them. Half of the problems limit the memory.

"growth": CPU seconds of ``fxpipe.partition`` from the JSON objects to the result, each in a process of its own, with its
peak memory; the median of three. ``--check`` exits with 1 where a figure falls short.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from planner.brute_force import best_time, best_with_single_devices
from planner.graphs import FAMILIES, random_profile

import fxpipe
from fxpipe.errors import PartitionError
from fxpipe.planner.evaluate import evaluate
from fxpipe.tables import table

FLAT = {"levels": [{"size": 4, "bandwidth_bytes_per_second": 20.0}]}
MACHINES = {"levels": [{"size": 2, "bandwidth_bytes_per_second": 30.0}, {"size": 2, "bandwidth_bytes_per_second": 5.0}]}
SAME = 1e-9
MOST_NODES = 12
GROWTH = [
    ("branchy", 10_000, "64@2KB/s", 1.0),
    ("branchy", 10_000, "8@20KB/s x 8@2KB/s", 1.0),
    ("branchy", 10_000, "256@2KB/s", 2.0),
    ("branchy", 10_000, "8@20KB/s x 32@2KB/s", 2.0),
    ("branchy", 10_000, "8@20KB/s x 128@2KB/s", 6.0),
    ("branchy", 10_000, "32@20KB/s x 32@2KB/s", 6.0),
    ("chain", 10_000, "32@20KB/s x 32@2KB/s", 6.0),
    ("dense", 10_000, "8@20KB/s x 32@2KB/s", 2.0),
    ("chain", 1_000, "64@2KB/s", 1.0),
    ("chain", 100_000, "64@2KB/s", 5.0),
]
MOST_BYTES = 500e6
ONE = "import sys; sys.path.insert(0, {folder!r}); from bench_planner import grow; grow({family!r}, {n}, {topology!r})"


@dataclass(frozen=True)
class Figure:
    """One number of the report and what it is held to; ``least`` tells which side is good."""

    name: str
    value: float
    bound: float
    least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.least else self.value <= self.bound


def ratios(seed: int) -> list[tuple[str, float]]:
    """What the planner found over the best there is, by problem; 0 where an answer is no plan or beats brute force."""
    rng, found = random.Random(seed), []
    for family in FAMILIES:
        data = random_profile(seed, family, rng.randint(1, MOST_NODES))
        stored = sum(node["output_bytes"] + node["parameter_bytes"] for node in data["nodes"])
        memory = None if seed % 2 else int(stored * rng.uniform(0.3, 2)) + 1
        for name, topology in (("time, 4 flat", FLAT), ("time, 2x2", MACHINES)):
            limited = {**topology, "memory_bytes": memory}
            found.append((name, ratio(data, limited, {}, best_time(data, limited))))
        n_stages = rng.randint(1, min(4, len(data["nodes"])))
        cap = rng.uniform(1, 2.5)
        seconds = sum(node["forward_seconds"] + node["backward_seconds"] for node in data["nodes"])
        load, moved = best_with_single_devices(data, n_stages, cap * seconds / n_stages)
        found.append(("balance", ratio(data, FLAT, {"objective": "balance", "n_stages": n_stages}, load)))
        options = {"objective": "communication", "n_stages": n_stages, "max_load_ratio": cap}
        found.append(("communication", ratio(data, FLAT, options, moved)))
    return found


def ratio(data: dict[str, Any], topology: dict[str, Any], options: dict[str, Any], best: float) -> float:
    """The planner's cost over the best; infinite where it finds no plan but there is one."""
    try:
        result = fxpipe.partition(data, topology, **options)
    except PartitionError:
        return 1.0 if best == inf else inf
    checked = evaluate(result.profile, result.topology, result.to_dict()["stages"])
    cost = {
        "time": checked.bottleneck_seconds,
        "communication": checked.communication_bytes,
        "balance": max(stage.compute_seconds for stage in checked.stages),
    }[result.objective]
    over = any("too much" in warning for warning in checked.warnings)
    if over or checked.bottleneck_seconds != result.bottleneck_seconds or cost < best * (1 - SAME):
        return 0.0
    return cost / best if best else 1.0 + cost


def optimality(first: int, seeds: int, seconds: float, workers: int) -> tuple[list[list[object]], list[Figure]]:
    """A row for each kind of problem, and the figures of the issue."""
    by_name: dict[str, list[float]] = defaultdict(list)
    start, done = time.monotonic(), 0
    with ProcessPoolExecutor(workers) as pool:
        for at in range(first, first + seeds, 8 * workers):
            if time.monotonic() - start > seconds:
                break
            for found in pool.map(ratios, range(at, min(first + seeds, at + 8 * workers))):
                done += 1
                for name, value in found:
                    by_name[name].append(value)
    rows, figures = [], [Figure("seeds", done, seeds, True)]
    for name, values in by_name.items():
        optimal = 100 * sum(1 - SAME <= v <= 1 + SAME for v in values) / len(values)
        near = 100 * sum(1 - SAME <= v <= 1.01 for v in values) / len(values)
        rows.append(
            [name, len(values), f"{optimal:.2f}", f"{near:.2f}", f"{max(values):.4f}", sum(v == 0 for v in values)]
        )
        figures.append(Figure(f"{name}: invalid plans", sum(v == 0 for v in values), 0, False))
        if name == "time, 4 flat":
            figures.append(Figure(f"{name}: % optimal", optimal, 100, True))
        elif name == "time, 2x2":
            figures.append(Figure(f"{name}: % within 1 %", near, 95, True))
        else:
            figures.append(Figure(f"{name}: % optimal", optimal, 95, True))
            figures.append(Figure(f"{name}: worst ratio", max(values), 1.05, False))
    return rows, figures


def grow(family: str, n: int, topology: str) -> None:
    """One measurement, printed as JSON: CPU seconds, peak bytes, time over bound."""
    data = random_profile(1, family, n) if family != "dense" else dense(n)
    before = time.process_time()
    result = fxpipe.partition(data, topology)
    seconds = time.process_time() - before
    above = result.bottleneck_seconds / result.lower_bound_seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([seconds, peak, above, len(result.stages), result.proved_optimal]))


def dense(n: int) -> dict[str, Any]:
    """Each node reads up to 8 of the 32 before it."""
    rng = random.Random(n)
    edges = [[a, b] for b in range(1, n) for a in sorted(rng.sample(range(max(0, b - 32), b), min(8, b)))]
    return {"nodes": random_profile(1, "chain", n)["nodes"], "edges": edges}


def growth(rounds: int) -> tuple[list[list[object]], list[Figure]]:
    """A row for each size."""
    rows, figures = [], []
    for family, n, topology, bound in GROWTH:
        code = ONE.format(folder=str(Path(__file__).parent), family=family, n=n, topology=topology)
        runs = [
            json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(rounds)
        ]
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        _, _, above, n_stages, proved = runs[0]
        name = f"{family} {n} on {topology}"
        rows.append(
            [name, f"{seconds:.2f}", bound, f"{peak / 1e6:.0f}", n_stages, f"{above:.4f}", "yes" if proved else ""]
        )
        figures += [
            Figure(f"{name}: CPU seconds", seconds, bound, False),
            Figure(f"{name}: bytes", peak, MOST_BYTES, False),
        ]
    return rows, figures


def main() -> int:
    """Measure, print, and say whether the figures hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed, to do them in slices")
    parser.add_argument("--seconds", type=float, default=540, help="after which no further seeds are begun")
    parser.add_argument("--workers", type=int, default=2, help="processes for the brute force")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each size")
    parser.add_argument("--part", nargs="+", choices=["optimality", "growth"], default=["optimality", "growth"])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure falls short")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    if "optimality" in arguments.part:
        rows, found = optimality(arguments.first, arguments.seeds, arguments.seconds, arguments.workers)
        figures += found
        if not arguments.json:
            print(table(rows, ["problem", "graphs", "% optimal", "% within 1 %", "worst ratio", "invalid"]), "\n")
    if "growth" in arguments.part:
        rows, found = growth(arguments.rounds)
        figures += found
        if not arguments.json:
            print(table(rows, ["problem", "CPU s", "at most", "peak MB", "stages", "time / bound", "proved"]), "\n")
    if arguments.json:
        print(json.dumps([{**asdict(figure), "passed": figure.passed} for figure in figures], indent=1))
    short = [figure for figure in figures if not figure.passed]
    for figure in short:
        side = "<" if figure.least else ">"
        print(f"{figure.name}: {figure.value:.4g} {side} {figure.bound:.4g}", file=sys.stderr)
    return int(arguments.check and bool(short))


if __name__ == "__main__":
    sys.exit(main())
