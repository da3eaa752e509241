"""What a plan takes under the cost model: the only source of the numbers that the planner reports."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from fxpipe import units
from fxpipe.ir.topology import Topology
from fxpipe.planner.cost_model import CostModel, groups_used, link_seconds_per_byte, unit_shares, versions
from fxpipe.planner.plan import Stage, Stages, check_plan, cut_bytes, read_stages, stage_of_nodes
from fxpipe.planner.profile import Profile

TERMS = ("compute", "all-reduce", "link in", "link out")


@dataclass(frozen=True)
class StageEvaluation:
    """One stage for one microbatch. ``work_seconds`` is compute and all-reduce over the replicas, ``limit`` one of TERMS."""

    n_replicas: int
    compute_seconds: float
    all_reduce_seconds: float
    work_seconds: float
    link_in_seconds: float
    link_out_seconds: float
    seconds: float
    limit: str
    parameter_bytes: float
    activation_bytes: float
    versions: int
    memory_bytes: float


@dataclass(frozen=True)
class Evaluation:
    """A plan under the cost model.

    ``cut_bytes``: what crosses each cut one way. ``communication_bytes``: over all cuts, both ways. ``load_ratio``: compute
    of the busiest device over the mean of those used. ``bottleneck``: which stage and which term.
    """

    bottleneck_seconds: float
    bottleneck: str
    stages: tuple[StageEvaluation, ...]
    cut_bytes: tuple[float, ...]
    communication_bytes: float
    load_ratio: float
    warnings: tuple[str, ...]


def evaluate(
    profile: Profile,
    topology: Topology,
    plan: Sequence[Stage | Mapping[str, Any]],
    model: CostModel | None = None,
) -> Evaluation:
    """The times, traffic and memory of a plan; ``plan`` also as ``[{"nodes": [ids], "devices": [ints]}]``.

    Raises:
        OptionError: an unknown node.
        VerifyError: the stages are no plan for this profile and topology.
    """
    model = model or CostModel()
    stages = read_stages(profile, plan)
    check_plan(profile, topology, stages)
    crossing = cut_bytes(profile, stage_of_nodes(profile, stages), len(stages))
    links = [
        tuple(x * seconds for seconds in link_seconds_per_byte(topology, a.devices, b.devices))
        for x, (a, b) in zip(crossing, pairwise(stages), strict=True)
    ]
    link_in = [0.0, *(after for _, after in links)]
    link_out = [*(before for before, _ in links), 0.0]
    replicas_from = [sum(len(s.devices) for s in stages[i:]) for i in range(len(stages))]
    rows = tuple(
        _evaluate_stage(profile, topology, model, *row)
        for row in zip(stages, link_in, link_out, replicas_from, strict=True)
    )
    worst = max(range(len(rows)), key=lambda s: rows[s].seconds)
    loads = [row.compute_seconds / row.n_replicas for row in rows]
    mean = sum(row.compute_seconds for row in rows) / sum(row.n_replicas for row in rows)
    return Evaluation(
        bottleneck_seconds=rows[worst].seconds,
        bottleneck=f"stage {worst} {rows[worst].limit}",
        stages=rows,
        cut_bytes=tuple(crossing),
        communication_bytes=2 * sum(crossing),
        load_ratio=max(loads) / mean if mean else 1.0,
        warnings=tuple(_warnings(topology, model, stages, rows, crossing)),
    )


def _evaluate_stage(
    profile: Profile,
    topology: Topology,
    model: CostModel,
    stage: Stage,
    link_in: float,
    link_out: float,
    from_here: int,
) -> StageEvaluation:
    nodes, r = list(stage.nodes), len(stage.devices)
    compute = float(profile.compute_seconds[nodes].sum())
    parameters = float(profile.parameter_bytes[nodes].sum())
    activations = float(profile.output_bytes[nodes].sum())
    all_reduce = parameters * model.all_reduce_seconds_per_byte(topology, stage.devices)
    work = model.work_seconds(compute, all_reduce, r)
    terms = ("all-reduce" if all_reduce > compute else "compute", work), ("link in", link_in), ("link out", link_out)
    n = versions(from_here, r)
    return StageEvaluation(
        n_replicas=r,
        compute_seconds=compute,
        all_reduce_seconds=all_reduce,
        work_seconds=work,
        link_in_seconds=link_in,
        link_out_seconds=link_out,
        seconds=model.stage_seconds(work, link_in, link_out),
        limit=max(terms, key=lambda term: term[1])[0],
        parameter_bytes=parameters,
        activation_bytes=activations,
        versions=n,
        memory_bytes=n * (parameters + activations),
    )


def _warnings(
    topology: Topology, model: CostModel, stages: Stages, rows: Sequence[StageEvaluation], crossing: Sequence[float]
) -> list[str]:
    found = []
    for s, row in enumerate(rows):
        if topology.memory_bytes is not None and row.memory_bytes > topology.memory_bytes:
            over = units.format_bytes(row.memory_bytes - topology.memory_bytes)
            found.append(f"stage {s} needs {units.format_bytes(row.memory_bytes)} on each device, {over} too much")
    traffic = uplink_bytes(topology, model, stages, rows, crossing)
    busiest = max(
        ((n_bytes / topology.levels[k].bandwidth_bytes_per_second, k, unit) for (k, unit), n_bytes in traffic.items()),
        default=(0.0, 0, 0),
    )
    slowest = max(row.seconds for row in rows)
    if busiest[0] > slowest * (1 + 1e-9):
        seconds, k, unit = busiest
        size = prod(level.size for level in topology.levels[:k])
        whose = f"devices {unit * size}-{(unit + 1) * size - 1}" if k else f"device {unit}"
        found.append(
            f"all traffic over the uplink of {whose} takes {units.format_seconds(seconds)} for each microbatch, "
            f"{seconds / slowest:.2f} x the slowest stage: stages on this link wait for it, which no time here counts"
        )
    return found


def uplink_bytes(
    topology: Topology, model: CostModel, stages: Stages, rows: Sequence[StageEvaluation], crossing: Sequence[float]
) -> dict[tuple[int, int], float]:
    """Bytes over the uplink of each (level, unit) for each microbatch: all cuts, both ways, and all all-reduces."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    size, groups = 1, [groups_used(topology, stage.devices) for stage in stages]
    for k, level in enumerate(topology.levels):
        shares = [unit_shares(stage.devices, size) for stage in stages]
        for share, row, g in zip(shares, rows, groups, strict=True):
            for unit in share:
                total[k, unit] += model.all_reduce_share(g[k]) * row.parameter_bytes / row.n_replicas
        for x, (before, after) in zip(crossing, pairwise(shares), strict=True):
            for unit in before.keys() | after.keys():
                total[k, unit] += 2 * x * abs(before.get(unit, 0.0) - after.get(unit, 0.0))
        size *= level.size
    return total
