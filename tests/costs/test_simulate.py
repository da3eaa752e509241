"""The simulator against the closed forms of the literature (shared facts, section 3) and small cases by hand."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from fxpipe.costs.simulate import CutCost, StageCost, StageTimes, Timeline, simulate
from fxpipe.errors import OptionError, ScheduleError
from fxpipe.ir.schedule import Schedule
from fxpipe.passes.schedule_orders import ORDERS, add_communication, forward_only, gpipe, one_f_one_b, order

THIRDS = StageCost(forward_seconds=1, backward_seconds=2, weight_seconds=1)  # TF = TB = TW = 1


def torch_schedule(name, n_ranks, n_microbatches):
    ops = get_schedule_ops(name, n_ranks, n_microbatches)
    rows = (",".join(str(a) for a in program if a is not None) for program in ops)
    return Schedule.from_csv("\r\n".join(rows), name)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("p", [1, 2, 4, 7])
@pytest.mark.parametrize("m", [1, 3, 8, 16])
def test_gpipe_and_1f1b_are_the_closed_form(name, p, m, lowered):
    schedule = order(name, p, m)
    costs = StageTimes.uniform(p, StageCost(3, 5, in_flight_bytes=100, static_bytes=7))
    timeline = simulate(add_communication(schedule) if lowered else schedule, costs)
    assert timeline.makespan_seconds == (m + p - 1) * (3 + 5)
    assert timeline.busy_seconds == (m * (3 + 5),) * p
    assert timeline.barrier_bubble == timeline.span_bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-15)
    in_flight = [m if name == "gpipe" else min(m, p - s) for s in range(p)]
    assert timeline.peak_bytes == tuple(7 + 100 * n for n in in_flight)


@pytest.mark.parametrize(
    ("name", "m", "span_bubble", "barrier_bubble"),
    [  # p = 4 ranks, v = 2 stages on each
        ("LoopedBFS", 8, 3 / 19, 3 / 19),  # (p-1)/(vm+p-1)
        ("Interleaved1F1B", 8, 3 / 19, 3 / 19),
        ("Interleaved1F1B", 16, 3 / 35, 3 / 35),
        ("InterleavedZeroBubble", 8, 3 / 51, 3 / 51),  # (p-1)/(3vm+p-1)
        ("ZBVZeroBubble", 8, 0, 3 / 51),
    ],
)
@pytest.mark.parametrize("lowered", [False, True])
def test_torchs_schedules_of_several_stages_per_rank_are_the_closed_form(name, m, span_bubble, barrier_bubble, lowered):
    schedule = torch_schedule(name, 4, m)
    timeline = simulate(add_communication(schedule) if lowered else schedule, StageTimes.uniform(8, THIRDS))
    assert timeline.span_bubble == pytest.approx(span_bubble, abs=1e-15)
    assert timeline.barrier_bubble == pytest.approx(barrier_bubble, abs=1e-15)


def test_interleaved_1f1b_holds_what_megatron_says():
    timeline = simulate(
        torch_schedule("Interleaved1F1B", 4, 8), StageTimes.uniform(8, StageCost(1, 2, in_flight_bytes=1))
    )
    assert timeline.peak_bytes == tuple((2 - 1) * 4 + 2 * (4 - s - 1) + 1 for s in range(4))  # in half stages


def test_the_weights_part_is_held_from_i_to_w():
    schedule = Schedule.parse("x microbatches=2 stage_to_rank=0\nrank 0: 0F0 0I0 0F1 0W0 0I1 0W1")
    timeline = simulate(schedule, StageTimes.uniform(1, StageCost(1, 5, 2, 100, 30, 1000)))
    assert [e.end_seconds for e in timeline.events[0]] == [1, 4, 5, 7, 10, 12]
    assert timeline.peak_bytes == (1000 + 30 + 100,)


def test_one_message_by_hand():
    costs = StageTimes(
        (StageCost(1, 2), StageCost(3, 4)), (CutCost(100, 40, bytes_per_second=20, latency_seconds=0.5),)
    )
    for schedule in (gpipe(2, 1), add_communication(gpipe(2, 1))):
        timeline = simulate(schedule, costs)
        first, second = timeline.transfers
        assert (str(first.send), first.source_rank, first.target_rank, first.n_bytes) == ("0SEND_F0", 0, 1, 100)
        assert (first.start_seconds, first.end_seconds) == (1, 1 + 100 / 20 + 0.5)
        assert (str(second.send), second.source_rank, second.target_rank, second.n_bytes) == ("1SEND_B0", 1, 0, 40)
        assert (second.start_seconds, second.end_seconds) == (13.5, 13.5 + 40 / 20 + 0.5)
        assert timeline.makespan_seconds == 16 + 2
        assert timeline.busy_seconds == (3, 7)
        assert timeline.span_seconds == (18, 7)
        assert timeline.barrier_bubble == timeline.span_bubble == 1 - 10 / 36


def test_messages_of_one_direction_queue_for_the_link_and_latencies_overlap():
    costs = StageTimes.uniform(2, StageCost(1, 1), CutCost(30, 30, bytes_per_second=10, latency_seconds=2))
    transfers = simulate(forward_only(2, 3), costs).transfers
    assert [(t.start_seconds, t.end_seconds) for t in transfers] == [(1, 6), (4, 9), (7, 12)]


def test_a_lowered_receive_is_posted_when_its_rank_gets_there():
    lowered = Schedule.parse(
        "x microbatches=2 stage_to_rank=0,1\nrank 0: 0F0 0SEND_F0 0F1 0SEND_F1\nrank 1: 1RECV_F0 1F0 1RECV_F1 1F1"
    )
    costs = StageTimes((StageCost(1, 0), StageCost(10, 0)), (CutCost(5, 0, bytes_per_second=1),))
    assert [t.start_seconds for t in simulate(lowered, costs).transfers] == [1, 16]
    assert [t.start_seconds for t in simulate(lowered.compute_only(), costs).transfers] == [1, 6]


@pytest.mark.parametrize(("p", "m", "link_seconds"), [(2, 4, 1), (4, 8, 0.5), (4, 1, 3)])
def test_gpipe_with_links_no_slower_than_the_stages(p, m, link_seconds):
    costs = StageTimes.uniform(p, StageCost(3, 5), CutCost(latency_seconds=link_seconds))
    assert simulate(gpipe(p, m), costs).makespan_seconds == (m + p - 1) * 8 + 2 * (p - 1) * link_seconds


@pytest.mark.parametrize("m", [1, 4, 9])
def test_the_slowest_stage_sets_the_pace(m):
    times = [(1, 2), (2, 6), (1, 1)]
    costs = StageTimes(tuple(StageCost(*t) for t in times), (CutCost(), CutCost()))
    timeline = simulate(gpipe(3, m), costs)
    assert timeline.makespan_seconds == sum(f + b for f, b in times) + (m - 1) * (2 + 6)


SECONDS = st.integers(0, 8)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from(sorted(ORDERS)))
def test_bounds_and_causality_for_any_costs(data, p, m, name):
    stage = st.builds(StageCost, SECONDS, SECONDS)
    cut = st.builds(CutCost, SECONDS, SECONDS, st.sampled_from([1, 2, math.inf]), SECONDS)
    costs = StageTimes(
        tuple(data.draw(st.lists(stage, min_size=p, max_size=p))),
        tuple(data.draw(st.lists(cut, min_size=p - 1, max_size=p - 1))),
    )
    schedule = order(name, p, m)
    ideal, lowered = simulate(schedule, costs), simulate(add_communication(schedule), costs)
    busiest = max(m * (s.forward_seconds + s.backward_seconds) for s in costs.stages)
    once = sum(s.forward_seconds + s.backward_seconds for s in costs.stages) + sum(
        (c.activation_bytes + c.gradient_bytes) / c.bytes_per_second + 2 * c.latency_seconds for c in costs.cuts
    )
    assert max(busiest, once) <= ideal.makespan_seconds <= lowered.makespan_seconds
    assert ideal.busy_seconds == lowered.busy_seconds
    assert ideal.peak_bytes == lowered.peak_bytes
    for timeline in (ideal, lowered):
        check_causality(timeline)
        assert 0 <= timeline.span_bubble <= 1
        assert timeline.span_bubble <= timeline.barrier_bubble <= 1


def check_causality(timeline: Timeline):
    """Every action of a rank follows the one before; a message is between the computes that it joins."""
    at = {str(e.action): e for events in timeline.events for e in events}
    for events in timeline.events:
        assert all(a.end_seconds <= b.start_seconds for a, b in pairwise(events))
    for t in timeline.transfers:
        kind = "F" if "F" in str(t.send) else "B"
        source, target = (f"{a.stage_index}{kind}{a.microbatch_index}" for a in (t.send, t.send.partner))
        assert at[source].end_seconds <= t.start_seconds <= t.end_seconds <= at[target].start_seconds


def test_evaluation_holds_one_microbatch_at_a_time():
    timeline = simulate(forward_only(3, 4), StageTimes.uniform(3, StageCost(1, 9, in_flight_bytes=50, static_bytes=1)))
    assert timeline.makespan_seconds == 4 + 3 - 1
    assert timeline.peak_bytes == (51, 51, 51)


def test_text():
    timeline = simulate(add_communication(one_f_one_b(2, 3)), StageTimes.uniform(2, StageCost(1, 2)))
    assert (
        timeline.text(48)
        == """\
rank 0 |F0--F1--........B0======F2--B1======....B2======|  75% busy
rank 1 |....F0--B0======F1--B1======F2--B2======........|  75% busy
        0                                            12 s"""
    )


def test_text_names_the_stage_where_a_rank_has_several():
    timeline = simulate(gpipe(2, 1, (0, 0)), StageTimes.uniform(2, StageCost(1, 1)))
    assert timeline.text(20).split("\n")[0] == "rank 0 |0F0--1F0--1B0==0B0==| 100% busy"


def test_chrome_trace():
    timeline = simulate(add_communication(gpipe(2, 1)), StageTimes.uniform(2, StageCost(1, 2), CutCost(8, 8, 16)))
    trace = json.loads(json.dumps(timeline.to_chrome_trace()))
    slices = {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X"}
    assert set(slices) == {"0F0", "1F0", "1B0", "0B0", "0SEND_F0", "1SEND_B0"}
    assert {k: slices["1B0"][k] for k in ("cat", "pid", "tid", "ts", "dur")} == {
        "cat": "B",
        "pid": 1,
        "tid": 0,
        "ts": 2.5e6,
        "dur": 2e6,
    }
    assert {k: slices["1SEND_B0"][k] for k in ("pid", "tid", "ts", "dur", "args")} == {
        "pid": 1,
        "tid": 1,
        "ts": 4.5e6,
        "dur": 0.5e6,
        "args": {"bytes": 8},
    }
    named = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert named[1, 0, "process_name"] == "rank 1"
    assert named[1, 1, "thread_name"] == "to rank 0"


def test_a_step_that_takes_no_time_has_no_bubble():
    timeline = simulate(gpipe(2, 2), StageTimes.uniform(2, StageCost(0, 0)))
    assert timeline.barrier_bubble == timeline.span_bubble == 0
    assert timeline.text(10).split("\n")[0] == "rank 0 |..........|"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCost(-1, 1), "stage cost has forward_seconds -1; expected a finite number of at least 0"),
        (lambda: StageCost(1, math.nan), "stage cost has backward_seconds nan"),
        (lambda: StageCost(1, 2, 3), "stage cost has weight_seconds 3, more than backward_seconds"),
        (lambda: StageCost(1, 2, 1, 4, 5), "stage cost has weight_in_flight_bytes 5, more than in_flight_bytes"),
        (lambda: CutCost(activation_bytes=-1), "cut cost has activation_bytes -1"),
        (lambda: CutCost(latency_seconds=math.inf), "cut cost has latency_seconds inf"),
        (lambda: CutCost(bytes_per_second=0), "cut cost has bytes_per_second 0; expected more than 0"),
        (lambda: StageTimes((THIRDS, THIRDS), ()), "2 stages have 0 cuts; expected one less than stages"),
    ],
)
def test_costs_check_themselves(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_costs_must_be_of_this_many_stages():
    with pytest.raises(OptionError, match="the costs are of 3 stages, but schedule gpipe has 2"):
        simulate(gpipe(2, 2), StageTimes.uniform(3, THIRDS))


def test_a_split_backward_needs_its_split_time():
    schedule = Schedule.parse("x microbatches=1 stage_to_rank=0\nrank 0: 0F0 0I0 0W0")
    with pytest.raises(OptionError, match="the schedule has I and W, but the stage costs have no weight_seconds"):
        simulate(schedule, StageTimes.uniform(1, StageCost(1, 2)))


def test_a_deadlock_is_not_simulated():
    schedule = Schedule.parse("x microbatches=1 stage_to_rank=0,1\nrank 0: 0B0 0F0\nrank 1: 1F0 1B0")
    with pytest.raises(ScheduleError, match="schedule x deadlocks and cannot be simulated; verify_schedule says where"):
        simulate(schedule, StageTimes.uniform(2, THIRDS))


@pytest.mark.parametrize(("m", "r"), [(8, 1), (8, 2), (9, 2), (7, 4)])
def test_replicas_divide_the_work_and_pay_for_the_sum(m, r):
    schedule = add_communication(one_f_one_b(1, m, (r,)))
    timeline = simulate(schedule, StageTimes.uniform(1, StageCost(3, 5, static_bytes=7, reduce_seconds=11)))
    assert timeline.makespan_seconds == -(-m // r) * (3 + 5) + 11
    assert timeline.peak_bytes == (7,) * r
