"""The verifier against an executor that moves labelled values about, on legal schedules and on damaged ones."""

from collections import defaultdict, deque
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from fxpipe.errors import OptionError, ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule
from fxpipe.passes.schedule_orders import add_communication, forward_only, gpipe, one_f_one_b
from fxpipe.verify_schedule import ScheduleReport, verify_schedule


class Executor:
    """Runs a schedule on labels instead of tensors: what is computed where, from what, sent and received through what.

    Knows nothing of the verifier: an action that lacks a value waits, and what is wrong shows in the end in a rank that
    never finishes, a label that is not the expected one, or a sum of gradients that is not complete.
    """

    def __init__(self, schedule, delivery, forward_only):
        self.schedule, self.rendezvous, self.training = schedule, delivery == "rendezvous", not forward_only
        self.lowered = not schedule.is_compute_only
        self.at = [0] * schedule.n_ranks
        self.held = [set() for _ in schedule.programs]  # values that a rank may compute on
        self.outbox = [set() for _ in schedule.programs]  # values that it has to send
        self.channel = defaultdict(deque)
        self.seen, self.summed, self.reduced = set(), defaultdict(set), set()

    def accepts(self):
        try:
            while any([self.advance(rank) for rank in range(self.schedule.n_ranks)]):  # noqa: C419  every rank has its turn
                pass
        except AssertionError:
            return False
        schedule = self.schedule
        everything = {(s, m) for s in range(schedule.n_stages) for m in range(schedule.n_microbatches)}
        gradients = {(s, m) for s, microbatches in self.summed.items() for m in microbatches}
        finished = all(at == len(program) for at, program in zip(self.at, schedule.programs, strict=True))
        forwards = {(a.stage_index, a.microbatch_index) for a in self.seen if a.computation_type is Type.F}
        return (
            finished
            and forwards == everything
            and gradients == (everything if self.training else set())
            and not any(self.outbox)
            and not any(self.channel.values())
            and (not self.lowered or not self.training or self.reduced == set(range(schedule.n_stages)))
        )

    def next_action(self, rank):
        program = self.schedule.programs[rank]
        return program[self.at[rank]] if self.at[rank] < len(program) else None

    def advance(self, rank):
        action = self.next_action(rank)
        if action is None:
            return False
        assert self.schedule.stage_to_rank[action.stage_index] == rank
        if not getattr(self, action.computation_type.value)(rank, action.stage_index, action.microbatch_index):
            return False
        assert action not in self.seen
        self.seen.add(action)
        self.at[rank] += 1
        return True

    def take(self, rank, *values):
        if not self.held[rank].issuperset(values):
            return False
        self.held[rank].difference_update(values)
        return True

    def give(self, rank, to_stage, value):
        target = self.schedule.stage_to_rank[to_stage]
        box = self.outbox[rank] if self.lowered and target != rank else self.held[target]
        assert value not in box
        box.add(value)

    def F(self, rank, s, m):  # noqa: N802
        if s > 0 and not self.take(rank, ("input", s, m)):
            return False
        self.held[rank].add(("stash", s, m))
        if s + 1 < self.schedule.n_stages:
            self.give(rank, s + 1, ("input", s + 1, m))
        return True

    def back(self, rank, s, m):
        needed = [("stash", s, m)] + [("gradient", s, m)] * (s + 1 < self.schedule.n_stages)
        if not self.take(rank, *needed):
            return False
        if s > 0:
            self.give(rank, s - 1, ("gradient", s - 1, m))
        return True

    def sum(self, s, m):
        assert s not in self.reduced
        self.summed[s].add(m)
        return True

    def B(self, rank, s, m):  # noqa: N802
        return self.back(rank, s, m) and self.sum(s, m)

    def I(self, rank, s, m):  # noqa: E743, N802
        if not self.back(rank, s, m):
            return False
        self.held[rank].add(("weight stash", s, m))
        return True

    def W(self, rank, s, m):  # noqa: N802
        return self.take(rank, ("weight stash", s, m)) and self.sum(s, m)

    def REDUCE_GRAD(self, rank, s, m):  # noqa: N802
        assert len(self.summed[s]) == self.schedule.n_microbatches
        self.reduced.add(s)
        return True

    def send(self, rank, value):
        target = self.schedule.stage_to_rank[value[1]]
        if value not in self.outbox[rank]:
            return False
        if self.rendezvous:
            other = self.next_action(target)
            if other is None or not other.computation_type.is_receive:
                return False
            source = self.schedule.stage_to_rank[
                other.stage_index + (-1 if other.computation_type is Type.RECV_F else 1)
            ]
            if source != rank:
                return False
        self.outbox[rank].remove(value)
        self.channel[rank, target].append(value)
        return not self.rendezvous or self.meet(rank, target)

    def meet(self, rank, target):
        self.at[rank] += 1  # both at once; this rank's own count is taken back, as its caller counts it
        assert self.advance(target)
        self.at[rank] -= 1
        return True

    def receive(self, rank, source_stage, value):
        channel = self.channel[self.schedule.stage_to_rank[source_stage], rank]
        if not channel:
            return False
        assert channel.popleft() == value
        self.held[rank].add(value)
        return True

    def SEND_F(self, rank, s, m):  # noqa: N802
        return self.send(rank, ("input", s + 1, m))

    def SEND_B(self, rank, s, m):  # noqa: N802
        return self.send(rank, ("gradient", s - 1, m))

    def RECV_F(self, rank, s, m):  # noqa: N802
        return self.receive(rank, s - 1, ("input", s, m))

    def RECV_B(self, rank, s, m):  # noqa: N802
        return self.receive(rank, s + 1, ("gradient", s, m))


def split_backward(schedule):
    """Every B as I and W, side by side."""
    programs = tuple(
        tuple(
            replace(a, computation_type=kind)
            for a in program
            for kind in ((Type.I, Type.W) if a.computation_type is Type.B else (a.computation_type,))
        )
        for program in schedule.programs
    )
    return replace(schedule, programs=programs)


def verifies(schedule, **options):
    try:
        verify_schedule(schedule, **options)
    except ScheduleError:
        return False
    return True


@st.composite
def legal_schedules(draw):
    n_microbatches = draw(st.integers(1, 3))
    compute = draw(
        st.one_of(
            st.integers(1, 3).map(lambda p: one_f_one_b(p, n_microbatches)),
            st.sampled_from([(0,), (0, 1), (0, 1, 2), (0, 1, 0), (0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0)]).map(
                lambda ranks: gpipe(len(ranks), n_microbatches, ranks)
            ),
        )
    )
    compute = split_backward(compute) if draw(st.booleans()) else compute
    return add_communication(compute) if draw(st.booleans()) else compute


@st.composite
def damaged(draw, schedule):
    """``schedule`` with an action left out, copied, moved, changed to another, or two of them swapped."""
    programs = [list(program) for program in schedule.programs]
    places = [(rank, position) for rank, position, _ in schedule.actions()]
    (rank, position), (other_rank, other) = draw(st.sampled_from(places)), draw(st.sampled_from(places))
    damage = draw(st.sampled_from(["delete", "copy", "move", "swap", "swap near", "change"]))
    if damage in ("delete", "move"):
        action = programs[rank].pop(position)
        if damage == "move":
            programs[rank].insert(draw(st.integers(0, len(programs[rank]))), action)
    elif damage == "copy":
        programs[other_rank].insert(other, programs[rank][position])
    elif damage == "change":
        microbatch = st.integers(0, schedule.n_microbatches - 1)
        action = Action(
            draw(st.integers(0, schedule.n_stages - 1)), draw(st.sampled_from("FBIW").map(Type)), draw(microbatch)
        )
        programs[rank][position] = draw(st.sampled_from([action, schedule.programs[other_rank][other]]))
    else:
        if damage == "swap near":
            other_rank, other = rank, min(position + 1, len(programs[rank]) - 1)
        a, b = programs[rank][position], programs[other_rank][other]
        programs[rank][position], programs[other_rank][other] = b, a
    return replace(schedule, programs=tuple(map(tuple, programs)))


@settings(deadline=None, max_examples=400)
@given(st.data(), legal_schedules(), st.sampled_from(["rendezvous", "eager"]))
def test_rejects_a_damaged_schedule_exactly_when_it_cannot_be_executed(data, schedule, delivery):
    assert Executor(schedule, delivery, False).accepts()
    assert verifies(schedule, delivery=delivery)
    worse = data.draw(damaged(schedule))
    for _ in range(data.draw(st.integers(0, 1))):
        worse = data.draw(damaged(worse)) if any(worse.programs) else worse
    assert verifies(worse, delivery=delivery) == Executor(worse, delivery, False).accepts()


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([(0,), (0, 1), (0, 1, 2), (0, 1, 0)]), st.integers(1, 3), st.booleans())
def test_the_same_for_evaluation(data, ranks, n_microbatches, lowered):
    schedule = forward_only(len(ranks), n_microbatches, ranks)
    schedule = add_communication(schedule) if lowered else schedule
    assert verifies(schedule, forward_only=True)
    worse = data.draw(damaged(schedule))
    assert verifies(worse, forward_only=True) == Executor(worse, "rendezvous", True).accepts()


@pytest.mark.parametrize("n_stages", [1, 2, 4, 6])
@pytest.mark.parametrize("n_microbatches", [1, 2, 4, 9])
def test_peak_in_flight_is_the_closed_form(n_stages, n_microbatches):
    wanted = tuple(min(n_microbatches, n_stages - s) for s in range(n_stages))
    for schedule in (one_f_one_b(n_stages, n_microbatches), add_communication(one_f_one_b(n_stages, n_microbatches))):
        assert verify_schedule(schedule, max_in_flight=wanted[0]) == ScheduleReport(wanted, wanted)
    everything = (n_microbatches,) * n_stages
    assert verify_schedule(gpipe(n_stages, n_microbatches)) == ScheduleReport(everything, everything)


def test_in_flight_counts_all_stages_of_a_rank_and_nothing_stays_in_evaluation():
    assert verify_schedule(gpipe(4, 3, (0, 1, 1, 0))) == ScheduleReport((3, 3, 3, 3), (6, 6))
    assert verify_schedule(forward_only(3, 5), forward_only=True) == ScheduleReport((1, 1, 1), (1, 1, 1))


COMPUTE = """\
1f1b microbatches=2 stage_to_rank=0,1
rank 0: 0F0 0F1 0B0 0B1
rank 1: 1F0 1B0 1F1 1B1"""
LOWERED = """\
1f1b microbatches=2 stage_to_rank=0,1
rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD
rank 1: 1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE_GRAD"""
SAME_RANK = """\
x microbatches=1 stage_to_rank=0,0,1
rank 0: 0F0 1F0 1SEND_F0 1RECV_B0 1B0 1REDUCE_GRAD 0B0 0REDUCE_GRAD
rank 1: 2RECV_F0 2F0 2B0 2SEND_B0 2REDUCE_GRAD"""


def test_the_texts_below_are_legal_before_they_are_changed():
    for text in (COMPUTE, LOWERED, SAME_RANK):
        verify_schedule(Schedule.parse(text))
    assert Schedule.parse(LOWERED) == add_communication(Schedule.parse(COMPUTE))


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (COMPUTE, ("0B1", "0B1 1F1"), "rank 0, position 4: 1F1 belongs on rank 1, where stage 1 is"),
        (COMPUTE, ("1B1", "1B1 1B0"), "rank 1, position 4: 1B0 is there twice; first at position 1"),
        (COMPUTE, ("0F1 ", ""), "rank 0, position 2: 0F1 is missing from this rank"),
        (COMPUTE, (" 1B1", ""), "rank 1, position 3: 1B1 is missing from this rank"),
        (COMPUTE, (" 1F1 1B1", ""), "rank 1, position 2: 1F1 is missing from this rank"),
        (COMPUTE, ("1B1", "1I1"), "rank 1, position 4: 1W1 is missing from this rank"),
        (
            COMPUTE,
            ("1B1", "1B1 1W1"),
            "rank 1, position 3: 1B1 does not belong here: the same backward is also there as I",
        ),
        (
            COMPUTE,
            ("1F1 1B1", "1B1 1F1"),
            "rank 1, position 2: 1B1 comes before 1F1, which it needs and which is at pos",
        ),
        (COMPUTE, ("1B0", "1W0 1I0"), "rank 1, position 1: 1W0 comes before 1I0"),
        (LOWERED, (" 0SEND_F1", ""), "rank 0, position 3: 0SEND_F1 is missing from this rank"),
        (LOWERED, ("1RECV_F1 ", ""), "rank 1, position 4: 1RECV_F1 is missing from this rank"),
        (LOWERED, (" 0REDUCE_GRAD", ""), "rank 0, position 8: 0REDUCE_GRAD is missing from this rank"),
        (LOWERED, ("1RECV_F0 1F0", "1F0 1RECV_F0"), "rank 1, position 0: 1F0 comes before 1RECV_F0"),
        (LOWERED, ("1B0 1SEND_B0", "1SEND_B0 1B0"), "rank 1, position 3: 1SEND_B0 comes before 1B0"),
        (LOWERED, ("0B1 0REDUCE_GRAD", "0REDUCE_GRAD 0B1"), "rank 0, position 7: 0REDUCE_GRAD comes before 0B1"),
        (
            LOWERED,
            ("1RECV_F0 1F0 1RECV_F1", "1RECV_F1 1RECV_F0 1F0"),
            r"rank 1, position 0: 1RECV_F1 is out of order: at this point rank 0 sends 0SEND_F0 \(its position 1\)",
        ),
        (
            SAME_RANK,
            ("0F0 ", "0F0 0SEND_F0 "),
            "0SEND_F0 does not belong here: the stages that it connects are both on",
        ),
        (LOWERED, ("0F0", "0UNSHARD 0UNSHARD 0F0"), "position 1: 0UNSHARD, but the stage is unsharded already"),
        (LOWERED, ("0F0", "0RESHARD 0F0"), "position 0: 0RESHARD, but the stage is not unsharded at this point"),
        (LOWERED, ("0F0", "0F0 0UNSHARD"), "position 0: 0F0, but the stage is not unsharded at this point"),
    ],
)
def test_each_fault_is_named_with_its_place(text, change, message):
    with pytest.raises(ScheduleError, match=message):
        verify_schedule(Schedule.parse(text.replace(*change, 1)))


def test_unshard_and_reshard_may_repeat():
    verify_schedule(Schedule.parse(LOWERED.replace("0F0", "0UNSHARD 0F0 0RESHARD 0UNSHARD", 1)))


def test_a_fault_is_drawn_in_its_program():
    with pytest.raises(ScheduleError) as e:
        verify_schedule(Schedule.parse(COMPUTE.replace("1F1 1B1", "1B1 1F1")))
    assert str(e.value).split("\n")[1:] == ["  rank 1: 1F0 1B0 1B1 1F1 (end)", "                  ^^^"]


def test_evaluation_has_no_backward():
    with pytest.raises(
        ScheduleError, match="rank 0, position 2: 0B0 does not belong here: a forward-only schedule has no"
    ):
        verify_schedule(Schedule.parse(COMPUTE), forward_only=True)
    with pytest.raises(ScheduleError, match="1B0 is missing from this rank"):
        verify_schedule(forward_only(2, 2))


def test_a_deadlock_is_told_as_the_circle_of_ranks_that_wait():
    text = COMPUTE.replace("0F0 0F1 0B0 0B1", "0F0 0B0 0F1 0B1").replace("1F0 1B0 1F1 1B1", "1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError) as e:
        verify_schedule(Schedule.parse(text))
    assert (
        str(e.value)
        == """\
schedule 1f1b: deadlock (rendezvous), each waits for the next:
rank 0, position 1: 0B0 waits for 1B0 (rank 1, position 2)
  rank 0: 0F0 0B0 0F1 0B1 (end)
              ^^^
rank 1, position 1: 1F1 waits for 0F1 (rank 0, position 2)
  rank 1: 1F0 1F1 1B0 1B1 (end)
              ^^^"""
    )


def test_ranks_outside_the_circle_are_not_told():
    text = "x microbatches=1 stage_to_rank=0,1,2,1\nrank 0: 0F0 0B0\nrank 1: 3F0 1F0 3B0 1B0\nrank 2: 2F0 2B0"
    with pytest.raises(ScheduleError) as e:
        verify_schedule(Schedule.parse(text))
    assert "rank 1, position 0: 3F0 waits for 2F0 (rank 2, position 0)" in str(e.value)
    assert "rank 2, position 0: 2F0 waits for 1F0 (rank 1, position 1)" in str(e.value)
    assert "rank 0" not in str(e.value)


def test_delivery_decides_whether_a_send_may_wait():
    text = LOWERED.replace("1RECV_F1 1B0 1SEND_B0", "1B0 1SEND_B0 1RECV_F1")
    verify_schedule(Schedule.parse(text), delivery="eager")
    with pytest.raises(ScheduleError, match=r"rank 0, position 3: 0SEND_F1 waits for 1RECV_F1 \(rank 1, position 4\)"):
        verify_schedule(Schedule.parse(text))


def test_an_eager_deadlock():
    text = LOWERED.replace("0F1 0SEND_F1 0RECV_B0", "0RECV_B0 0F1 0SEND_F1")
    text = text.replace("1B0 1SEND_B0 1F1", "1F1 1B0 1SEND_B0")
    with pytest.raises(ScheduleError, match=r"deadlock \(eager\)(.|\n)*0RECV_B0 waits for 1SEND_B0 "):
        verify_schedule(Schedule.parse(text), delivery="eager")


def test_too_many_in_flight():
    with pytest.raises(
        ScheduleError, match="rank 0, position 2: 0F2 makes 3 microbatches in flight on this rank; the lim"
    ):
        verify_schedule(one_f_one_b(4, 8), max_in_flight=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delivery": "pigeon"}, "unknown delivery 'pigeon'; known: eager, rendezvous"),
        ({"max_in_flight": 0}, "max_in_flight is 0; expected at least 1, or None"),
    ],
)
def test_options(options, message):
    with pytest.raises(OptionError, match=message):
        verify_schedule(one_f_one_b(2, 2), **options)


def replicated(change):
    """2 stages, the first on two ranks, lowered, its text changed."""
    text = str(add_communication(one_f_one_b(2, 4, (2, 1))))
    assert change[0] in text
    return Schedule.parse(text.replace(*change, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0F0 0SEND_F0", "0F1 0SEND_F0"), "0F1 belongs on rank 1, where stage 0 is"),
        ((" 0REDUCE_GRAD", ""), "0REDUCE_GRAD is missing from this rank"),
        (("0B3 0REDUCE_GRAD", "0B3"), "rank 1.*0REDUCE_GRAD is missing from this rank"),
        (("0B3 0REDUCE_GRAD", "0REDUCE_GRAD 0B3"), "rank 1.*0REDUCE_GRAD comes before 0B3, which it needs"),
        (("0B3 0REDUCE_GRAD", "0B3 0REDUCE_GRAD 0REDUCE_GRAD"), "0REDUCE_GRAD is there twice"),
    ],
)
def test_faults_of_replicated_schedules(change, message):
    with pytest.raises(ScheduleError, match=message):
        verify_schedule(replicated(change))
