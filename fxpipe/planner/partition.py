"""``fxpipe.partition``: from a profile and a topology to a plan, with what it takes and how good it is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fxpipe import units
from fxpipe.errors import OptionError, PartitionError
from fxpipe.ir.topology import Topology
from fxpipe.planner.bounds import check_possible, single_device_bound
from fxpipe.planner.constraints import Constraints, check_objective
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.evaluate import Evaluation, evaluate
from fxpipe.planner.fastest import fastest
from fxpipe.planner.graph import build_graph
from fxpipe.planner.plan import Stages, stages_dict
from fxpipe.planner.problem import Answer, Problem
from fxpipe.planner.profile import NodeId, Profile, read_profile
from fxpipe.planner.single_devices import least_communication, most_even
from fxpipe.planner.topology import read_topology

SAME = 1e-9  # relative: times this near are the same


@dataclass(frozen=True)
class Result:
    """A plan with its evaluation. ``lower_bound_seconds``: no plan of the kind that was asked for has a smaller bottleneck.
    ``proved_optimal``: no plan of that kind is better by the objective; never said where it is only likely."""

    objective: str
    problem: Problem
    stages: Stages
    evaluation: Evaluation
    lower_bound_seconds: float
    proved_optimal: bool

    @property
    def profile(self) -> Profile:
        """What was planned."""
        return self.problem.profile

    @property
    def topology(self) -> Topology:
        """What it was planned for."""
        return self.problem.topology

    def again(self, profile: Profile, topology: Topology) -> "Result":
        """Another profile or topology planned with the same objective and constraints. Raises as ``partition`` does."""
        return _plan(profile, topology, self.objective, self.problem.constraints, self.problem.model)

    @property
    def bottleneck_seconds(self) -> float:
        """The time of the slowest stage for one microbatch."""
        return self.evaluation.bottleneck_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``stages`` as ``[{"nodes": [ids], "devices": [ints]}]``."""
        found = self.evaluation
        return {
            "objective": self.objective,
            "stages": stages_dict(self.profile, self.stages),
            "bottleneck_seconds": found.bottleneck_seconds,
            "lower_bound_seconds": self.lower_bound_seconds,
            "proved_optimal": self.proved_optimal,
            "bottleneck": found.bottleneck,
            "communication_bytes": found.communication_bytes,
            "load_ratio": found.load_ratio,
            "cut_bytes": list(found.cut_bytes),
            "stage_evaluations": [asdict(stage) for stage in found.stages],
            "warnings": list(found.warnings),
        }


def partition(
    profile: Mapping[str, Any] | Profile,
    topology: Mapping[str, Any] | str | Topology,
    objective: str = "time",
    n_stages: int | None = None,
    max_load_ratio: float | None = None,
    *,
    max_replicas: int | None = None,
    stage_hints: Mapping[NodeId, int | str] | None = None,
    not_replicated: Sequence[NodeId] = (),
    model: CostModel | None = None,
) -> Result:
    """Cuts a profiled model into stages and places them on devices.

    ``objective``: ``"time"`` (the slowest stage is fastest, with replication and whole-pipeline copies),
    ``"communication"`` (fewest bytes over all cuts) or ``"balance"`` (the busiest stage computes least); these two give
    each stage one device, ``n_stages`` of them, by default as many as there are devices. ``max_load_ratio`` caps the
    busiest stage's compute at so many times the mean, where it is given. The rest as in ``Constraints``.

    After Harlap et al. (arXiv:1806.03377) and US 12056604 B2; the cost model is ``cost_model.py``.

    Raises:
        OptionError: the profile, the topology or an option is wrong; names the item.
        PartitionError: no plan keeps to the constraints; says which forbids it and by how much.
    """
    profile = profile if isinstance(profile, Profile) else read_profile(profile)
    topology = read_topology(topology)
    check_objective(objective)
    constraints = Constraints(n_stages, max_load_ratio, max_replicas, stage_hints or {}, tuple(not_replicated))
    if objective == "time" and max_load_ratio is not None:
        raise OptionError(
            f"max_load_ratio is {max_load_ratio}, but objective 'time' has stages of several devices, for which it says "
            "nothing; leave it out, or ask for 'communication' or 'balance'"
        )
    if n_stages is None and objective != "time":
        constraints = replace(constraints, n_stages=topology.n_devices)
    return _plan(profile, topology, objective, constraints, model or CostModel())


def _plan(profile: Profile, topology: Topology, objective: str, constraints: Constraints, model: CostModel) -> Result:
    graph = build_graph(profile, constraints)
    check_possible(profile, graph, topology, constraints)
    problem = Problem(profile, topology, model, constraints, graph)
    answer = _solve(problem, objective)
    if answer is None:
        raise PartitionError(_why_none(problem, objective))
    return _result(problem, objective, answer)


def _max_seconds(problem: Problem) -> float | None:
    ratio = problem.constraints.max_load_ratio
    if ratio is None:
        return None
    return ratio * float(problem.graph.compute.sum()) / (problem.constraints.n_stages or 1)


def _solve(problem: Problem, objective: str) -> Answer | None:
    cap = _max_seconds(problem)
    if objective == "communication":
        return least_communication(problem, cap)
    if objective == "time":
        return fastest(problem)
    even = most_even(problem)
    return None if even is None or (cap is not None and even.cost > cap * (1 + SAME)) else even


def _result(problem: Problem, objective: str, answer: Answer) -> Result:
    stages = answer.stages(problem)
    found = evaluate(problem.profile, problem.topology, stages, problem.model)
    if objective == "time":
        bound = max(problem.time_bound, answer.proved_bound)
        bound = min(bound, found.bottleneck_seconds)  # they may differ in the last digit
        proved = found.bottleneck_seconds <= bound * (1 + SAME)
    else:
        bound = single_device_bound(problem.graph, len(stages))
        proved = answer.proved_bound != 0
    return Result(objective, problem, stages, found, float(bound), bool(proved))


def _why_none(problem: Problem, objective: str) -> str:
    """The constraint that forbids every plan, and by how much."""
    constraints, memory = problem.constraints, problem.topology.memory_bytes
    if constraints.max_load_ratio is not None and (even := most_even(problem)) is not None:
        ratio = even.cost / (_max_seconds(problem) or 1.0) * constraints.max_load_ratio
        return (
            f"no plan of {constraints.n_stages} stages was found with the busiest at most {constraints.max_load_ratio} x "
            f"the mean; the most even one has {ratio:.3f} x: raise max_load_ratio to that, or take fewer stages"
        )
    if memory is not None and (least := _least_memory(problem, objective, memory)) is not None:
        return (
            f"no plan fits into {units.format_bytes(memory)} of memory on each device; "
            f"about {units.format_bytes(least)} are needed, {units.format_bytes(least - memory)} more"
        )
    n = constraints.n_stages
    return f"no plan of {n} stages keeps to the stage hints" if n else "no plan keeps to the stage hints"


def _least_memory(problem: Problem, objective: str, memory: int) -> int | None:
    """The memory with which a plan is found, to one percent; None where no memory helps."""
    everything = problem.topology.n_devices * float((problem.graph.parameters + problem.graph.activations).sum())
    free = replace(problem, constraints=replace(problem.constraints, max_load_ratio=None))
    low, high = memory, 2 * memory
    while _solve(free.with_memory(high), objective) is None:
        if high > everything:
            return None
        low, high = high, 2 * high
    while high > low * 1.01 + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _solve(free.with_memory(middle), objective) is None else (low, middle)
    return high
