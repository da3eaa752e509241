"""The cost model against arithmetic done by hand, and what makes stages no plan."""

import itertools
import re

import numpy as np
import pytest

from fxpipe.errors import OptionError, VerifyError
from fxpipe.planner.cost_model import CostModel, link_seconds_per_byte
from fxpipe.planner.device_sets import all_sets
from fxpipe.planner.evaluate import evaluate
from fxpipe.planner.plan import read_stages
from fxpipe.planner.profile import read_profile
from fxpipe.planner.ranges import Ranges, numbers_of_copies
from fxpipe.planner.topology import parse_topology

NODE = {"forward_seconds": 1, "backward_seconds": 2, "output_bytes": 10, "parameter_bytes": 6}
# 0 -> 1 -> 2 -> 3, and 0 -> 3 skips what lies between
PROFILE = read_profile({"nodes": [{"id": i, **NODE} for i in range(4)], "edges": [[0, 1], [1, 2], [2, 3], [0, 3]]})
MACHINES = parse_topology("2@10B/s x 2@1B/s")


def plan(*stages):
    return [{"nodes": nodes, "devices": devices} for nodes, devices in stages]


def test_a_pipeline_across_machines_by_hand():
    found = evaluate(PROFILE, MACHINES, plan(([0, 1], [0, 1, 2]), ([2, 3], [3])))
    first, second = found.stages
    # Two groups of devices at the inner level, two machines at the outer: 4 1/2 12 / 10 + 4 1/2 12 / 1.
    assert first.all_reduce_seconds == pytest.approx(2 * 12 / 10 + 2 * 12 / 1)
    assert first.work_seconds == pytest.approx((6 + 26.4) / 3)
    # 20 bytes cross, 2/3 of the first stage's shares lie in the other machine.
    assert found.cut_bytes == (20,)
    assert found.communication_bytes == 40
    assert first.link_out_seconds == second.link_in_seconds == pytest.approx(2 * 20 * (2 / 3) / 1)
    assert (found.bottleneck_seconds, found.bottleneck) == (pytest.approx(80 / 3), "stage 0 link out")
    assert (first.versions, first.memory_bytes) == (2, 2 * (12 + 20))
    assert (second.versions, second.memory_bytes) == (1, 12 + 20)
    assert found.load_ratio == pytest.approx(6 / (12 / 4))


def test_a_value_that_skips_a_stage_is_relayed():
    found = evaluate(PROFILE, parse_topology("4@10B/s"), plan(([0], [0]), ([1, 2], [1]), ([3], [2])))
    assert found.cut_bytes == (10, 20)
    assert [s.link_in_seconds for s in found.stages] == [0, 2, 4]


def test_traffic_over_a_shared_uplink_is_warned_of():
    slow = parse_topology("2@1000B/s x 2@7B/s")
    stages = plan(([0], [0]), ([1], [2]), ([2], [1]), ([3], [3]))
    (warning,) = evaluate(PROFILE, slow, stages).warnings
    # 10, 20 and 20 bytes cross from one machine to the other, each both ways; the slowest cut alone takes 40 / 7.
    assert re.match(
        r"all traffic over the uplink of devices (0-1|2-3) takes 14.3 s .* 2.50 x the slowest stage", warning
    )


def test_a_stage_over_memory_is_warned_of():
    (warning,) = evaluate(PROFILE, parse_topology("1@1GB/s, 60B"), plan(([0, 1, 2, 3], [0]))).warnings
    assert warning == "stage 0 needs 64 B on each device, 4 B too much"


@pytest.mark.parametrize(
    ("model", "work", "seconds"),
    [
        (CostModel(), (3 + 4 * 0.75 * 6 / 2) / 4, 10 * 2 / 2 / 1),
        (CostModel(ring_all_reduce=True), (3 + 2 * 0.75 * 6 / 2) / 4, 10 * 2 / 2 / 1),
        (CostModel(overlap_all_reduce=True), (4 * 0.75 * 6 / 2) / 4, 10 * 2 / 2 / 1),
        (CostModel(serial_links=True), (3 + 4 * 0.75 * 6 / 2) / 4, 9 + 2 * 20 / 2 + 10 * 2 / 2),
    ],
)
def test_the_variants_by_hand(model, work, seconds):
    stages = plan(([0], [0, 1, 2, 3]), ([1, 2], [4]), ([3], [5]))
    found = evaluate(PROFILE, parse_topology("6@2B/s"), stages, model)
    assert found.stages[0].work_seconds == pytest.approx(work)
    if model.serial_links:
        assert found.stages[1].seconds == pytest.approx(6 + 2 * 10 / 2 + 2 * 20 / 2)
    else:
        assert found.stages[1].link_in_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (plan(([0, 1], [0]), ([1, 2, 3], [1])), VerifyError, "node 1 is in stages 0 and 1"),
        (plan(([0, 1], [0]), ([3], [1])), VerifyError, "node 2 is in no stage"),
        (plan(([0, 2], [0]), ([1, 3], [1])), VerifyError, "edge 1 -> 2 goes back from stage 1 to stage 0"),
        (plan(([0, 1], [0]), ([2, 3], [0])), VerifyError, "device 0 is in stages 0 and 1"),
        (plan(([0, 1, 2, 3], [4])), VerifyError, "stage 0 is on device 4; the topology has 4"),
        (plan(([0, 1, 2, 3], [])), VerifyError, "stage 0 of the plan has no devices"),
        (plan(([0, 1, 2, 3], [0]), ([], [1])), VerifyError, "stage 1 of the plan has no nodes"),
        (plan(([0, 1, 2, 5], [0])), OptionError, "stage 0 of the plan has node 5"),
        ([{"nodes": [0]}], OptionError, "stage 0 of the plan has no devices"),
    ],
)
def test_what_is_no_plan_is_refused(stages, error, message):
    with pytest.raises(error, match=message):
        evaluate(PROFILE, MACHINES, stages)


TOPOLOGIES = ["6@3B/s", "2@10B/s x 2@1B/s", "3@10B/s x 4@2B/s", "2@7B/s x 3@5B/s x 2@1B/s", "4@1B/s x 2@9B/s x 2@4B/s"]


@pytest.mark.parametrize("text", TOPOLOGIES)
@pytest.mark.parametrize("model", [CostModel(), CostModel(ring_all_reduce=True)])
def test_ranges_in_closed_form_are_the_cost_model(text, model):
    topology = parse_topology(text)
    for n_copies in numbers_of_copies(topology):
        ranges = Ranges(topology, model, n_copies)
        for a, b, c, d in itertools.combinations_with_replacement(range(ranges.block + 1), 4):
            if not (a < b <= c < d):
                continue
            before, after = ranges.devices(a, b), ranges.devices(c, d)
            expected = max(link_seconds_per_byte(topology, before, after))
            assert ranges.link(*map(np.array, (a, b, c, d))) == pytest.approx(expected)
            expected = model.all_reduce_seconds_per_byte(topology, before)
            assert ranges.all_reduce(np.array(a), np.array(b)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["3@2B/s", "2@10B/s x 2@1B/s", "2@7B/s x 1@5B/s x 2@1B/s"])
def test_moves_of_sets_are_the_cost_model(text):
    topology = parse_topology(text)
    placement = all_sets(topology, CostModel())
    for last in np.flatnonzero(placement.source == 0).tolist():
        for first in np.flatnonzero(placement.source == placement.target[last]).tolist():
            after, before = placement.devices([last, first])
            assert not set(after) & set(before)
            expected = max(link_seconds_per_byte(topology, before, after))
            assert placement.links(np.array([first]), np.array([last])) == pytest.approx(expected)
            expected = CostModel().all_reduce_seconds_per_byte(topology, before)
            assert placement.all_reduce[first] == pytest.approx(expected)


def test_stages_and_their_json_may_be_mixed():
    data = plan(([0, 1], [0]), ([2, 3], [1]))
    first, second = read_stages(PROFILE, data)
    whole = evaluate(PROFILE, MACHINES, data)
    assert evaluate(PROFILE, MACHINES, [first, data[1]]) == whole == evaluate(PROFILE, MACHINES, (first, second))
