"""What people ask about a plan: what limits it, what more workers give, how it changes with the microbatch, why here.

Every answer is a plan made or evaluated anew: none is a guess from the plan in hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from fxpipe import units
from fxpipe.errors import OptionError, PartitionError, unknown
from fxpipe.ir.topology import Level, Topology
from fxpipe.planner.evaluate import Evaluation, evaluate
from fxpipe.planner.partition import Result
from fxpipe.planner.plan import Stage, Stages
from fxpipe.planner.profile import Profile
from fxpipe.tables import table

MICROBATCH_FACTORS = (0.25, 0.5, 2.0, 4.0)
MICROBATCH_TEXT = "The time for as much work as one microbatch is now:"
UNLIMITED = 1e30  # bytes per second
MOST_SWEPT = 16
ALIKE = 0.05  # percent


@dataclass(frozen=True)
class Answer:
    """The best plan of a changed problem, or why there is none."""

    change: str
    n_devices: int
    result: Result | None
    refusal: str = ""

    @property
    def seconds(self) -> float | None:
        """The bottleneck."""
        return None if self.result is None else self.result.bottleneck_seconds

    @property
    def replicas(self) -> str:
        """Of each stage: ``4-1-1``."""
        return "" if self.result is None else "-".join(str(len(stage.devices)) for stage in self.result.stages)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        limit = None if self.result is None else self.result.evaluation.bottleneck
        return {
            "change": self.change,
            "n_devices": self.n_devices,
            "bottleneck_seconds": self.seconds,
            "replicas": self.replicas,
            "bottleneck": limit,
            "refusal": self.refusal,
        }


def what_would_help(result: Result) -> list[Answer]:
    """The plan again with more workers, with links and with memory without a limit, and with each stage on one device."""
    top = result.topology
    *inner, outer = top.levels
    size = prod(level.size for level in inner)
    what = "one more worker" if not inner else f"one more group of {size} workers"
    more = replace(top, levels=(*inner, replace(outer, size=outer.size + 1)))
    twice = replace(top, levels=(*inner, replace(outer, size=2 * outer.size)))
    free = replace(top, levels=tuple(Level(level.size, UNLIMITED) for level in top.levels))
    changes = [(what, more), ("twice the workers", twice), ("links without a limit", free)]
    if top.memory_bytes is not None:
        changes.append(("memory without a limit", replace(top, memory_bytes=None)))
    return [_answer(change, result, result.profile, topology) for change, topology in changes]


def microbatch_sizes(result: Result) -> list[Answer]:
    """The plan again for smaller and larger microbatches: times and activations in proportion, parameters as they are."""
    return [
        _answer(f"microbatch x {factor:g}", result, scaled(result.profile, factor), result.topology)
        for factor in MICROBATCH_FACTORS
    ]


def scaled(profile: Profile, factor: float) -> Profile:
    """The profile of a microbatch ``factor`` times as large."""
    return replace(
        profile,
        forward_seconds=profile.forward_seconds * factor,
        backward_seconds=profile.backward_seconds * factor,
        output_bytes=profile.output_bytes * factor,
    )


def sweep(result: Result) -> list[Answer]:
    """The best plan for growing parts of the topology, from one device to all."""
    return [
        Answer(f"{part.n_devices} workers", part.n_devices, result)
        if part.n_devices == result.topology.n_devices
        else _answer(f"{part.n_devices} workers", result, result.profile, part)
        for part in _parts(result.topology)
    ]


def _parts(topology: Topology) -> list[Topology]:
    parts: list[Topology] = []
    for k, level in enumerate(topology.levels):
        for size in _sizes(level.size, first=2 if k else 1):
            parts.append(replace(topology, levels=(*topology.levels[:k], replace(level, size=size))))
    return parts


def _sizes(size: int, first: int) -> list[int]:
    """1, 2, 4 ... up to ``size``, itself included; all, where they are few."""
    if size <= MOST_SWEPT:
        return list(range(first, size + 1))
    powers = [2**k for k in range(size.bit_length()) if first <= 2**k < size]
    return [*powers, size]


def _answer(change: str, result: Result, profile: Profile, topology: Topology) -> Answer:
    try:
        return Answer(change, topology.n_devices, result.again(profile, topology))
    except PartitionError as error:
        return Answer(change, topology.n_devices, None, str(error))


@dataclass(frozen=True)
class Move:
    """A node moved over a cut, with what must go with it, and what the plan takes then."""

    node: str
    n_nodes: int
    stage: int
    to: int
    evaluation: Evaluation | None  # None where its stage would be empty

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        found = self.evaluation
        return {
            "node": self.node,
            "n_nodes": self.n_nodes,
            "stage": self.stage,
            "to": self.to,
            "bottleneck_seconds": None if found is None else found.bottleneck_seconds,
            "bottleneck": None if found is None else found.bottleneck,
        }


def moves(result: Result) -> list[Move]:
    """For every cut, the last node before it moved to the stage after, and the first after it to the stage before."""
    found = []
    for s in range(len(result.stages) - 1):
        found.append(_move(result, result.stages[s].nodes[-1], s, s + 1))
        found.append(_move(result, result.stages[s + 1].nodes[0], s + 1, s))
    return found


def moves_of(result: Result, node: str) -> list[Move]:
    """One node, by id or name, moved to the stage before and to the stage after its own.

    Raises:
        OptionError: no such node, or several of that name.
    """
    profile = result.profile
    places = [i for i, id in enumerate(profile.ids) if str(id) == node]
    places = places or [i for i, name in enumerate(profile.names) if name == node]
    if not places:
        raise OptionError(unknown("node", node, [str(id) for id in profile.ids[:16]]))
    if len(places) > 1:
        ids = ", ".join(str(profile.ids[i]) for i in places[:8])
        raise OptionError(f"{len(places)} nodes are named {node!r}; say which by its id: {ids}")
    s = next(s for s, stage in enumerate(result.stages) if places[0] in stage.nodes)
    return [_move(result, places[0], s, to) for to in (s - 1, s + 1) if 0 <= to < len(result.stages)]


def _move(result: Result, node: int, s: int, to: int) -> Move:
    profile, stage = result.profile, result.stages[s]
    together = {node}
    for source, target in _edges_inside(profile, stage, forward=to > s):
        if source in together:
            together.add(target)
    kept = tuple(n for n in stage.nodes if n not in together)
    moved = tuple(n for n in stage.nodes if n in together)
    name = _named(profile, node)
    if not kept:
        return Move(name, len(moved), s, to, None)
    stages = list(result.stages)
    stages[s] = replace(stage, nodes=kept)
    stages[to] = replace(stages[to], nodes=stages[to].nodes + moved if to < s else moved + stages[to].nodes)
    plan: Stages = tuple(stages)
    return Move(name, len(moved), s, to, evaluate(profile, result.topology, plan, result.problem.model))


def _named(profile: Profile, node: int) -> str:
    """``layer (id)``, or what both are."""
    name, id = profile.names[node], str(profile.ids[node])
    return name if name == id else f"{name} ({id})"


def _edges_inside(profile: Profile, stage: Stage, forward: bool) -> Iterator[tuple[int, int]]:
    """The edges within the stage in an order in which what depends on a node is found in one pass; turned where backward."""
    place = {node: i for i, node in enumerate(stage.nodes)}
    edges = [(a, b) for a, b in profile.edges.tolist() if a in place and b in place]
    if forward:
        yield from sorted(edges, key=lambda edge: place[edge[0]])
    else:
        yield from sorted(((b, a) for a, b in edges), key=lambda edge: -place[edge[0]])


def explanation(result: Result, node: str = "") -> str:
    """The page under a plan's own: what limits it, what would help, other microbatches, why the cuts are where they are."""
    here = moves_of(result, node) if node else moves(result)
    parts = [
        f"What limits it\n\n{limit_text(result)}",
        f"What would help\n\n{answers_table(result, what_would_help(result))}",
        f"Other microbatches\n\n{MICROBATCH_TEXT}\n\n{microbatch_table(result, microbatch_sizes(result))}",
    ]
    if here:
        what = "Moved" if node else "The nodes beside each cut, moved over it"
        rows = moves_table(result, here)
        parts.append(f"Why {node or 'the cuts are'} here\n\n{what} with all that must go along:\n\n{rows}")
    return "\n\n".join(parts)


def limit_text(result: Result) -> str:
    """One sentence: compute, a link, or one node that no cut can part."""
    found = result.evaluation
    s = max(range(len(found.stages)), key=lambda i: found.stages[i].seconds)
    stage, row = result.stages[s], found.stages[s]
    heaviest = max(stage.nodes, key=lambda n: result.profile.compute_seconds[n])
    share = float(result.profile.compute_seconds[heaviest]) / (row.compute_seconds or 1.0)
    text = f"Stage {s}: its {row.limit} takes {units.format_seconds(row.seconds)} for each microbatch."
    if row.limit == "compute":
        text += f" Its heaviest node is {_named(result.profile, heaviest)}, {100 * share:.0f} % of the stage."
        if len(stage.nodes) == 1:
            text += " It is alone there: no cut makes this stage faster, only more replicas or a smaller node do."
    elif row.limit == "all-reduce":
        text += f" {units.format_bytes(row.parameter_bytes)} of parameters are summed over {row.n_replicas} replicas."
    return text


def answers_table(result: Result, answers: list[Answer]) -> str:
    """A line for each change: its slowest stage, how many times as fast, where the devices are, what limits it then."""
    rows = [
        [a.change, a.n_devices, *_times(result.bottleneck_seconds, a.seconds), a.replicas, _limit(a)] for a in answers
    ]
    return table(rows, ["change", "workers", "slowest", "as fast", "replicas", "limit"])


def sweep_table(answers: list[Answer]) -> str:
    """A line for each number of workers: the slowest stage, the speed-up over the first, and its share of the workers."""
    first = next((a for a in answers if a.seconds is not None), None)
    rows = []
    for a in answers:
        if first is None or first.seconds is None or a.seconds is None:
            rows.append([a.n_devices, "none", "", "", "", a.refusal])
            continue
        times = first.seconds / a.seconds
        share = f"{100 * times * first.n_devices / a.n_devices:.0f} %"
        rows.append([a.n_devices, units.format_seconds(a.seconds), f"{times:.2f} x", share, a.replicas, _limit(a)])
    return table(rows, ["workers", "slowest", "as fast", "efficiency", "replicas", "limit"])


def microbatch_table(result: Result, answers: list[Answer]) -> str:
    """As ``answers_table``, with the time for the work of one microbatch of today's size."""
    rows = []
    for factor, a in zip(MICROBATCH_FACTORS, answers, strict=True):
        same_work = None if a.seconds is None else a.seconds / factor
        rows.append([a.change, *_times(result.bottleneck_seconds, same_work), a.replicas, _limit(a)])
    return table(rows, ["change", "slowest", "as fast", "replicas", "limit"])


def moves_table(result: Result, found: list[Move]) -> str:
    """A line for each node that could be elsewhere."""
    rows = []
    for move in found:
        where = f"{move.stage} -> {move.to}"
        if move.evaluation is None:
            rows.append([move.node, move.n_nodes, where, "", "its stage would be empty"])
            continue
        seconds = move.evaluation.bottleneck_seconds
        slower = 100 * (seconds / result.bottleneck_seconds - 1)
        rows.append(
            [
                move.node,
                move.n_nodes,
                where,
                f"{units.format_seconds(seconds)} ({f'{slower:+.1f} %' if slower > ALIKE else 'as fast'})",
                move.evaluation.bottleneck,
            ]
        )
    return table(rows, ["node", "nodes moved", "stage", "slowest then", "limit then"])


def _times(before: float, after: float | None) -> tuple[str, str]:
    return ("none", "") if after is None else (units.format_seconds(after), f"{before / after:.2f} x")


def _limit(answer: Answer) -> str:
    return answer.refusal if answer.result is None else answer.result.evaluation.bottleneck


def answers_dict(result: Result, node: str = "") -> dict[str, object]:
    """What ``explanation`` shows, as plain data for JSON."""
    return {
        "what_would_help": [a.to_dict() for a in what_would_help(result)],
        "microbatch_sizes": [a.to_dict() for a in microbatch_sizes(result)],
        "moves": [m.to_dict() for m in (moves_of(result, node) if node else moves(result))],
    }
