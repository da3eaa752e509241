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
_HEADER = re.compile(rf"({_NAME.pattern}) microbatches=([0-9]+) stage_to_rank=([0-9]+(?:,[0-9]+)*)", re.ASCII)
_JSON_KEYS = {"name", "n_microbatches", "stage_to_rank", "programs"}
_NEEDS_EARLIER_STAGE = frozenset({Type.RECV_F, Type.SEND_B})
_NEEDS_LATER_STAGE = frozenset({Type.SEND_F, Type.RECV_B})


@dataclass(frozen=True)
class Schedule:
    """The programs of all ranks for one step over ``n_microbatches``; stage s runs on rank ``stage_to_rank[s]``.

    The constructor checks that every field has its type, that every rank has a stage and a program and that no action
    names a stage, a microbatch or a neighbour that does not exist; it raises ScheduleError. Whether the programs
    together are complete and free of deadlock is for ``verify_schedule``.
    """

    name: str
    n_microbatches: int
    stage_to_rank: tuple[int, ...]
    programs: tuple[tuple[Action, ...], ...]

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
        if sorted(set(self.stage_to_rank)) != list(range(self.n_ranks)) or not self.stage_to_rank:
            raise ScheduleError(
                f"schedule {self.name}: the rank count does not match: there are {self.n_ranks} programs, "
                f"but stage_to_rank {self.stage_to_rank} uses ranks {sorted(set(self.stage_to_rank))}"
            )

    def _out_of_range(self, action: Action) -> str | None:
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
    def is_compute_only(self) -> bool:
        """Whether every action is one of F, I, W, B, so that communication is implied."""
        return all(a.computation_type.is_compute for program in self.programs for a in program)

    def compute_only(self) -> "Schedule":
        """The same schedule without anything but F, I, W and B."""
        programs = tuple(tuple(a for a in program if a.computation_type.is_compute) for program in self.programs)
        return Schedule(self.name, self.n_microbatches, self.stage_to_rank, programs)

    def crosses(self, cut: int) -> bool:
        """Whether stages ``cut`` and ``cut + 1`` are on different ranks, so that something must be sent."""
        return self.stage_to_rank[cut] != self.stage_to_rank[cut + 1]

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """Every action with its place: (rank, position in the rank's program, action)."""
        for rank, program in enumerate(self.programs):
            for position, action in enumerate(program):
                yield rank, position, action

    # What must be done before what.

    def predecessors(self) -> dict[Action, tuple[Action, ...]]:
        """For each action that a complete training step consists of, the actions that must be done before it.

        A backward is split in I and W where the programs have either. Sends, receives and REDUCE_GRADs are among them
        where the schedule is lowered, and then a stage's input and gradient come through them; UNSHARD and RESHARD are
        not among them.
        """
        present = {action for _, _, action in self.actions()}
        needs: dict[Action, tuple[Action, ...]] = {}
        lowered = not self.is_compute_only
        finished: list[list[Action]] = [[] for _ in range(self.n_stages)]
        for microbatch in range(self.n_microbatches):
            forwards = [Action(stage, Type.F, microbatch) for stage in range(self.n_stages)]
            backwards, weights = self._backwards(microbatch, present)
            way = self._way(forwards, backwards) if lowered else [*forwards, *reversed(backwards)]
            needs |= {way[0]: ()} | {after: (before,) for before, after in pairwise(way)}
            needs |= {b: tuple({f: None, **dict.fromkeys(needs[b])}) for f, b in zip(forwards, backwards, strict=True)}
            needs |= {w: (b,) for w, b in zip(weights, backwards, strict=True) if w is not b}
            for stage, weight in enumerate(weights):
                finished[stage].append(weight)
        if lowered:
            needs |= {Action(stage, Type.REDUCE_GRAD): tuple(done) for stage, done in enumerate(finished)}
        return needs

    def _backwards(self, microbatch: int, present: set[Action]) -> tuple[list[Action], list[Action]]:
        """By stage: the action that gives the gradient of the input, and the one that completes the backward."""
        backwards, weights = [], []
        for stage in range(self.n_stages):
            split = (Action(stage, Type.I, microbatch), Action(stage, Type.W, microbatch))
            whole = Action(stage, Type.B, microbatch)
            backward, weight = (whole, whole) if present.isdisjoint(split) else split
            backwards.append(backward)
            weights.append(weight)
        return backwards, weights

    def _way(self, forwards: list[Action], backwards: list[Action]) -> list[Action]:
        """A microbatch's way through the stages and back, with a SEND and a RECV wherever it changes rank."""
        microbatch = forwards[0].microbatch_index
        there, back = forwards[:1], backwards[:1]
        for cut in range(self.n_stages - 1):
            if self.crosses(cut):
                there += [Action(cut, Type.SEND_F, microbatch), Action(cut + 1, Type.RECV_F, microbatch)]
                back += [Action(cut, Type.RECV_B, microbatch), Action(cut + 1, Type.SEND_B, microbatch)]
            there.append(forwards[cut + 1])
            back.append(backwards[cut + 1])
        return there + back[::-1]

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
        name, n_microbatches, ranks = match.groups()
        return cls(name, int(n_microbatches), tuple(map(int, ranks.split(","))), tuple(programs))

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
            "programs": [[str(a) for a in program] for program in self.programs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Schedule":
        """Reads what ``to_dict`` writes; raises ScheduleError for a key or value that does not belong."""
        if not isinstance(data, Mapping) or set(data) != _JSON_KEYS:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ScheduleError(f"not a schedule: found {found}; expected the keys {sorted(_JSON_KEYS)}")
        if not all(isinstance(data[key], list) for key in ("stage_to_rank", "programs")):
            raise ScheduleError("not a schedule: stage_to_rank and programs must be lists")
        programs = tuple(_parse_actions(p, f"program {rank}") for rank, p in enumerate(data["programs"]))
        return cls(data["name"], data["n_microbatches"], tuple(data["stage_to_rank"]), programs)


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
