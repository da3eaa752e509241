"""A plan as a page: a line for each stage, what limits it, and how far it is from the bound."""

from collections.abc import Sequence

from fxpipe import units
from fxpipe.planner.partition import Result
from fxpipe.planner.topology import topology_text
from fxpipe.tables import table

COLUMNS = ("stage", "nodes", "devices", "compute", "all-reduce", "work", "link in", "link out", "memory", "limit")
MOST_NAMED = 2


def report(result: Result) -> str:
    """The page of a result, ending with its warnings."""
    found, names = result.evaluation, result.profile.names
    rows = [
        [
            s,
            nodes_text([names[node] for node in stage.nodes]),
            ranges_text(stage.devices),
            *map(units.format_seconds, (row.compute_seconds, row.all_reduce_seconds, row.work_seconds)),
            *map(units.format_seconds, (row.link_in_seconds, row.link_out_seconds)),
            units.format_bytes(row.memory_bytes),
            f"{row.limit} *" if found.bottleneck == f"stage {s} {row.limit}" else row.limit,
        ]
        for s, (stage, row) in enumerate(zip(result.stages, found.stages, strict=True))
    ]
    used = sum(len(stage.devices) for stage in result.stages)
    lines = [
        f"{result.profile.n_nodes} nodes in {len(result.stages)} stages on {used} of {result.topology.n_devices} devices "
        f"({topology_text(result.topology)}), objective {result.objective}",
        "",
        table(rows, COLUMNS),
        "",
        f"slowest   {units.format_seconds(found.bottleneck_seconds)} for each microbatch (*): {found.bottleneck}",
        f"bound     {units.format_seconds(result.lower_bound_seconds)}; {_quality(result)}",
        f"moved     {units.format_bytes(found.communication_bytes)} for each microbatch over all cuts, both ways",
        f"load      the busiest device computes {found.load_ratio:.3f} x the mean",
        *(f"warning   {warning}" for warning in found.warnings),
    ]
    return "\n".join(lines)


def _quality(result: Result) -> str:
    if result.proved_optimal:
        return f"proved optimal for {result.objective}"
    if not result.lower_bound_seconds:
        return "not proved optimal"
    above = 100 * (result.bottleneck_seconds / result.lower_bound_seconds - 1)
    return f"the plan is {above:.1f} % above it, not proved optimal"


def nodes_text(names: Sequence[str]) -> str:
    """``conv1 .. relu7 (12)``: the first and last of several."""
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{names[0]} .. {names[-1]} ({len(names)})"


def ranges_text(devices: Sequence[int]) -> str:
    """``0-3, 8``: consecutive devices as ranges."""
    parts: list[list[int]] = []
    for device in sorted(devices):
        if parts and parts[-1][-1] == device - 1:
            parts[-1].append(device)
        else:
            parts.append([device])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
