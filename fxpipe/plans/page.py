"""``print(plan)``: what was decided and what it promises, on a page."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from fxpipe.costs.prediction import predicted_step
from fxpipe.costs.simulate import Timeline
from fxpipe.ir.compression import SavePoint
from fxpipe.ir.partition import Partition, StagePlan
from fxpipe.plans.planned import Planned
from fxpipe.printing import module_path, table
from fxpipe.units import format_bytes, format_seconds

WIDTH = 110
WIDEST_SPAN = 36
MOST_GROUPS = 11


def page(plan: Planned) -> str:
    """Headline, stages, the cut, the schedule and its promise, save points, passes: each a paragraph or a table."""
    step = predicted_step(plan)
    paragraphs = (
        _headline(plan),
        _stages(plan),
        _cut(plan.partition),
        _schedule(plan, step),
        _ranks(plan, step),
        _save_points(plan),
        _passes(plan),
    )
    return "\n\n".join(filter(None, paragraphs))


def _headline(plan: Planned) -> str:
    batch, n = plan.microbatches.batch_size, plan.microbatches.n
    parts = (
        _count(plan.schedule.n_ranks, "rank"),
        f"batch of {batch} in {_count(n, 'microbatch', 'microbatches')} of {batch // n}",
        f"schedule {plan.schedule.name}",
        f"activations stored as {plan.options.format}" if plan.options.format else "activations stored as they are",
    )
    title = f"{type(plan.model).__name__}: {', '.join(parts)}"
    return f"{title}\n{'=' * len(title)}"


def _stages(plan: Planned) -> str:
    spans = _module_spans(plan)
    rows = [
        [stage.index, len(stage.nodes), span, *_stage_cells(plan, stage)]
        for stage, span in zip(plan.partition.stages, spans, strict=True)
    ]
    headers: tuple[str, ...] = (
        "stage",
        "nodes",
        "modules",
        "weights",
        "forward",
        "backward",
        "saves",
        "stores",
        "sends",
    )
    if plan.schedule.is_replicated:
        headers = (*headers, "ranks")
        rows = [[*row, _rank_span(plan.schedule.ranks_of(stage))] for stage, row in enumerate(rows)]
    return f"Stages, for one microbatch\n{table(rows, headers)}"


def _rank_span(ranks: range) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _stage_cells(plan: Planned, stage: StagePlan) -> list[str]:
    points = plan.compression.of_stage(stage.index)
    n_bytes = (sum(p.raw_bytes for p in points), sum(p.stored_bytes for p in points), stage.sent_bytes)
    seconds = (stage.forward_seconds, stage.backward_seconds)
    return [format_bytes(stage.parameter_bytes), *map(format_seconds, seconds), *map(format_bytes, n_bytes)]


def _module_spans(plan: Planned) -> list[str]:
    """By stage, the first and the last of its modules, as large as they lie in it whole: ``model.wte - ..h.1``."""
    paths = [_paths(plan, stage) for stage in plan.partition.stages]
    homes: dict[str, set[int]] = {}
    for index, found in enumerate(paths):
        for path in found:
            for module in _with_ancestors(path):
                homes.setdefault(module, set()).add(index)
    parents = {module.rpartition(".")[0] for module in homes}
    spans = []
    for found in paths:
        whole = [next((m for m in _with_ancestors(path) if len(homes[m]) == 1), path) for path in found]
        shown = [module for module in whole if len(homes[module]) == 1 or module not in parents]
        spans.append(_span(shown[0], shown[-1]) if shown else "")
    return spans


def _span(first: str, last: str) -> str:
    """``model.wte - ..h.1``: what both begin with is said once, and a number never stands alone.

    Where that is too wide for the table, the deeper of the two is told less deeply.
    """
    begin, end = first.split("."), last.split(".")
    while True:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begin, end, strict=False)))
        if shared == min(len(begin), len(end)):  # one lies in the other
            return ".".join(begin[:shared])
        if shared and end[shared].isdigit():
            shared -= 1
        text = f"{'.'.join(begin)} - {'..' if shared else ''}{'.'.join(end[shared:])}"
        if len(text) <= WIDEST_SPAN or max(len(begin), len(end)) == 1:
            return text
        max(begin, end, key=len).pop()


def _paths(plan: Planned, stage: StagePlan) -> list[str]:
    """The modules that the stage's nodes were traced in, in program order, those of the whole model left out."""
    module: Any = plan.program.graph_module.get_submodule(f"stage_{stage.index}")
    own = set(stage.nodes)
    return [path for node in module.graph.nodes if node.name in own and (path := module_path(node))]


def _with_ancestors(path: str) -> list[str]:
    """``a.b.c`` -> a, a.b, a.b.c"""
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _cut(partition: Partition) -> str:
    found, bound = partition.bottleneck_seconds, partition.lower_bound_seconds
    above = f", {found / bound - 1:.1%} above" if bound else ""
    proof = f"\nThe best of all {partition.proved_optimal}." if partition.proved_optimal else ""
    tied = "".join(
        f"\nTied: {tied.name} is kept by stage {tied.owner} and read by stages {', '.join(map(str, tied.users))}."
        for tied in partition.tied
    )
    return (
        f"Cut for least {partition.objective}: {partition.bottleneck} takes longest, {format_seconds(found)} for a microbatch"
        f"{above} the {format_seconds(bound)} that no cut can beat.{proof}{tied}"
    )


def _schedule(plan: Planned, step: Timeline) -> str:
    cell = max(len(str(action)) for _, _, action in plan.schedule.actions()) + 1
    promise = f"a step takes {format_seconds(step.makespan_seconds)}, {step.barrier_bubble:.1%} of it bubble"
    return f"Schedule {plan.schedule.name}: {promise} (predicted)\n{plan.schedule.timeline(max_slots=(WIDTH - 10) // cell)}"


def _ranks(plan: Planned, step: Timeline) -> str:
    rows = [
        [rank, _stages_of(plan, rank), format_seconds(busy), f"{busy / step.makespan_seconds:.0%}", format_bytes(peak)]
        for rank, (busy, peak) in enumerate(zip(step.busy_seconds, step.peak_bytes, strict=True))
    ]
    note = "Peak: parameters, their gradients, buffers, and what is stored for backward; without optimizer and temporaries."
    return f"{table(rows, ('rank', 'stages', 'busy', 'of step', 'peak memory'))}\n{note}"


def _stages_of(plan: Planned, rank: int) -> str:
    return ", ".join(str(stage) for stage in range(plan.schedule.n_stages) if rank in plan.schedule.ranks_of(stage))


def _save_points(plan: Planned) -> str:
    """One line for all values of the same fate, the largest first."""
    points = plan.compression.save_points
    if not points:
        return "Save points: none."
    groups: dict[tuple[str, str, str], list[SavePoint]] = {}
    for point in points:
        groups.setdefault((point.decision, point.format, point.reason), []).append(point)
    ordered = sorted(groups.items(), key=lambda item: -_raw_bytes(item[1]))
    rows = [[*fate, *_group_cells(members)] for fate, members in ordered[:MOST_GROUPS]]
    if rest := [point for _, members in ordered[MOST_GROUPS:] for point in members]:
        rows.append(["", "", "all others", *_group_cells(rest)])
    headers = ("decision", "format", "because", "values", "saves", "stores", "ratio", "largest")
    total = (
        f"{_count(len(points), 'value')}, {format_bytes(plan.compression.raw_bytes)} -> "
        f"{format_bytes(plan.compression.stored_bytes)} ({_ratio(points)})"
    )
    return f"Save points, for one microbatch: {total}\n{table(rows, headers)}"


def _group_cells(members: Sequence[SavePoint]) -> list[object]:
    largest = max(members, key=lambda point: point.raw_bytes)
    stored = sum(point.stored_bytes for point in members)
    return [len(members), format_bytes(_raw_bytes(members)), format_bytes(stored), _ratio(members), largest.name]


def _raw_bytes(points: Sequence[SavePoint]) -> int:
    return sum(point.raw_bytes for point in points)


def _ratio(points: Sequence[SavePoint]) -> str:
    raw = _raw_bytes(points)
    return f"{sum(point.stored_bytes for point in points) / raw:.1%}" if raw else ""


def _passes(plan: Planned) -> str:
    rows = [[record.text, record.n_nodes, format_seconds(record.seconds)] for record in plan.program.log]
    total = format_seconds(sum(record.seconds for record in plan.program.log))
    return f"Passes: {total}\n{table(rows, ('pass', 'nodes after', 'time'))}"


def _count(n: int, one: str, several: str = "") -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"
