"""What a schedule takes, before it runs: an event simulation with the stages' times, links and bytes.

Ranks run their programs in order. A SEND or RECV only posts its message, as in torch's runtime; a transfer starts when
both ends have posted it and the messages before it, of the same pair of ranks and direction, have left; an action waits
for what it needs. In a compute-only schedule messages are posted at once: the bound that no lowering can beat.
Not counted: REDUCE_GRAD, UNSHARD and RESHARD take no time, and buffers of messages no memory.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxpipe.errors import OptionError, ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule


@dataclass(frozen=True)
class StageCost:
    """What one stage costs for one microbatch; ``static_bytes`` (parameters, gradients, optimizer) once.

    ``backward_seconds`` is a B: an I plus a W. ``weight_seconds`` is the part of it that is the W; None where unknown,
    and then no schedule with I and W can be simulated. ``in_flight_bytes`` are held from the start of F to the end of
    B; after an I only ``weight_in_flight_bytes`` of them are, to the end of W. ``reduce_seconds`` is a REDUCE_GRAD, which
    replicas of a stage do together.
    """

    forward_seconds: float
    backward_seconds: float
    weight_seconds: float | None = None
    in_flight_bytes: int = 0
    weight_in_flight_bytes: int = 0
    static_bytes: int = 0
    reduce_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"stage cost has {name} {value}; expected a finite number of at least 0")
        for part, whole in (("weight_seconds", "backward_seconds"), ("weight_in_flight_bytes", "in_flight_bytes")):
            if (getattr(self, part) or 0) > getattr(self, whole):
                raise OptionError(
                    f"stage cost has {part} {getattr(self, part)}, more than {whole}, of which it is a part"
                )

    def seconds(self, kind: Type) -> float:
        """How long an action of this kind keeps its rank busy."""
        if kind in (Type.I, Type.W) and self.weight_seconds is None:
            raise OptionError("the schedule has I and W, but the stage costs have no weight_seconds")
        weight = self.weight_seconds or 0
        times = {
            Type.F: self.forward_seconds,
            Type.B: self.backward_seconds,
            Type.W: weight,
            Type.REDUCE_GRAD: self.reduce_seconds,
        }
        return self.backward_seconds - weight if kind is Type.I else times.get(kind, 0)

    def held_bytes(self, kind: Type, forward_only: bool) -> tuple[int, int]:
        """Bytes that an action of this kind takes when it starts, and gives back when it ends."""
        later = self.weight_in_flight_bytes
        return {
            Type.F: (self.in_flight_bytes, self.in_flight_bytes if forward_only else 0),
            Type.B: (0, self.in_flight_bytes),
            Type.I: (0, self.in_flight_bytes - later),
            Type.W: (0, later),
        }.get(kind, (0, 0))


@dataclass(frozen=True)
class CutCost:
    """What one microbatch sends across a cut, and the link that it goes over (one each way)."""

    activation_bytes: int = 0
    gradient_bytes: int = 0
    bytes_per_second: float = math.inf
    latency_seconds: float = 0

    def __post_init__(self) -> None:
        for name in ("activation_bytes", "gradient_bytes", "latency_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"cut cost has {name} {getattr(self, name)}; expected a finite number of at least 0")
        if not self.bytes_per_second > 0:
            raise OptionError(f"cut cost has bytes_per_second {self.bytes_per_second}; expected more than 0")


@dataclass(frozen=True)
class StageTimes:
    """The costs of all stages, and of the cuts between them: ``cuts[s]`` lies between stages s and s + 1."""

    stages: tuple[StageCost, ...]
    cuts: tuple[CutCost, ...]

    def __post_init__(self) -> None:
        if len(self.cuts) != max(0, len(self.stages) - 1):
            raise OptionError(f"{len(self.stages)} stages have {len(self.cuts)} cuts; expected one less than stages")

    @classmethod
    def uniform(cls, n_stages: int, stage: StageCost, cut: CutCost | None = None) -> "StageTimes":
        """The same cost for every stage and every cut (None: cuts cost nothing)."""
        return cls((stage,) * n_stages, (cut or CutCost(),) * (n_stages - 1))


@dataclass(frozen=True)
class Event:
    """An action in time, in seconds from the start of the step; a SEND or RECV takes none, it only posts."""

    action: Action
    rank: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Transfer:
    """A message in time, under the name of its SEND (implied in a compute-only schedule)."""

    send: Action
    source_rank: int
    target_rank: int
    n_bytes: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """One simulated step: ``events[rank]`` in program order, all transfers, and each rank's peak of bytes."""

    name: str
    events: tuple[tuple[Event, ...], ...]
    transfers: tuple[Transfer, ...]
    peak_bytes: tuple[int, ...]

    def computes(self, rank: int) -> tuple[Event, ...]:
        """The events that keep ``rank`` busy."""
        return tuple(e for e in self.events[rank] if e.action.computation_type.is_compute)

    @property
    def makespan_seconds(self) -> float:
        """From the start of the step to the end of its last action."""
        return max((e.end_seconds for events in self.events for e in events), default=0)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """By rank, the time spent computing."""
        return tuple(sum(e.end_seconds - e.start_seconds for e in self.computes(r)) for r in range(len(self.events)))

    @property
    def span_seconds(self) -> tuple[float, ...]:
        """By rank, from the start of its first compute to the end of its last."""
        computes = (self.computes(rank) for rank in range(len(self.events)))
        return tuple(c[-1].end_seconds - c[0].start_seconds if c else 0 for c in computes)

    @property
    def barrier_bubble(self) -> float:
        """The idle fraction where all ranks start and end the step together: 1 - mean busy / makespan."""
        return self._idle_fraction(self.makespan_seconds)

    @property
    def span_bubble(self) -> float:
        """The idle fraction where a rank starts its next step as soon as it is done: 1 - mean busy / longest span.

        The measure in which zero-bubble schedules reach 0 (arXiv:2401.10241, section 5.3); anything that joins the
        ranks at the end of a step, such as a gradient norm, brings the other one back.
        """
        return self._idle_fraction(max(self.span_seconds))

    def _idle_fraction(self, whole_seconds: float) -> float:
        busy = sum(self.busy_seconds)
        return 1 - busy / (len(self.events) * whole_seconds) if whole_seconds else 0.0

    def to_chrome_trace(self) -> dict[str, Any]:
        """For chrome://tracing or Perfetto: a process per rank, with a row of computes and one per link out of it."""
        names = [(r, 0, "compute") for r in range(len(self.events))]
        links = sorted({(t.source_rank, t.target_rank) for t in self.transfers})
        rows = [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": name}}
            for rank, row, name in names + [(s, t + 1, f"to rank {t}") for s, t in links]
        ]
        ranks = [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
            for rank in range(len(self.events))
        ]
        computes = [_slice(e.action, rank, 0, e, {}) for rank in range(len(self.events)) for e in self.computes(rank)]
        transfers = [_slice(t.send, t.source_rank, t.target_rank + 1, t, {"bytes": t.n_bytes}) for t in self.transfers]
        return {"traceEvents": [*ranks, *rows, *computes, *transfers], "displayTimeUnit": "ms"}

    def text(self, width: int = 100) -> str:
        """Drawn to scale, ``width`` columns for the whole step: a line per rank, its share of busy time at the end."""
        whole = self.makespan_seconds
        margin = len(f"rank {len(self.events) - 1} |")
        lines = []
        for rank, busy in enumerate(self.busy_seconds):
            share = f"{busy / whole:4.0%} busy" if whole else ""
            lines.append(f"rank {rank}".ljust(margin - 1) + f"|{self._bar(rank, width)}| {share}".rstrip())
        lines.append(" " * margin + "0".ljust(width - 9) + f"{whole:8.4g} s")
        return "\n".join(lines)

    def _bar(self, rank: int, width: int) -> str:
        several = len({e.action.stage_index for e in self.computes(rank)}) > 1
        scale = width / self.makespan_seconds if self.makespan_seconds else 0
        bar = ["."] * width
        for event in self.computes(rank):
            first, last = round(event.start_seconds * scale), round(event.end_seconds * scale)
            label = str(event.action)[0 if several else len(str(event.action.stage_index)) :]
            fill = "-" if event.action.computation_type is Type.F else "="
            bar[first:last] = label[: last - first].ljust(last - first, fill)
        return "".join(bar)


def _slice(action: Action, process: int, row: int, at: Event | Transfer, details: Mapping[str, int]) -> dict[str, Any]:
    """A complete event of the trace format, which counts in microseconds."""
    start, duration = at.start_seconds * 1e6, (at.end_seconds - at.start_seconds) * 1e6
    kind = str(action.computation_type)
    return {"ph": "X", "name": str(action), "cat": kind, "pid": process, "tid": row, "ts": start, "dur": duration} | {
        "args": dict(details)
    }


def simulate(schedule: Schedule, costs: StageTimes) -> Timeline:
    """Runs ``schedule``, which ``verify_schedule`` has passed, on paper.

    Raises OptionError where the costs are of another number of stages or cannot price an action, and ScheduleError
    where the programs deadlock.
    """
    if len(costs.stages) != schedule.n_stages:
        raise OptionError(
            f"the costs are of {len(costs.stages)} stages, but schedule {schedule.name} has {schedule.n_stages}"
        )
    order = schedule.execution_order(schedule.predecessors())
    if len(order) < sum(map(len, schedule.programs)):
        raise ScheduleError(f"schedule {schedule.name} deadlocks and cannot be simulated; verify_schedule says where")
    run = _Run(schedule, costs)
    for rank, action in order:
        run.step(rank, action)
    events = tuple(map(tuple, run.events))
    return Timeline(schedule.name, events, tuple(run.transfers), _peak_bytes(schedule, costs))


class _Run:
    """The clocks of a simulation."""

    def __init__(self, schedule: Schedule, costs: StageTimes) -> None:
        self.schedule, self.costs = schedule, costs
        self.implied = schedule.is_compute_only
        self.needs = schedule.predecessors(lowered=True)
        self.events: list[list[Event]] = [[] for _ in schedule.programs]
        self.transfers: list[Transfer] = []
        self.ready: dict[Action, float] = {}  # when an action's result is there; a RECV's: when the message has arrived
        self.link_free: dict[tuple[int, int], float] = defaultdict(float)

    def step(self, rank: int, action: Action) -> None:
        """Runs the next action of ``rank``."""
        kind = action.computation_type
        now = self.events[rank][-1].end_seconds if self.events[rank] else 0.0
        needed = () if kind.is_receive else self.needs.get(action, ())
        start = max([now, *(self.ready[n] for n in needed)])
        end = start + self.costs.stages[action.stage_index].seconds(kind)
        self.events[rank].append(Event(action, rank, start, end))
        self.ready[action] = end
        if kind.is_receive:
            self._transfer(action.partner, max(end, self.ready[action.partner]))
        elif self.implied and (send := self.schedule.send_after(action)):
            self._transfer(send, end)

    def _transfer(self, send: Action, posted_seconds: float) -> None:
        """The message of ``send``, which both ends have posted by ``posted_seconds``."""
        receive = send.partner
        source, target = (self.schedule.homes(a)[0] for a in (send, receive))
        cut = self.costs.cuts[min(send.stage_index, receive.stage_index)]
        n_bytes = cut.activation_bytes if send.computation_type is Type.SEND_F else cut.gradient_bytes
        start = max(posted_seconds, self.link_free[source, target])
        self.link_free[source, target] = start + n_bytes / cut.bytes_per_second
        self.ready[receive] = self.link_free[source, target] + cut.latency_seconds
        self.transfers.append(Transfer(send, source, target, n_bytes, start, self.ready[receive]))


def _peak_bytes(schedule: Schedule, costs: StageTimes) -> tuple[int, ...]:
    """By rank, the most bytes at once; its program's order decides them, not the times."""
    forward_only = all(a.computation_type not in (Type.B, Type.I) for _, _, a in schedule.actions())
    held = [0] * schedule.n_ranks
    for stage, cost in enumerate(costs.stages):
        for rank in schedule.ranks_of(stage):
            held[rank] += cost.static_bytes
    peak = held.copy()
    for rank, _, action in schedule.actions():
        taken, given_back = costs.stages[action.stage_index].held_bytes(action.computation_type, forward_only)
        held[rank] += taken
        peak[rank] = max(peak[rank], held[rank])
        held[rank] -= given_back
    return tuple(peak)
