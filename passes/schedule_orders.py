"""The orders in which ranks run their microbatches, and the lowering of such an order to sends and receives.

Every order is a function of sizes that returns a compute-only Schedule; ``add_communication`` lowers any of them.
Example of an order, two stages and three microbatches of 1F1B, one line per rank::

    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from types import MappingProxyType

from fxpipe.errors import OptionError, ScheduleError, unknown
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule


def gpipe(n_stages: int, n_microbatches: int, stage_to_rank: tuple[int, ...] | None = None) -> Schedule:
    """All forwards, then all backwards (GPipe, arXiv:1811.06965); every microbatch is in flight at the turning point.

    A rank with several stages runs all microbatches through one stage before the next, and back in reverse.
    ``stage_to_rank`` None: one stage per rank. Raises OptionError for a size below 1.
    """
    return _by_stage("gpipe", n_stages, n_microbatches, stage_to_rank, (Type.F, Type.B))


def forward_only(n_stages: int, n_microbatches: int, stage_to_rank: tuple[int, ...] | None = None) -> Schedule:
    """The forwards of ``gpipe`` alone, for evaluation. Raises OptionError for a size below 1."""
    return _by_stage("forward-only", n_stages, n_microbatches, stage_to_rank, (Type.F,))


def one_f_one_b(n_stages: int, n_microbatches: int, replicas: tuple[int, ...] = ()) -> Schedule:
    """One forward, one backward in turn, one stage per rank: at most min(m, p - s) microbatches in flight on stage s.

    Warm-up: p - 1 - s forwards (fewer where there are fewer microbatches), so that the first backward arrives just when
    they are done. Steady state: a forward, then the oldest backward. Cool-down: the backwards that are left.
    The order of PipeDream (US12056604B2, with the flush of synchronous training) and of Megatron-LM's
    ``forward_backward_pipelining_without_interleaving``.

    With ``replicas``, one number for each stage, its replicas take the microbatches in turn (PipeDream's 1F1B-RR): stage s
    starts with ceil(ranks of later stages / its replicas) forwards on each of its ranks.
    Raises OptionError for a size below 1, ScheduleError for replicas that do not fit.
    """
    _check_sizes(n_stages, n_microbatches)

    def program(stage: int, mine: range, n_later: int, n_replicas: int) -> tuple[Action, ...]:
        forwards = [Action(stage, Type.F, m) for m in mine]
        backwards = [Action(stage, Type.B, m) for m in mine]
        n_warm_up = min(len(mine), -(-n_later // n_replicas))
        n_steady = len(mine) - n_warm_up
        steady = [a for pair in zip(forwards[n_warm_up:], backwards[:n_steady], strict=True) for a in pair]
        return (*forwards[:n_warm_up], *steady, *backwards[n_steady:])

    wide = replicas or (1,) * n_stages
    programs = [
        program(stage, range(k, n_microbatches, n), sum(wide[stage + 1 :]), n)
        for stage, n in enumerate(wide)
        for k in range(n)
    ]
    return Schedule("1f1b", n_microbatches, _first_ranks(wide), tuple(programs), wide)


def replicated_gpipe(n_stages: int, n_microbatches: int, replicas: tuple[int, ...] = ()) -> Schedule:
    """``gpipe`` with ``replicas`` of each stage, which take the microbatches in turn."""
    whole, wide = gpipe(n_stages, n_microbatches), replicas or (1,) * n_stages
    programs = [
        tuple(a for a in whole.programs[stage] if a.microbatch_index in range(k, n_microbatches, n))
        for stage, n in enumerate(wide)
        for k in range(n)
    ]
    return Schedule("gpipe", n_microbatches, _first_ranks(wide), tuple(programs), wide)


ORDERS: Mapping[str, Callable[[int, int, tuple[int, ...]], Schedule]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": replicated_gpipe}
)


def order(name: str, n_stages: int, n_microbatches: int, replicas: tuple[int, ...] = ()) -> Schedule:
    """The training order called ``name``, each stage on a rank or on ``replicas`` ranks of its own.

    Raises OptionError that lists the known names, ScheduleError for replicas that do not fit.
    """
    if name not in ORDERS:
        raise OptionError(unknown("schedule", name, ORDERS))
    return ORDERS[name](n_stages, n_microbatches, replicas)


def _first_ranks(replicas: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(replicas[:-1], initial=0))


def add_communication(schedule: Schedule) -> Schedule:
    """Lowers a compute-only schedule: puts in a SEND and a RECV wherever a value changes rank, and REDUCE_GRAD.

    before::                         after::

        rank 0: 0F0 0B0                  rank 0: 0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE_GRAD
        rank 1: 1F0 1B0                  rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE_GRAD

    The computes are taken in one order that all ranks can follow. A SEND goes right after what it sends, and in the
    same moment its RECV is appended to the receiver's program: as early as can be, so that the transfer overlaps what
    the receiver does before it needs the value. So all programs are views of one order in which each message is one
    event: ranks that follow their programs cannot deadlock, whether sends are buffered or wait for their receiver, and
    whether or not the messages of a pair of ranks share one channel. REDUCE_GRAD comes after a stage's last B or W.
    Gives the programs of torch's ``_add_reduce_grad`` and ``_add_send_recv`` (torch 2.13).

    Raises ScheduleError where the schedule already communicates or deadlocks.
    """
    if not schedule.is_compute_only:
        rank, position, action = next(at for at in schedule.actions() if not at[2].computation_type.is_compute)
        raise schedule.fault(rank, position, f"{action} is not F, I, W or B; only a compute-only schedule is lowered")
    reducing = _add_reduce_grad(schedule)
    order = reducing.execution_order(schedule.predecessors())
    if len(order) < sum(map(len, reducing.programs)):
        raise ScheduleError(f"schedule {schedule.name} deadlocks and cannot be lowered; verify_schedule says where")
    programs: list[list[Action]] = [[] for _ in schedule.programs]
    for rank, action in order:
        programs[rank].append(action)
        if send := schedule.send_after(action):
            programs[rank].append(send)
            programs[schedule.homes(send.partner)[0]].append(send.partner)
    return replace(schedule, programs=tuple(map(tuple, programs)))


def _add_reduce_grad(schedule: Schedule) -> Schedule:
    """``... 0B6 0B7 ...``  -->  ``... 0B6 0B7 0REDUCE_GRAD ...`` where 0B7 is the last backward of its stage on the rank."""
    n_finished: Counter[tuple[int, int]] = Counter()
    programs: list[list[Action]] = [[] for _ in schedule.programs]
    for rank, _, action in schedule.actions():
        programs[rank].append(action)
        if action.computation_type in (Type.B, Type.W):
            stage, n_replicas = action.stage_index, schedule.replicas[action.stage_index]
            mine = range(rank - schedule.stage_to_rank[stage], schedule.n_microbatches, n_replicas)
            n_finished[rank, stage] += 1
            if n_finished[rank, stage] == len(mine):
                programs[rank].append(Action(action.stage_index, Type.REDUCE_GRAD))
    return replace(schedule, programs=tuple(map(tuple, programs)))


def _by_stage(
    name: str, n_stages: int, n_microbatches: int, stage_to_rank: tuple[int, ...] | None, kinds: tuple[Type, ...]
) -> Schedule:
    """Stage by stage all forwards, then, where asked, in reverse all backwards."""
    _check_sizes(n_stages, n_microbatches)
    ranks = tuple(range(n_stages)) if stage_to_rank is None else stage_to_rank
    if len(ranks) != n_stages or sorted(set(ranks)) != list(range(max(ranks) + 1)):
        raise OptionError(f"stage_to_rank {ranks} does not place {n_stages} stages on ranks 0, 1, ... without a gap")
    programs: list[list[Action]] = [[] for _ in range(max(ranks) + 1)]
    for kind in kinds:
        for stage in range(n_stages) if kind is Type.F else reversed(range(n_stages)):
            programs[ranks[stage]] += [Action(stage, kind, m) for m in range(n_microbatches)]
    return Schedule(name, n_microbatches, ranks, tuple(map(tuple, programs)))


def _check_sizes(n_stages: int, n_microbatches: int) -> None:
    for size, value in (("n_stages", n_stages), ("n_microbatches", n_microbatches)):
        if value < 1:
            raise OptionError(f"{size} is {value}; expected at least 1")
