"""The planner against PipeDream's optimiser on the layer graphs of well-known models (``known_profiles.py``).

    python tools/bench_pipedream.py [--quick] [--models VGG-16 ...] [--device A100] [--loop-seconds 45] [--json] [--check]

How it is compared: both plan the same profile for the same topology; both plans are judged by ``fxpipe.planner.evaluate``, and
"ratio" is the time of ours over that of theirs. "said" is what PipeDream predicts for its plan over what ``evaluate`` says.
Its plans come from ``pipedream.py``, vectorised; "their CPU s" is the time of the same search in plain loops, as it was
published, which depends on the graph and the sizes of the topology alone. The loops are stopped after ``--loop-seconds``, and
the time is then a lower bound. "above bound" is ours over our own lower bound. Where there are too many states or steps,
PipeDream cannot plan the model: no ratio.

"our CPU s" is the median of several calls of ``fxpipe.partition``, from the JSON object to the evaluated plan. Imports are not
counted, as the loops' are not; nothing is kept from one call for the next. "times faster" is printed in three readings: by
geometric mean, in the least case, and of all cases together. Cases of 10 ms are near the noise of a machine with other work.

Links: 1.25 GB/s is 10 Gb Ethernet, 3.125 GB/s 25 Gb (PipeDream's two clusters), 12 GB/s PCIe, 150 and 300 GB/s NVLink.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from math import exp, isclose, log, nan
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_planner import Figure
from known_profiles import MODELS, known_profile
from pipedream import Plan, plan
from pipedream_loops import plan_in_loops
from pipedream_states import States, TooLargeError, states_of

from fxpipe.ir.topology import Topology
from fxpipe.planner.evaluate import evaluate
from fxpipe.planner.partition import Result, partition
from fxpipe.planner.profile import Profile, read_profile
from fxpipe.planner.topology import parse_topology
from fxpipe.tables import table

FLAT = [f"{n}@{bandwidth}GB/s" for n in (4, 8, 16) for bandwidth in (1.25, 12, 150)]
LINKS = ((12, 1.25), (150, 3.125), (300, 25))
MACHINES = [f"{n}@{near}GB/s x {m}@{far}GB/s" for n, m in ((2, 4), (4, 4), (4, 8)) for near, far in LINKS]
QUICK_MODELS = ["VGG-16", "ResNet-50", "DenseNet-like", "NASNet-like"]
QUICK = ["4@12GB/s", "16@12GB/s", "2@12GB/s x 4@1.25GB/s", "4@150GB/s x 4@3.125GB/s"]
MOST_STATES = 4000
MOST_STEPS = 3e9
MOST_SECONDS = 120.0
NEEDS_SECONDS = 1.0  # from here on its search must be so many times slower
COLUMNS = ["model", "topology", "ours", "theirs", "ratio", "above bound", "said", "our CPU s", "their CPU s", "times"]


@dataclass(frozen=True)
class Row:
    """One model on one topology; seconds. ``why_not`` says why PipeDream has no plan, and the rest of it is nan."""

    model: str
    topology: str
    ours: float
    bound: float
    our_cpu: float
    theirs: float = nan
    said: float = nan
    their_cpu: float = nan
    finished: bool = True
    why_not: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def times(self) -> float:
        """How much longer its search takes, at least."""
        return self.their_cpu / self.our_cpu

    def cells(self) -> list[str]:
        """The row of the table."""
        left = [self.model, self.topology, f"{self.ours * 1e3:.2f} ms"]
        above, our_cpu = f"{100 * (self.ours / self.bound - 1):.1f} %", f"{self.our_cpu:.3f}"
        if self.why_not:
            return [*left, self.why_not, "", above, "", our_cpu, "", ""]
        least = "" if self.finished else "> "
        theirs = [f"{self.theirs * 1e3:.2f} ms", f"{self.ratio:.3f}", above, f"{self.said / self.theirs:.3f}"]
        return [*left, *theirs, our_cpu, f"{least}{self.their_cpu:.2f}", f"{least}{self.times:.0f}"]


class Theirs:
    """PipeDream on one profile; the loops run once for each shape of topology."""

    def __init__(self, profile: Profile, loop_seconds: float) -> None:
        self.profile, self.loop_seconds = profile, loop_seconds
        self.known: dict[tuple[int, ...], tuple[float, bool]] = {}
        self.states: States | None = None
        self.why_not = ""
        try:
            self.states = states_of(profile, MOST_STATES)
        except TooLargeError as error:
            self.why_not = str(error)

    def plan(self, topology: Topology) -> Plan:
        """Its plan. Raises TooLargeError."""
        if self.states is None:
            raise TooLargeError(self.why_not)
        return plan(self.profile, topology, self.states, MOST_STEPS, MOST_SECONDS)

    def seconds(self, topology: Topology, found: Plan) -> tuple[float, bool]:
        """CPU seconds of the plain loops, and whether they came to an end."""
        assert self.states is not None
        shape = tuple(level.size for level in topology.levels)
        if shape not in self.known:
            said, seconds, finished = plan_in_loops(self.states, topology, self.loop_seconds)
            if finished and not isclose(said, found.predicted_seconds, rel_tol=1e-9):
                raise SystemExit(f"the loops predict {said} s, the vectorised search {found.predicted_seconds} s")
            self.known[shape] = seconds, finished
        return self.known[shape]


def ours(data: dict[str, Any], topology: Topology, rounds: int) -> tuple[Result, float]:
    """Our plan, and the median CPU seconds from the JSON object to the result."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = partition(data, topology)
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def compare(model: str, data: dict[str, Any], theirs: Theirs, text: str, rounds: int) -> Row:
    """Both plans for one topology under our cost model."""
    topology = parse_topology(text)
    result, cpu = ours(data, topology, rounds)
    mine = Row(model, text, result.bottleneck_seconds, result.lower_bound_seconds, cpu)
    try:
        found = theirs.plan(topology)
    except TooLargeError as error:
        return Row(*list(asdict(mine).values())[:5], why_not=f"cannot: {error}")
    judged = evaluate(theirs.profile, topology, found.stages).bottleneck_seconds
    return Row(*list(asdict(mine).values())[:5], judged, found.predicted_seconds, *theirs.seconds(topology, found))


def figures(rows: list[Row]) -> list[Figure]:
    """The figures of the issue, over the rows that have both plans."""
    both = [row for row in rows if not row.why_not]
    if not both:
        return []
    found = [Figure("worst ratio", max(row.ratio for row in both), 1.0 + 1e-9, False)]
    for name, hierarchy, bound in (("flat", False, 0.98), ("hierarchies", True, 0.75)):
        some = [row.ratio for row in both if (" x " in row.topology) == hierarchy]
        found.append(Figure(f"{name}: geometric mean of the ratios", geometric_mean(some), bound, False))
    slow = [row for row in both if row.their_cpu >= NEEDS_SECONDS]
    if slow:
        times, name = [row.times for row in slow], "times faster where it needs a second"
        together = sum(row.their_cpu for row in slow) / sum(row.our_cpu for row in slow)
        found.append(Figure(f"{name}: geometric mean", geometric_mean(times), 100, True))
        found.append(Figure(f"{name}: all together", together, 100, True))
        found.append(Figure(f"{name}: least", min(times), 100, True))
    return found


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return exp(sum(map(log, values)) / len(values)) if values else nan


def main() -> int:
    """Measure, print, and say whether the figures hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="by default all")
    parser.add_argument("--quick", action="store_true", help="few models and topologies, under a minute")
    parser.add_argument("--device", default="A100", help="whose costs are modelled (fxpipe.costs.devices)")
    parser.add_argument("--loop-seconds", type=float, default=45, help="after which the plain loops are stopped")
    parser.add_argument("--rounds", type=int, default=3, help="runs of ours, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure falls short")
    arguments = parser.parse_args()
    loop_seconds = min(arguments.loop_seconds, 2.0) if arguments.quick else arguments.loop_seconds
    rows = []
    for model in arguments.models or (QUICK_MODELS if arguments.quick else MODELS):
        data = known_profile(model, arguments.device)
        theirs = Theirs(read_profile(data), loop_seconds)
        n_states = theirs.why_not or f"{theirs.states.n} states"  # type: ignore[union-attr]
        print(f"{model}: {len(data['nodes'])} layers, {len(data['edges'])} edges, {n_states}", file=sys.stderr)
        for text in QUICK if arguments.quick else FLAT + MACHINES:
            rows.append(compare(model, data, theirs, text, arguments.rounds))
    found = figures(rows)
    if arguments.json:
        checks = [{**asdict(figure), "passed": figure.passed} for figure in found]
        print(json.dumps({"rows": [asdict(row) for row in rows], "figures": checks}, indent=1))
    else:
        print(table([row.cells() for row in rows], COLUMNS), "\n")
        print(
            table(
                [[f.name, f"{f.value:.4g}", f.bound, "yes" if f.passed else "NO"] for f in found],
                ["figure", "value", "bound", "holds"],
            )
        )
    short = [figure for figure in found if not figure.passed]
    for figure in short:
        side = "<" if figure.least else ">"
        print(f"{figure.name}: {figure.value:.4g} {side} {figure.bound:.4g}", file=sys.stderr)
    return int(arguments.check and bool(short))


if __name__ == "__main__":
    sys.exit(main())
