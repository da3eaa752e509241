"""Schedules as data: text, torch's CSV and JSON both ways, the grid, and what the constructor refuses."""

import csv
import io
import json
from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import given, strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import PipelineStage

from fxpipe.errors import ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.schedule import Schedule
from fxpipe.passes.schedule_orders import add_communication, gpipe, one_f_one_b

SMALL = """\
1f1b microbatches=3 stage_to_rank=0,1
rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
rank 1: 1F0 1B0 1F1 1B1 1F2 1B2"""


@st.composite
def schedules(draw):
    """Any schedule that the constructor lets pass, legal or not."""
    n_ranks, n_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ranks = (*range(n_ranks), *draw(st.lists(st.integers(0, n_ranks - 1), max_size=3)))
    kinds = st.sampled_from([kind for kind in Type if not kind.is_send and not kind.is_receive])
    action = st.builds(
        lambda stage, kind, microbatch: Action(stage, kind, microbatch if kind.has_microbatch else None),
        st.integers(0, len(ranks) - 1),
        kinds,
        st.integers(0, n_microbatches - 1),
    )
    programs = st.lists(st.lists(action, max_size=6).map(tuple), min_size=n_ranks, max_size=n_ranks)
    name = draw(st.from_regex(r"[a-z0-9][a-z0-9.+-]{0,6}", fullmatch=True))
    return Schedule(name, n_microbatches, ranks, tuple(draw(programs)))


def test_text():
    assert str(one_f_one_b(2, 3)) == SMALL
    assert Schedule.parse(SMALL) == Schedule.parse(SMALL + "\n") == one_f_one_b(2, 3)


@given(schedules())
def test_text_and_json_round_trip(schedule):
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_json_programs_are_lists_of_text():
    assert one_f_one_b(2, 2).to_dict() == {
        "name": "1f1b",
        "n_microbatches": 2,
        "stage_to_rank": [0, 1],
        "replicas": [1, 1],
        "programs": [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]],
    }


def torch_runtime(n_ranks, n_microbatches):
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, n_ranks, n_ranks, None
    return _PipelineScheduleRuntime([stage], n_microbatches)


@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("compute", [one_f_one_b(3, 4), gpipe(2, 5), one_f_one_b(1, 2)], ids=lambda s: s.name)
def test_torch_reads_our_csv_and_writes_the_same_bytes(tmp_path, compute, form):
    schedule = compute if form == "compute_only" else add_communication(compute)
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_bytes(schedule.to_csv().encode())
    runtime = torch_runtime(schedule.n_ranks, schedule.n_microbatches)
    runtime._load_csv(str(ours), form)
    runtime._dump_csv(str(theirs), form)
    assert theirs.read_bytes() == ours.read_bytes()
    assert Schedule.from_csv(theirs.read_bytes().decode(), schedule.name) == schedule


def test_from_csv_drops_torchs_idle_slots():
    ops = get_schedule_ops("Interleaved1F1B", 2, 4)
    assert any(action is None for program in ops for action in program)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(ops)
    schedule = Schedule.from_csv(text.getvalue(), "interleaved")
    assert [[str(a) for a in p] for p in schedule.programs] == [[str(a) for a in p if a is not None] for p in ops]
    assert (schedule.stage_to_rank, schedule.n_microbatches) == ((0, 1, 0, 1), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a schedule: it begins ''; expected e.g. '1f1b microbatches=4"),
        ("1f1b 3\nrank 0: 0F0", "not a schedule: it begins '1f1b 3'"),
        (SMALL.replace("rank 1", "rank 2"), "line 3 of a schedule begins 'rank 2: 1F0 1B0 1F1 '; expected 'rank 1:'"),
        (SMALL.replace("1B1", "1X1"), "line 3, action 3: not an action: '1X1'"),
        (SMALL + " ", "line 3, action 6: not an action: ''"),
        (SMALL.rsplit("\n", 1)[0], "the rank count does not match: there are 1 programs, but stage_to_rank"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0Q0\r\n", "row 1 of the CSV, action 1: not an action: '0Q0'"),
        ("0F0\r\n0F1\r\n", "0F1 is on rank 1 of the CSV, but its stage is also on rank 0"),
        ("0F0\r\n2F0\r\n", r"the CSV has stages \[0, 2\]; expected all from 0 up"),
        ("0F0\r\n\r\n", "the rank count does not match: there are 2 programs"),
        ("", "the rank count does not match: there are 0 programs"),
        ('0F0,"' + "x" * 200_000, "not a CSV: field larger than field limit"),
    ],
)
def test_from_csv_refuses(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_csv(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "expected the keys"),
        ({"programs": "0F0"}, "stage_to_rank, replicas and programs must be lists"),
        ({"programs": [["0F0", 3]]}, "is not a list of actions in text"),
        ({"programs": [["0F0", "0G0"], []]}, "program 0, action 1: not an action: '0G0'"),
        ({"stage_to_rank": [0, "1"]}, "not a tuple of ranks"),
        ({"n_microbatches": "2"}, "n_microbatches is '2'; expected at least 1"),
    ],
)
def test_from_dict_refuses(change, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_dict(one_f_one_b(2, 2).to_dict() | change)


def test_from_dict_refuses_what_is_no_mapping():
    with pytest.raises(ScheduleError, match="not a schedule: found list; expected the keys"):
        Schedule.from_dict([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("a b", 1, (0,), ((),)), "schedule has name 'a b'; expected letters"),
        (("x", 0, (0,), ((),)), "n_microbatches is 0; expected at least 1"),
        (("x", True, (0,), ((),)), "n_microbatches is True; expected at least 1"),
        (("x", 1, (0,), [()]), "programs are not a tuple of tuples of Action"),
        (("x", 1, [0], ((),)), r"stage_to_rank is \[0\], not a tuple of ranks"),
        (("x", 1, (0, 2), ((), ())), r"there are 2 programs, but stage_to_rank \(0, 2\) uses ranks \[0, 2\]"),
        (("x", 1, (0,), ((), ())), r"there are 2 programs, but stage_to_rank \(0,\) uses ranks \[0\]"),
        (("x", 1, (), ()), "there are 0 programs"),
        (("x", 1, (0,), (("0F0",),)), "rank 0, position 0: '0F0' is not an Action"),
    ],
)
def test_a_schedule_checks_its_fields(fields, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(*fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2F0", "2F0 names stage 2, but the last stage is 1"),
        ("1F3", "1F3 names microbatch 3, but the last is 2"),
        ("0SEND_B0", "0SEND_B0 has no partner: no stage comes before stage 0"),
        ("0RECV_F0", "0RECV_F0 has no partner: no stage comes before stage 0"),
        ("1SEND_F0", "1SEND_F0 has no partner: no stage comes after stage 1"),
        ("1RECV_B0", "1RECV_B0 has no partner: no stage comes after stage 1"),
    ],
)
def test_an_action_out_of_range_is_drawn_in_its_program(text, message):
    with pytest.raises(ScheduleError) as e:
        Schedule.parse(SMALL.replace("1B1", text))
    assert str(e.value) == (
        f"schedule 1f1b: rank 1, position 3: {message}\n"
        f"  rank 1: 1F0 1B0 1F1 {text} 1F2 1B2 (end)\n"
        f"                      {'^' * len(text)}"
    )


def test_excerpt_leaves_out_what_is_far_away():
    schedule = gpipe(1, 10)
    assert schedule.excerpt(0, 10, radius=2) == "  rank 0: .. 0F8 0F9 0B0 0B1 0B2 ..\n                     ^^^"
    assert schedule.excerpt(0, 20, radius=1) == "  rank 0: .. 0B9 (end)\n                 ^^^^^"


def test_compute_only_undoes_lowering():
    lowered = add_communication(one_f_one_b(3, 4))
    assert not lowered.is_compute_only
    assert lowered.compute_only() == one_f_one_b(3, 4)


def test_timeline():
    assert (
        one_f_one_b(3, 4).timeline()
        == """\
rank 0 | 0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3
rank 1 | .   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .
rank 2 | .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   ."""
    )
    assert (
        add_communication(one_f_one_b(3, 4)).timeline(max_slots=5)
        == """\
rank 0 | 0F0 0F1 0F2 ~ .   0B3
rank 1 | .   1F0 1F1 ~ 1B3 .
rank 2 | .   .   2F0 ~ .   .
~ 7 slots not shown"""
    )


@pytest.mark.parametrize("make", [one_f_one_b, gpipe])
@pytest.mark.parametrize("n_stages", [1, 2, 4])
@pytest.mark.parametrize("n_microbatches", [1, 3, 8])
def test_the_grid_is_as_short_as_the_formula_says(make, n_stages, n_microbatches):
    schedule = make(n_stages, n_microbatches)
    grid = schedule.grid()
    assert {len(row) for row in grid} == {2 * (n_microbatches + n_stages - 1)}
    assert tuple(tuple(cell for cell in row if cell) for row in grid) == schedule.programs
    slots = {cell: slot for row in grid for slot, cell in enumerate(row) if cell}
    for microbatch in range(n_microbatches):
        way = [Action(s, Type.F, microbatch) for s in range(n_stages)]
        way += [Action(s, Type.B, microbatch) for s in reversed(range(n_stages))]
        assert all(slots[before] < slots[after] for before, after in pairwise(way))


def test_a_deadlock_has_no_grid():
    with pytest.raises(ScheduleError, match="schedule 1f1b deadlocks, so it has no grid"):
        Schedule.parse(SMALL.replace("0F0 0F1 0B0", "0B0 0F1 0F0")).grid()


def test_replicated_text_and_json_round_trip():
    schedule = one_f_one_b(3, 5, (2, 1, 2))
    assert str(schedule).startswith("1f1b microbatches=5 stage_to_rank=0,2,3 replicas=2,1,2\n")
    assert Schedule.parse(str(schedule)) == schedule == Schedule.from_dict(schedule.to_dict())
    assert [schedule.rank_of(2, m) for m in range(5)] == [3, 4, 3, 4, 3]
    assert list(schedule.homes(Action(2, Type.REDUCE_GRAD))) == [3, 4]


@pytest.mark.parametrize(
    ("stage_to_rank", "replicas", "message"),
    [
        ((0, 2), (2,), r"replicas is \(2,\); expected a number for each of 2 stages"),
        ((0, 2), (2, 0), r"replicas is \(2, 0\); expected a number for each of 2 stages"),
        ((0, 2), [2, 1], r"replicas is \[2, 1\]"),
        ((0, 1), (2, 1), r"stage 0 is replicated, but shares ranks \[1\] with others"),
        ((0, 3), (2, 1), r"with replicas \(2, 1\) uses ranks \[0, 1, 3\]"),
        ((0, 2), (5, 1), "stage 0 has 5 replicas for 4 microbatches"),
    ],
)
def test_replicas_that_cannot_be(stage_to_rank, replicas, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule("x", 4, stage_to_rank, ((),) * 3, replicas)
