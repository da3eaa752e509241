"""``print(plan)``: what was decided and what it promises, on a page."""

from collections.abc import Iterable, Sequence

from fxpipe.ir.compression import SavePoint
from fxpipe.ir.partition import Partition, StagePlan
from fxpipe.planned import Planned
from fxpipe.prediction import predicted_step
from fxpipe.printing import module_path, table
from fxpipe.simulate import Timeline
from fxpipe.units import format_bytes, format_seconds

WIDTH = 110
MOST_GROUPS = 11
MOST_RANKS = 16


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
    rows = [[stage.index, len(stage.nodes), span, *_stage_cells(plan, stage)] for stage, span in zip(plan.partition.stages, spans, strict=True)]
    headers = ("stage", "nodes", "modules", "parameters", "forward", "backward", "saves", "stores", "sends")
    return f"Stages, for one microbatch\n{table(rows, headers)}"


def _stage_cells(plan: Planned, stage: StagePlan) -> list[str]:
    points = plan.compression.of_stage(stage.index)
    n_bytes = (sum(p.raw_bytes for p in points), sum(p.stored_bytes for p in points), stage.sent_bytes)
    seconds = (stage.forward_seconds, stage.backward_seconds)
    return [format_bytes(stage.parameter_bytes), *map(format_seconds, seconds), *map(format_bytes, n_bytes)]


def _module_spans(plan: Planned) -> list[str]:
    """By stage, the first and last of the modules that lie in it alone, as large as can be: ``wte - h.1``."""
    paths = [_paths(plan, stage) for stage in plan.partition.stages]
    homes: dict[str, set[int]] = {}
    for index, found in enumerate(paths):
        for path in found:
            for module in _ancestors(path):
                homes.setdefault(module, set()).add(index)
    spans = []
    for found in paths:
        whole = [next((m for m in _ancestors(path) if len(homes[m]) == 1), path) for path in found]
        spans.append(" - ".join(dict.fromkeys((whole[0], whole[-1]))) if whole else "")
    return spans


def _paths(plan: Planned, stage: StagePlan) -> list[str]:
    """The modules that the stage's nodes were traced in, in program order, those of the whole model left out."""
    graph = plan.program.graph_module.get_submodule(f"stage_{stage.index}").graph
    own = set(stage.nodes)
    return [path for node in graph.nodes if node.name in own and (path := module_path(node))]


def _ancestors(path: str) -> list[str]:
    """``a.b.c`` -> a, a.b, a.b.c"""
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _cut(partition: Partition) -> str:
    found, bound = partition.bottleneck_seconds, partition.lower_bound_seconds
    above = f", {found / bound - 1:.1%} above" if bound else ""
    proof = f"\nThe best of all {partition.proved_optimal}." if partition.proved_optimal else ""
    tied = "".join(
        f"\nTied: {t.name} is kept by stage {t.owner} and read by stages {', '.join(map(str, t.users))}." for t in partition.tied
    )
    return (
        f"Cut for least {partition.objective}: {partition.bottleneck} takes longest, {format_seconds(found)} for a microbatch"
        f"{above} the {format_seconds(bound)} that no cut can beat.{proof}{tied}"
    )


def _schedule(plan: Planned, step: Timeline) -> str:
    cell = max(len(str(action)) for _, _, action in plan.schedule.actions()) + 1
    promise = f"a step takes {format_seconds(step.makespan_seconds)}, {step.barrier_bubble:.1%} of it idle"
    return f"Schedule {plan.schedule.name}: {promise} (predicted)\n{plan.schedule.timeline(max_slots=(WIDTH - 10) // cell)}"


def _ranks(plan: Planned, step: Timeline) -> str:
    rows = [
        [rank, _stages_of(plan, rank), format_seconds(busy), f"{busy / step.makespan_seconds:.0%}", format_bytes(peak)]
        for rank, (busy, peak) in enumerate(zip(step.busy_seconds, step.peak_bytes, strict=True))
    ]
    shown = rows if len(rows) <= MOST_RANKS else [*rows[: MOST_RANKS - 1], ["..."] * 4 + [""], rows[-1]]
    note = "Peak: parameters, their gradients, buffers, and what is stored for backward; without optimizer and temporaries."
    return f"{table(shown, ('rank', 'stages', 'busy', 'of step', 'peak memory'))}\n{note}"


def _stages_of(plan: Planned, rank: int) -> str:
    return ", ".join(str(stage) for stage, home in enumerate(plan.schedule.stage_to_rank) if home == rank)
