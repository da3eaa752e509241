"""schedule-stages: the right order for the partition, verified; every refusal."""

import re

import pytest
from stages import traced

from fxpipe.errors import OptionError, ScheduleError, VerifyError
from fxpipe.ir.partition import Partition, StagePlan
from fxpipe.ir.schedule import Schedule
from fxpipe.pass_base import parse_pass
from fxpipe.pass_manager import Pipeline
from fxpipe.passes.schedule import ScheduleStages


def partitioned(n_stages):
    names, no = (), 0
    stages = (StagePlan(i, *[names] * 7, 0.0, 0.0, *[no] * 4) for i in range(n_stages))
    return traced("mlp").with_facts(Partition(tuple(stages), (), "time", 0.0, "stage 0 compute", 0.0, ""))


def programs(n_stages, **options):
    schedule = ScheduleStages(**options).run(partitioned(n_stages)).fact(Schedule)
    assert schedule.is_compute_only
    return [" ".join(map(str, program)) for program in schedule.programs]


def test_one_stage():
    assert programs(1) == ["0F0 0B0"]


def test_1f1b_is_that_of_the_docstring():
    expected = re.findall(r"rank \d: (.*)", ScheduleStages.__doc__)
    assert programs(2, n_microbatches=3) == expected == ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]


def test_gpipe():
    assert programs(2, n_microbatches=2, order="gpipe") == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_the_graph_is_left_alone():
    before = partitioned(2)
    after = ScheduleStages(n_microbatches=2).run(before)
    assert after.graph_module is before.graph_module
    assert set(after.facts) == {Partition, Schedule}


def test_a_limit_on_microbatches_in_flight():
    assert len(programs(3, n_microbatches=8, max_in_flight=3)) == 3  # 1F1B never holds more than there are stages
    with pytest.raises(ScheduleError, match=r"rank 0.*in flight"):
        programs(3, n_microbatches=8, max_in_flight=2)
    with pytest.raises(ScheduleError, match="in flight"):
        programs(3, n_microbatches=8, order="gpipe", max_in_flight=3)


def test_wrong_options():
    with pytest.raises(OptionError, match="unknown schedule 'zigzag'; known: 1f1b, gpipe"):
        ScheduleStages(order="zigzag")
    for n in (0, -1):
        with pytest.raises(OptionError, match=f"n_microbatches is {n}; expected at least 1"):
            ScheduleStages(n_microbatches=n)
    with pytest.raises(OptionError, match="unknown schedule"):
        parse_pass("schedule-stages{order=zigzag}", {"schedule-stages": ScheduleStages})


def test_it_requires_a_partition():
    with pytest.raises(VerifyError, match="schedule-stages requires Partition"):
        Pipeline((ScheduleStages(),))
    with pytest.raises(VerifyError, match="the program has no Partition"):
        ScheduleStages().run(traced("mlp"))
