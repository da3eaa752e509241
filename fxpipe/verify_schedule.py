"""What a legal schedule is, as code: complete, in order, matched, free of deadlock, within a limit of microbatches.

torch's own ``_validate_schedule`` (2.13) sees neither duplicates nor indices out of range nor anything that happens
between ranks; a fault that it lets through shows up as a hang of all ranks.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from fxpipe.errors import OptionError, ScheduleError, unknown
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule

Place = tuple[int, int]  # rank, position in its program
Places = Mapping[Action, Place]
Needs = Mapping[Action, tuple[Action, ...]]
DELIVERIES = ("rendezvous", "eager")
_BACKWARD = frozenset({Type.B, Type.I, Type.W, Type.SEND_B, Type.RECV_B, Type.REDUCE_GRAD})
_REPEATABLE = frozenset({Type.UNSHARD, Type.RESHARD})


@dataclass(frozen=True)
class ScheduleReport:
    """What holds for a schedule that passed: the most microbatches in flight at once, by stage and by rank.

    A microbatch is in flight on a stage from its F to its B (or W), or during its F alone where there is no backward.
    A rank with several stages counts each of them; of a replicated stage it is the most on one rank.
    """

    peak_in_flight_by_stage: tuple[int, ...]
    peak_in_flight_by_rank: tuple[int, ...]


def verify_schedule(
    schedule: Schedule, max_in_flight: int | None = None, *, forward_only: bool = False, delivery: str = "rendezvous"
) -> ScheduleReport:
    """Proves ``schedule`` legal, or raises ScheduleError that names the action, its rank and position, and draws it.

    Each stage runs on its rank (a replicated one each microbatch on the rank whose turn it is) and has exactly one F and
    one B (or one I and one W) of every microbatch, or one F alone
    where ``forward_only``; each comes after what it needs. A lowered schedule has besides exactly the sends, receives
    and REDUCE_GRADs that its computes call for, received in the order sent for every pair of ranks and direction.
    No set of ranks waits for each other in a circle: with ``delivery`` "rendezvous" each SEND waits until its receiver
    is at the RECV (what passes here passes under every weaker rule, and with one channel for both directions); with
    "eager" a SEND never waits. A compute-only schedule is judged by what its computes need, whichever ``delivery``.
    ``max_in_flight`` limits the microbatches in flight on each rank, all its stages together.
    """
    if max_in_flight is not None and max_in_flight < 1:
        raise OptionError(f"max_in_flight is {max_in_flight}; expected at least 1, or None for no limit")
    if delivery not in DELIVERIES:
        raise OptionError(unknown("delivery", delivery, DELIVERIES))
    needs = _expected(schedule, forward_only)
    places = _check_places(schedule)
    _check_complete(schedule, needs, places)
    _check_local_order(schedule, needs, places)
    _check_sharding(schedule)
    _check_channels(schedule, places)
    _check_deadlock(schedule, needs, places, delivery)
    return _check_in_flight(schedule, max_in_flight, forward_only)


def _expected(schedule: Schedule, forward_only: bool) -> dict[Action, tuple[Action, ...]]:
    needs = schedule.predecessors()
    return {a: n for a, n in needs.items() if not (forward_only and a.computation_type in _BACKWARD)}


def _check_places(schedule: Schedule) -> dict[Action, Place]:
    """Each action is on its stage's rank and there once; returns where (of all but the repeatable ones)."""
    places: dict[Action, Place] = {}
    seen: dict[tuple[int, Action], int] = {}
    for rank, position, action in schedule.actions():
        homes = schedule.homes(action)
        if rank not in homes:
            home = f"rank {homes[0]}" if len(homes) == 1 else f"ranks {homes[0]} to {homes[-1]}"
            raise schedule.fault(rank, position, f"{action} belongs on {home}, where stage {action.stage_index} is")
        if (rank, action) in seen:
            raise schedule.fault(rank, position, f"{action} is there twice; first at position {seen[rank, action]}")
        if action.computation_type not in _REPEATABLE:
            seen[rank, action] = position
            places.setdefault(action, (rank, position))
    return places


def _check_complete(schedule: Schedule, needs: Needs, places: Places) -> None:
    for action, (rank, position) in places.items():
        if action not in needs:
            raise schedule.fault(rank, position, f"{action} does not belong here: {_why_not(schedule, action, needs)}")
    for action in needs:
        for rank in schedule.homes(action):
            if action not in places or (action.microbatch_index is None and action not in schedule.programs[rank]):
                gap = _gap(schedule, rank, action, needs, places)
                raise schedule.fault(rank, gap, f"{action} is missing from this rank")


def _gap(schedule: Schedule, rank: int, missing: Action, needs: Needs, places: Places) -> int:
    """Where in the rank's program the missing action would go: after what it needs, else before what needs it."""
    here = {action: position for action, (r, position) in places.items() if r == rank}
    after = [here[n] + 1 for n in needs[missing] if n in here]
    before = [position for action, position in here.items() if missing in needs[action]]
    return max(after) if after else min(before, default=len(schedule.programs[rank]))


def _why_not(schedule: Schedule, action: Action, needs: Needs) -> str:
    if action.computation_type in _BACKWARD and all(a.computation_type not in _BACKWARD for a in needs):
        return "a forward-only schedule has no backward"
    if action.computation_type is Type.B:
        return "the same backward is also there as I or W"
    return f"the stages that it connects are both on rank {schedule.homes(action)[0]}, so nothing is sent"


def _check_local_order(schedule: Schedule, needs: Needs, places: Places) -> None:
    for rank, position, action in schedule.actions():
        for needed in needs.get(action, ()):
            if places[needed][0] == rank and places[needed][1] > position:
                problem = f"{action} comes before {needed}, which it needs and which is at position {places[needed][1]}"
                raise schedule.fault(rank, position, problem)


def _check_sharding(schedule: Schedule) -> None:
    """A stage that is ever unsharded or resharded computes only between an UNSHARD and the next RESHARD."""
    managed = {a.stage_index for _, _, a in schedule.actions() if a.computation_type in _REPEATABLE}
    unsharded: set[int] = set()
    for rank, position, action in schedule.actions():
        stage, kind = action.stage_index, action.computation_type
        if kind is Type.UNSHARD and stage in unsharded:
            raise schedule.fault(rank, position, f"{action}, but the stage is unsharded already")
        if (kind is Type.RESHARD or kind.is_compute) and stage in managed - unsharded:
            raise schedule.fault(rank, position, f"{action}, but the stage is not unsharded at this point")
        if kind in _REPEATABLE:
            unsharded ^= {stage}


def _check_channels(schedule: Schedule, places: Places) -> None:
    """For each pair of ranks and direction, the order of the RECVs is the order of the SENDs."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, _, action in schedule.actions():
        if action.computation_type.is_send:
            sent[rank, places[action.partner][0]].append(action)
        elif action.computation_type.is_receive:
            received[places[action.partner][0], rank].append(action)
    for (source, target), sends in sent.items():
        for send, receive in zip(sends, received[source, target], strict=True):
            if receive != send.partner:
                problem = (
                    f"{receive} is out of order: at this point rank {source} sends {send} "
                    f"(its position {places[send][1]}), and messages arrive in the order sent"
                )
                raise schedule.fault(target, places[receive][1], problem)


def _check_deadlock(schedule: Schedule, needs: Needs, places: Places, delivery: str) -> None:
    needs = _with_rendezvous(schedule, needs, places) if delivery == "rendezvous" else needs
    order = schedule.execution_order(needs)
    if len(order) == sum(map(len, schedule.programs)):
        return
    done = {action for _, action in order}
    heads = [sum(rank == r for r, _ in order) for rank in range(schedule.n_ranks)]
    rank = next(r for r, program in enumerate(schedule.programs) if heads[r] < len(program))
    waits: dict[int, Action] = {}  # rank --> what it waits for, in the order found
    while rank not in waits:
        action = schedule.programs[rank][heads[rank]]
        waits[rank] = action.partner if action.computation_type.is_send else min(set(needs[action]) - done)
        rank = places[waits[rank]][0]
    circle = list(waits)[list(waits).index(rank) :]
    lines = [
        f"rank {r}, position {heads[r]}: {schedule.programs[r][heads[r]]} waits for {waits[r]} "
        f"(rank {places[waits[r]][0]}, position {places[waits[r]][1]})\n{schedule.excerpt(r, heads[r])}"
        for r in circle
    ]
    raise ScheduleError(
        f"schedule {schedule.name}: deadlock ({delivery}), each waits for the next:\n" + "\n".join(lines)
    )


def _with_rendezvous(schedule: Schedule, needs: Needs, places: Places) -> Needs:
    """A SEND that waits for its RECV waits for whatever the receiver does just before it."""
    more = dict(needs)
    before: Action | None = None
    for _, position, action in schedule.actions():
        before = None if position == 0 else before
        if action.computation_type.is_receive and before is not None:
            more[action.partner] = (*needs[action.partner], before)
        if action in places:
            before = action
    return more


def _check_in_flight(schedule: Schedule, limit: int | None, forward_only: bool) -> ScheduleReport:
    by_stage, by_rank = [0] * schedule.n_stages, [0] * schedule.n_ranks
    peak_by_stage, peak_by_rank = by_stage.copy(), by_rank.copy()
    for rank, position, action in schedule.actions():
        stage = action.stage_index
        if action.computation_type is Type.F:
            by_stage[stage] += 1
            by_rank[rank] += 1
            peak_by_stage[stage] = max(peak_by_stage[stage], by_stage[stage])
            peak_by_rank[rank] = max(peak_by_rank[rank], by_rank[rank])
            if limit is not None and by_rank[rank] > limit:
                problem = f"{action} makes {by_rank[rank]} microbatches in flight on this rank; the limit is {limit}"
                raise schedule.fault(rank, position, problem)
        if action.computation_type in ((Type.F,) if forward_only else (Type.B, Type.W)):
            by_stage[stage] -= 1
            by_rank[rank] -= 1
    return ScheduleReport(tuple(peak_by_stage), tuple(peak_by_rank))
