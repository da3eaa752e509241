"""A schedule as data: for each rank, the actions that it runs, in order. See ``ir/action.py`` for one action.

A schedule is *compute-only* (F, I, W, B: what depends on what is implied) or *lowered* (with the sends, receives and
REDUCE_GRADs that a runtime carries out). Both spell the same in text, in torch's CSV and in JSON.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fxpipe.errors import ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_NUMBERS = "[0-9]+(?:,[0-9]+)*"
_HEADER = re.compile(
    rf"({_NAME.pattern}) microbatches=([0-9]+) stage_to_rank=({_NUMBERS})(?: replicas=({_NUMBERS}))?", re.ASCII
)
_JSON_KEYS = {"name", "n_microbatches", "stage_to_rank", "replicas", "programs"}
_NEEDS_EARLIER_STAGE = frozenset({Type.RECV_F, Type.SEND_B})
_NEEDS_LATER_STAGE = frozenset({Type.SEND_F, Type.RECV_B})


@dataclass(frozen=True)
class Schedule:
    """The programs of all ranks for one step over ``n_microbatches``; stage s runs on rank ``stage_to_rank[s]``.

    A stage of ``replicas[s]`` replicas (one each if left out) runs on so many ranks from there on, which no other stage has;
    they take its microbatches in turn, microbatch m on the (m mod replicas)-th.

    The constructor checks that every field has its type, that every rank has a stage and a program and that no action
    names a stage, a microbatch or a neighbour that does not exist; it raises ScheduleError. Whether the programs
    together are complete and free of deadlock is for ``verify_schedule``.
    """

    name: str
    n_microbatches: int
    stage_to_rank: tuple[int, ...]
    programs: tuple[tuple[Action, ...], ...]
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ScheduleError(f"schedule has name {self.name!r}; expected letters, digits and any of _ . + -")
        if type(self.n_microbatches) is not int or self.n_microbatches < 1:
            raise ScheduleError(f"schedule {self.name}: n_microbatches is {self.n_microbatches!r}; expected at least 1")
        if not isinstance(self.programs, tuple) or not all(isinstance(p, tuple) for p in self.programs):
            raise ScheduleError(f"schedule {self.name}: programs are not a tuple of tuples of Action")
        self._check_ranks()
        for rank, program in enumerate(self.programs):
            for position, action in enumerate(program):
                if problem := self._out_of_range(action):
                    raise self.fault(rank, position, problem)

    def _check_ranks(self) -> None:
        if not isinstance(self.stage_to_rank, tuple) or not all(type(r) is int for r in self.stage_to_rank):
            raise ScheduleError(f"schedule {self.name}: stage_to_rank is {self.stage_to_rank!r}, not a tuple of ranks")
        self._check_replicas()
        used = sorted({rank for stage in range(self.n_stages) for rank in self.ranks_of(stage)})
        if used != list(range(self.n_ranks)) or not self.stage_to_rank:
            replicated = f" with replicas {self.replicas}" if self.is_replicated else ""
            raise ScheduleError(
                f"schedule {self.name}: the rank count does not match: there are {self.n_ranks} programs, "
                f"but stage_to_rank {self.stage_to_rank}{replicated} uses ranks {used}"
            )

    def _check_replicas(self) -> None:
        if not self.replicas:
            object.__setattr__(self, "replicas", (1,) * self.n_stages)
        fits = isinstance(self.replicas, tuple) and all(type(r) is int and r > 0 for r in self.replicas)
        if not fits or len(self.replicas) != self.n_stages:
            raise ScheduleError(
                f"schedule {self.name}: replicas is {self.replicas!r}; expected a number for each of {self.n_stages} stages"
            )
        for stage, n_replicas in enumerate(self.replicas):
            others = {r for other in range(self.n_stages) if other != stage for r in self.ranks_of(other)}
            if n_replicas > self.n_microbatches:
                raise ScheduleError(
                    f"schedule {self.name}: stage {stage} has {n_replicas} replicas for {self.n_microbatches} microbatches; "
                    "each needs one at least"
                )
            if n_replicas > 1 and not others.isdisjoint(self.ranks_of(stage)):
                shared = sorted(others.intersection(self.ranks_of(stage)))
                raise ScheduleError(
                    f"schedule {self.name}: stage {stage} is replicated, but shares ranks {shared} with others"
                )

    def _out_of_range(self, action: object) -> str | None:
        if not isinstance(action, Action):
            return f"{action!r} is not an Action"
        if action.stage_index >= self.n_stages:
            return f"{action} names stage {action.stage_index}, but the last stage is {self.n_stages - 1}"
        if action.microbatch_index is not None and action.microbatch_index >= self.n_microbatches:
            return f"{action} names microbatch {action.microbatch_index}, but the last is {self.n_microbatches - 1}"
        if action.stage_index == 0 and action.computation_type in _NEEDS_EARLIER_STAGE:
            return f"{action} has no partner: no stage comes before stage 0"
        if action.stage_index == self.n_stages - 1 and action.computation_type in _NEEDS_LATER_STAGE:
            return f"{action} has no partner: no stage comes after stage {action.stage_index}"
        return None

    @property
    def n_ranks(self) -> int:
        """How many ranks, each with one program."""
        return len(self.programs)

    @property
    def n_stages(self) -> int:
        """How many stages; a rank may hold several."""
        return len(self.stage_to_rank)

    @property
    def is_replicated(self) -> bool:
        """Whether any stage has more than one replica."""
        return any(r > 1 for r in self.replicas)

    def ranks_of(self, stage: int) -> range:
        """The ranks of the stage's replicas."""
        return range(self.stage_to_rank[stage], self.stage_to_rank[stage] + self.replicas[stage])

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs ``microbatch`` on ``stage``."""
        return self.ranks_of(stage)[microbatch % self.replicas[stage]]

    def homes(self, action: Action) -> Sequence[int]:
        """The rank that ``action`` belongs on; what serves a whole stage belongs on those of all its replicas."""
        if action.microbatch_index is None:
            return self.ranks_of(action.stage_index)
        return (self.rank_of(action.stage_index, action.microbatch_index),)

    @property
    def is_compute_only(self) -> bool:
        """Whether every action is one of F, I, W, B, so that communication is implied."""
        return all(a.computation_type.is_compute for program in self.programs for a in program)

    def compute_only(self) -> "Schedule":
        """The same schedule without anything but F, I, W and B."""
        programs = tuple(tuple(a for a in program if a.computation_type.is_compute) for program in self.programs)
        return Schedule(self.name, self.n_microbatches, self.stage_to_rank, programs, self.replicas)

    def crosses(self, cut: int, microbatch: int) -> bool:
        """Whether stages ``cut`` and ``cut + 1`` run the microbatch on different ranks, so that something must be sent."""
        return self.rank_of(cut, microbatch) != self.rank_of(cut + 1, microbatch)

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """Every action with its place: (rank, position in the rank's program, action)."""
        for rank, program in enumerate(self.programs):
            for position, action in enumerate(program):
                yield rank, position, action

    # What must be done before what.

    def send_after(self, action: Action) -> Action | None:
        """The SEND that takes what ``action`` computes to another rank; None if nothing has to go there."""
        stage, kind, microbatch = action.stage_index, action.computation_type, action.microbatch_index
        if microbatch is None:
            return None
        if kind is Type.F and stage + 1 < self.n_stages and self.crosses(stage, microbatch):
            return Action(stage, Type.SEND_F, microbatch)
        if kind in (Type.B, Type.I) and stage > 0 and self.crosses(stage - 1, microbatch):
            return Action(stage, Type.SEND_B, microbatch)
        return None

    def predecessors(self, lowered: bool | None = None) -> dict[Action, tuple[Action, ...]]:
        """For each action that a complete training step consists of, the actions that must be done before it.

        A backward is split in I and W where the programs have either. Where ``lowered`` (None: where the schedule is),
        sends, receives and REDUCE_GRADs are among them, and what comes from another rank comes through its RECV;
        UNSHARD and RESHARD are never among them.
        """
        lowered = not self.is_compute_only if lowered is None else lowered
        present = {action for _, _, action in self.actions()}
        needs: dict[Action, tuple[Action, ...]] = {}
        finishing: dict[int, list[Action]] = {stage: [] for stage in range(self.n_stages)}
        for microbatch in range(self.n_microbatches):
            forwards = [Action(stage, Type.F, microbatch) for stage in range(self.n_stages)]
            backwards = [_backward(f, present) for f in forwards]
            way = self._way([*forwards, *(b[0] for b in reversed(backwards))], lowered)
            needs |= {way[0]: ()} | {after: (before,) for before, after in pairwise(way)}
            for forward, (first, *rest) in zip(forwards, backwards, strict=True):
                needs[first] = (forward, *(n for n in needs[first] if n != forward))
                needs |= dict.fromkeys(rest, (first,))
                finishing[forward.stage_index] += rest or [first]
        if lowered:
            needs |= {Action(stage, Type.REDUCE_GRAD): tuple(done) for stage, done in finishing.items()}
        return needs

    def _way(self, computes: list[Action], lowered: bool) -> list[Action]:
        """A microbatch's way through the stages and back, with a SEND and a RECV wherever it changes rank."""
        way = []
        for action in computes:
            send = self.send_after(action) if lowered else None
            way += [action] if send is None else [action, send, send.partner]
        return way

    def execution_order(self, predecessors: Mapping[Action, Sequence[Action]]) -> list[tuple[int, Action]]:
        """All (rank, action) in one order that each rank's program and ``predecessors`` allow, ranks taking turns.

        An action without an entry has no predecessors. Stops where no rank can go on, so that a list shorter than the
        programs means a deadlock.
        """
        done: set[Action] = set()
        order: list[tuple[int, Action]] = []
        heads = [0] * self.n_ranks
        before = -1
        while before < len(order):
            before = len(order)
            for rank, program in enumerate(self.programs):
                if heads[rank] < len(program) and done.issuperset(predecessors.get(program[heads[rank]], ())):
                    done.add(program[heads[rank]])
                    order.append((rank, program[heads[rank]]))
                    heads[rank] += 1
        return order

    # Pictures.

    def grid(self) -> tuple[tuple[Action | None, ...], ...]:
        """Row per rank, cell per time slot, every F, I, W and B taking one slot and messages none; None is idle.

        Raises ScheduleError where the programs deadlock.
        """
        compute = self.compute_only()
        needs = compute.predecessors()
        order = compute.execution_order(needs)
        if len(order) < sum(map(len, compute.programs)):
            raise ScheduleError(f"schedule {self.name} deadlocks, so it has no grid; verify_schedule says where")
        slots: dict[Action, int] = {}
        rows: list[list[Action | None]] = [[] for _ in compute.programs]
        for rank, action in order:
            slots[action] = max([len(rows[rank]), *(slots[p] + 1 for p in needs.get(action, ()))])
            rows[rank] += [None] * (slots[action] - len(rows[rank])) + [action]
        width = max(map(len, rows))
        return tuple(tuple(row + [None] * (width - len(row))) for row in rows)

    def timeline(self, max_slots: int | None = None) -> str:
        """The grid as text, a line per rank, idle slots as dots; the middle is left out beyond ``max_slots``."""
        columns = [[str(cell or ".") for cell in column] for column in zip(*self.grid(), strict=True)]
        left_out = 0 if max_slots is None else max(0, len(columns) - max(2, max_slots))
        note = ""
        if left_out:
            first = (len(columns) - left_out + 1) // 2
            columns[first : first + left_out] = [["~"] * self.n_ranks]
            note = f"\n~ {left_out} slots not shown"
        widths = [max(map(len, column)) for column in columns]
        lines = [
            f"rank {rank:<{len(str(self.n_ranks - 1))}} | "
            + " ".join(column[rank].ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()
            for rank in range(self.n_ranks)
        ]
        return "\n".join(lines) + note

    def excerpt(self, rank: int, position: int, radius: int = 4) -> str:
        """The program of ``rank`` around ``position``, which is marked; one past the last action is the end."""
        cells = [*map(str, self.programs[rank]), "(end)"]
        first, last = max(0, position - radius), min(len(cells), position + radius + 1)
        head = f"  rank {rank}: " + ".. " * (first > 0) + "".join(f"{cell} " for cell in cells[first:position])
        tail = " ".join(cells[position:last]) + " .." * (last < len(cells))
        return f"{head}{tail}\n{' ' * len(head)}{'^' * len(cells[position])}"

    def fault(self, rank: int, position: int, problem: str) -> ScheduleError:
        """The error that reports ``problem`` with its place and the program around it."""
        where = f"schedule {self.name}: rank {rank}, position {position}"
        return ScheduleError(f"{where}: {problem}\n{self.excerpt(rank, position)}")

    # Text, CSV and JSON, both ways.

    def __str__(self) -> str:
        ranks = ",".join(map(str, self.stage_to_rank))
        header = f"{self.name} microbatches={self.n_microbatches} stage_to_rank={ranks}"
        if self.is_replicated:
            header += f" replicas={','.join(map(str, self.replicas))}"
        lines = (" ".join([f"rank {rank}:", *map(str, program)]) for rank, program in enumerate(self.programs))
        return "\n".join([header, *lines])

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads what ``str`` writes; raises ScheduleError with the line that is not so."""
        header, *lines = text.removesuffix("\n").split("\n")
        match = _HEADER.fullmatch(header)
        if match is None:
            raise ScheduleError(
                f"not a schedule: it begins {header[:60]!r}; expected e.g. '1f1b microbatches=4 stage_to_rank=0,1'"
            )
        programs = []
        for rank, line in enumerate(lines):
            prefix = f"rank {rank}:"
            if not line.startswith(prefix):
                raise ScheduleError(f"line {rank + 2} of a schedule begins {line[:20]!r}; expected {prefix!r}")
            programs.append(_parse_actions(line.split(" ")[2:], f"line {rank + 2}"))
        name, n_microbatches, ranks, replicas = match.groups()
        stage_to_rank, wide = (tuple(map(int, n.split(","))) if n else () for n in (ranks, replicas))
        return cls(name, int(n_microbatches), stage_to_rank, tuple(programs), wide)

    def to_csv(self) -> str:
        """torch's CSV, byte for byte as ``_PipelineScheduleRuntime._dump_csv`` writes it: a row per rank, no header."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows(self.programs)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, name: str = "csv") -> "Schedule":
        """Reads torch's CSV (``compute_only``, whose empty cells are dropped, or ``compute_comms``).

        Stages, ranks and the number of microbatches are read off the actions. Raises ScheduleError for a cell that is
        no action, for a stage on two ranks, and for a stage that is missing.
        """
        try:
            rows = [[cell for cell in row if cell] for row in csv.reader(io.StringIO(text, newline=""))]
        except csv.Error as e:
            raise ScheduleError(f"not a CSV: {e}") from e
        programs = tuple(_parse_actions(row, f"row {rank + 1} of the CSV") for rank, row in enumerate(rows))
        placed: dict[int, int] = {}
        for rank, program in enumerate(programs):
            for action in program:
                if (home := placed.setdefault(action.stage_index, rank)) != rank:
                    raise ScheduleError(f"{action} is on rank {rank} of the CSV, but its stage is also on rank {home}")
        if sorted(placed) != list(range(len(placed))):
            raise ScheduleError(f"the CSV has stages {sorted(placed)}; expected all from 0 up")
        microbatches = (a.microbatch_index for program in programs for a in program)
        n_microbatches = 1 + max((m for m in microbatches if m is not None), default=0)
        return cls(name, n_microbatches, tuple(placed[stage] for stage in sorted(placed)), programs)

    def to_dict(self) -> dict[str, Any]:
        """The schedule in JSON's types; ``programs`` is a list of lists such as ``["0F0", "0B0"]``."""
        return {
            "name": self.name,
            "n_microbatches": self.n_microbatches,
            "stage_to_rank": list(self.stage_to_rank),
            "replicas": list(self.replicas),
            "programs": [[str(a) for a in program] for program in self.programs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Schedule":
        """Reads what ``to_dict`` writes; raises ScheduleError for a key or value that does not belong."""
        if not isinstance(data, Mapping) or set(data) != _JSON_KEYS:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ScheduleError(f"not a schedule: found {found}; expected the keys {sorted(_JSON_KEYS)}")
        if not all(isinstance(data[key], list) for key in ("stage_to_rank", "replicas", "programs")):
            raise ScheduleError("not a schedule: stage_to_rank, replicas and programs must be lists")
        programs = tuple(_parse_actions(p, f"program {rank}") for rank, p in enumerate(data["programs"]))
        ranks, replicas = tuple(data["stage_to_rank"]), tuple(data["replicas"])
        return cls(data["name"], data["n_microbatches"], ranks, programs, replicas)


def _backward(forward: Action, present: set[Action]) -> tuple[Action, ...]:
    """The backward that belongs to ``forward``: I and W where either is present, else B."""
    stage, microbatch = forward.stage_index, forward.microbatch_index
    split = Action(stage, Type.I, microbatch), Action(stage, Type.W, microbatch)
    return (Action(stage, Type.B, microbatch),) if present.isdisjoint(split) else split


def _parse_actions(cells: Any, where: str) -> tuple[Action, ...]:
    if not isinstance(cells, list) or not all(isinstance(cell, str) for cell in cells):
        raise ScheduleError(f"{where}: {cells!r:.60} is not a list of actions in text")
    actions = []
    for k, cell in enumerate(cells):
        try:
            actions.append(Action.parse(cell))
        except ScheduleError as e:
            raise ScheduleError(f"{where}, action {k}: {e}") from None
    return tuple(actions)
