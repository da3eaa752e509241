"""The orders and their lowering against torch's own, and against each other."""

from collections import defaultdict
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_reduce_grad,
    _add_send_recv,
    _PipelineScheduleRuntime,
    _simulate_comms_compute,
    _validate_schedule,
)
from torch.distributed.pipelining.stage import PipelineStage

from fxpipe.cuts.chain import Limits
from fxpipe.errors import OptionError, ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule
from fxpipe.passes.schedule_orders import ORDERS, add_communication, forward_only, gpipe, one_f_one_b, order
from fxpipe.verify_schedule import verify_schedule


def as_torch(schedule):
    return {rank: [_Action.from_str(str(a)) for a in program] for rank, program in enumerate(schedule.programs)}


def texts(programs):
    return [[str(a) for a in programs[rank] if a is not None] for rank in range(len(programs))]


def lines(schedule):
    return [" ".join(map(str, program)) for program in schedule.programs]


def torch_lowering(schedule):
    actions = {rank: _add_reduce_grad(p, schedule.n_microbatches) for rank, p in as_torch(schedule).items()}
    return _add_send_recv(actions, lambda stage: schedule.stage_to_rank[stage], schedule.n_stages)


def without_reduce_grad(actions):
    """torch's simulator refuses the REDUCE_GRAD that torch's lowering puts in."""
    return {rank: [a for a in p if a.computation_type.value != "REDUCE_GRAD"] for rank, p in actions.items()}


@st.composite
def legal_schedules(draw):
    """Compute-only: ranks that take, in any order, any action that is ready."""
    n_ranks, n_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = tuple(draw(st.permutations([*range(n_ranks), *draw(st.lists(st.integers(0, n_ranks - 1), max_size=2))])))
    last, split = len(ranks) - 1, draw(st.booleans())
    ready = [Action(0, Type.F, m) for m in range(n_microbatches)]
    programs = defaultdict(list)
    while ready:
        action = ready.pop(draw(st.integers(0, len(ready) - 1)))
        stage, microbatch = action.stage_index, action.microbatch_index
        programs[ranks[stage]].append(action)
        backward = Type.I if split else Type.B
        if action.computation_type is Type.F:
            ready.append(Action(min(stage + 1, last), Type.F if stage < last else backward, microbatch))
        if action.computation_type is backward and stage > 0:
            ready.append(Action(stage - 1, backward, microbatch))
        if action.computation_type is Type.I:
            ready.append(Action(stage, Type.W, microbatch))
    return Schedule("any", n_microbatches, ranks, tuple(tuple(programs[rank]) for rank in range(n_ranks)))


def test_one_f_one_b_by_hand():
    assert lines(one_f_one_b(3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert lines(one_f_one_b(4, 2)) == [
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B0 1B1",
        "2F0 2F1 2B0 2B1",
        "3F0 3B0 3F1 3B1",
    ]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("n_microbatches", [5, 8])
def test_orders_are_torchs(n_stages, n_microbatches):
    reduce = [[f"{s}REDUCE_GRAD"] for s in range(n_stages)]
    ours = texts(gpipe(n_stages, n_microbatches).programs)
    theirs = texts(get_schedule_ops("GPipe", n_stages, n_microbatches))
    assert [p + r for p, r in zip(ours, reduce, strict=True)] == theirs
    ours = texts(one_f_one_b(n_stages, n_microbatches).programs)
    theirs = texts(get_schedule_ops("1F1B", n_stages, n_microbatches))
    # torch 2.13 counts the last rank's forwards from 1 (schedules.py:1211; only its picture is wrong): F1..FM, never F0
    shifted = {f"{n_stages - 1}F{m + 1}": f"{n_stages - 1}F{m}" for m in range(n_microbatches)}
    theirs[-1] = [shifted.get(a, a) for a in theirs[-1]]
    assert [p + r for p, r in zip(ours, reduce, strict=True)] == theirs


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_microbatches", [1, 2, 3, 8])
def test_every_order_is_legal_and_torch_agrees(name, n_stages, n_microbatches):
    schedule = order(name, n_stages, n_microbatches)
    assert (schedule.name, schedule.n_stages, schedule.n_microbatches) == (name, n_stages, n_microbatches)
    _validate_schedule(as_torch(schedule), n_stages, n_stages, n_microbatches)
    lowered = add_communication(schedule)
    assert verify_schedule(lowered) == verify_schedule(schedule) == verify_schedule(lowered, delivery="eager")
    assert texts(lowered.programs) == texts(torch_lowering(schedule))
    _simulate_comms_compute(without_reduce_grad(as_torch(lowered)), lambda stage: stage, n_stages)


@pytest.mark.parametrize("name", ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_torchs_schedules_of_several_stages_per_rank_lower_to_torchs_programs(name):
    ops = get_schedule_ops(name, 4, 8)
    rows = (",".join(str(a) for a in program if a is not None) for program in ops)
    schedule = Schedule.from_csv("\r\n".join(rows), name)
    lowered = add_communication(schedule)
    assert texts(lowered.programs) == texts(torch_lowering(schedule))
    assert verify_schedule(lowered) == verify_schedule(schedule)


@settings(deadline=None, max_examples=150)
@given(legal_schedules())
def test_lowering_keeps_any_legal_schedule_legal_and_is_torchs(schedule):
    report = verify_schedule(schedule)
    lowered = add_communication(schedule)
    assert lowered.compute_only() == schedule
    assert verify_schedule(lowered) == verify_schedule(lowered, delivery="eager") == report
    assert texts(lowered.programs) == texts(torch_lowering(schedule))
    ranks = schedule.stage_to_rank
    _validate_schedule(as_torch(schedule), schedule.n_ranks, schedule.n_stages, schedule.n_microbatches)
    _simulate_comms_compute(without_reduce_grad(as_torch(lowered)), lambda s: ranks[s], schedule.n_stages)


def test_torchs_runtime_lowers_our_orders_to_our_programs():
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, 4, 4, None
    runtime = _PipelineScheduleRuntime([stage], 6)
    runtime._prepare_schedule_with_comms(as_torch(one_f_one_b(4, 6)))
    theirs = [[a for a in p if "SHARD" not in a] for p in texts(runtime.pipeline_order_with_comms)]
    for rank, program in enumerate(add_communication(one_f_one_b(4, 6)).programs):
        assert sorted(map(str, program)) == sorted(
            theirs[rank]
        )  # its UNSHARDs take turns, so RECVs may stand elsewhere
        assert [str(a) for a in program if a.computation_type.is_compute] == [a for a in theirs[rank] if "_" not in a]


def test_nothing_is_sent_between_stages_of_one_rank():
    lowered = add_communication(gpipe(4, 1, (0, 0, 1, 1)))
    assert lines(lowered) == [
        "0F0 1F0 1SEND_F0 1RECV_B0 1B0 1REDUCE_GRAD 0B0 0REDUCE_GRAD",
        "2RECV_F0 2F0 3F0 3B0 3REDUCE_GRAD 2B0 2SEND_B0 2REDUCE_GRAD",
    ]


@pytest.mark.parametrize("ranks", [None, (0, 1, 1, 0), (0, 1, 0, 1)])
def test_evaluation(ranks):
    lowered = add_communication(forward_only(4, 3, ranks))
    verify_schedule(lowered, forward_only=True)
    assert {str(a.computation_type) for _, _, a in lowered.actions()} == {"F", "SEND_F", "RECV_F"}


def test_an_unknown_order_lists_the_known():
    with pytest.raises(OptionError, match="unknown schedule '1b1f'; known: 1f1b, gpipe"):
        order("1b1f", 2, 2)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, forward_only])
def test_sizes(make):
    with pytest.raises(OptionError, match="n_stages is 0; expected at least 1"):
        make(0, 4)
    with pytest.raises(OptionError, match="n_microbatches is -1; expected at least 1"):
        make(4, -1)


@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 3), (1, 1, 1), (0, -1, 1)])
def test_stages_must_be_placed_without_a_gap(ranks):
    with pytest.raises(OptionError, match=r"does not place 3 stages on ranks 0, 1, \.\.\. without a gap"):
        gpipe(3, 2, ranks)


def test_only_a_compute_only_schedule_is_lowered():
    with pytest.raises(ScheduleError, match="rank 0, position 1: 0SEND_F0 is not F, I, W or B; only a compute-only"):
        add_communication(add_communication(gpipe(2, 2)))


def test_a_deadlock_is_not_lowered():
    schedule = Schedule.parse("x microbatches=1 stage_to_rank=0,1\nrank 0: 0B0 0F0\nrank 1: 1F0 1B0")
    with pytest.raises(ScheduleError, match="schedule x deadlocks and cannot be lowered; verify_schedule says where"):
        add_communication(schedule)


def test_replicas_take_the_microbatches_in_turn():
    assert (
        str(order("1f1b", 2, 5, (2, 1)))
        == """\
1f1b microbatches=5 stage_to_rank=0,2 replicas=2,1
rank 0: 0F0 0F2 0B0 0F4 0B2 0B4
rank 1: 0F1 0F3 0B1 0B3
rank 2: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 1F4 1B4"""
    )
    assert lines(order("gpipe", 2, 4, (1, 3))) == [
        "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3",
        "1F0 1F3 1B0 1B3",
        "1F1 1B1",
        "1F2 1B2",
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(ORDERS)), st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), st.integers(0, 9)
)
def test_replicated_orders_are_legal_and_bounded(name, replicas, more):
    n_microbatches = max(replicas) + more
    schedule = order(name, len(replicas), n_microbatches, replicas)
    report = verify_schedule(schedule)
    lowered = add_communication(schedule)
    for delivery in ("rendezvous", "eager"):
        verify_schedule(lowered, delivery=delivery)
    assert lowered.compute_only() == schedule
    for rank, program in enumerate(lowered.programs):
        stage = next(s for s in range(schedule.n_stages) if rank in schedule.ranks_of(s))
        assert program.count(Action(stage, Type.REDUCE_GRAD)) == 1
        assert program[-1] == Action(stage, Type.REDUCE_GRAD) or program[-1].computation_type is Type.SEND_B
        assert {a.microbatch_index for a in program} - {None} == set(
            range(rank - schedule.stage_to_rank[stage], n_microbatches, replicas[stage])
        )
    if name == "1f1b":
        limits = Limits(len(replicas), None, n_microbatches, replicas)
        assert report.peak_in_flight_by_stage == tuple(limits.in_flight(s) for s in range(len(replicas)))


def test_more_replicas_than_microbatches():
    with pytest.raises(ScheduleError, match="stage 0 has 3 replicas for 2 microbatches; each needs one at least"):
        order("1f1b", 2, 2, (3, 1))
