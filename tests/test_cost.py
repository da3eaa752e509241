"""Cost tables, devices and topologies as values: they check themselves, and print and read back as JSON."""

import json
from dataclasses import replace

import pytest
import sympy

from fxpipe.errors import OptionError, PlanError, VerifyError
from fxpipe.ir.cost import CostTable, Device, NodeCost
from fxpipe.ir.expression import size_symbol
from fxpipe.ir.topology import Level, Topology

BATCH = size_symbol("s0")
LINEAR = NodeCost("linear", "aten.linear.default", 8192, 16384, 2688, 1024, 1024, 2176, 512, 1.5e-6, 3.1e-6)
DYNAMIC = NodeCost(
    "linear_1",
    "aten.linear.default",
    1024 * BATCH,
    2048 * BATCH,
    64 * BATCH + 2176,
    128 * BATCH,
    128 * BATCH,
    2176,
    64 * BATCH,
    sympy.Max(1024 * BATCH / sympy.Integer(10**12), (192 * BATCH + 2176) / sympy.Integer(10**11))
    + sympy.Rational("5e-06"),
    0.0,
)
TABLE = CostTable((LINEAR, DYNAMIC), "H100", "modelled")


def test_a_table_is_a_mapping_in_program_order():
    assert list(TABLE) == ["linear", "linear_1"]
    assert TABLE["linear"] is LINEAR
    assert len(TABLE) == 2
    assert "relu" not in TABLE


def test_dynamic_dimensions_take_numbers():
    bound = TABLE.at({"s0": 8})
    assert bound["linear"] == LINEAR
    assert bound["linear_1"].flops == 1024 * 8
    assert isinstance(bound["linear_1"].flops, int)
    assert bound["linear_1"].forward_seconds == pytest.approx((192 * 8 + 2176) / 1e11 + 5e-6)
    assert isinstance(bound["linear_1"].forward_seconds, float)
    assert TABLE.at({"s9": 8}) == TABLE


def test_json_round_trip():
    assert CostTable.from_json(TABLE.to_json()) == TABLE
    assert CostTable.from_json(TABLE.to_json()).to_json() == TABLE.to_json()


def damaged(**changes):
    content = json.loads(TABLE.to_json())
    content["nodes"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TABLE.to_json()[:-40], "not a cost table"),
        ("[]", "not a cost table"),
        ("{}", "no 'nodes'"),
        ('{"nodes": 3, "device": "cpu", "source": "modelled"}', "not a cost table"),
        ('{"nodes": [3], "device": "cpu", "source": "modelled"}', "not a cost table"),
        ('{"nodes": [], "device": 3, "source": "modelled"}', "3 is not a text"),
        (
            '{"nodes": [], "device": "cpu", "source": "guessed"}',
            "unknown cost source 'guessed'; known: measured, modelled",
        ),
        (damaged(flops=-1), "cost of node linear: flops is -1; expected a finite number, at least 0"),
        (damaged(flops=1.5), "flops is 1.5"),
        (damaged(flops=True), "flops is True"),
        (damaged(flops=None), "flops is None"),
        (damaged(flops="import os"), "not a size expression"),
        (damaged(forward_seconds=float("nan")), "forward_seconds is nan"),
        (damaged(forward_seconds=float("inf")), "forward_seconds is inf"),
        (damaged(name=7), "7 is not a text"),
        (damaged(colour="red"), "colour"),
        (damaged(name="linear_1"), "node linear_1 more than once"),
    ],
)
def test_a_damaged_table_is_refused(text, reason):
    with pytest.raises(PlanError) as caught:
        CostTable.from_json(text)
    assert reason in str(caught.value)


def test_records_check_themselves():
    with pytest.raises(VerifyError, match="saved_bytes is -4"):
        replace(LINEAR, saved_bytes=-4)
    with pytest.raises(VerifyError, match="linear more than once"):
        CostTable((LINEAR, LINEAR), "cpu", "modelled")
    with pytest.raises(OptionError, match="unknown cost source"):
        CostTable((LINEAR,), "cpu", "wished")


def device(**changes):
    fields = {
        "name": "box",
        "flops_per_second": {"float32": 1e12, "bfloat16": 4e12},
        "memory_bytes_per_second": 1e11,
        "memory_bytes": 2**30,
        "launch_seconds": 0.0,
        "source": "made up",
    }
    return Device(**{**fields, **changes})


def test_a_type_without_a_rate_runs_at_that_of_float32():
    assert device().peak_flops_per_second("bfloat16") == 4e12
    assert device().peak_flops_per_second("float64") == 1e12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_per_second": {"bfloat16": 1e12}}, "device box has no float32 rate"),
        ({"flops_per_second": {"float32": 0.0}}, "device box: float32 is 0.0; expected more than 0"),
        ({"memory_bytes_per_second": -1.0}, "device box: memory is -1.0"),
        ({"memory_bytes": 0}, "device box: memory size is 0"),
        ({"launch_seconds": float("nan")}, "device box: launch time is nan; expected at least 0"),
    ],
)
def test_a_device_checks_itself(changes, message):
    with pytest.raises(OptionError, match=message):
        device(**changes)


def test_the_slowest_link_on_the_way_counts():
    topology = Topology((Level(4, 300e9), Level(2, 25e9)))  # 2 machines of 4 devices
    assert topology.n_devices == 8
    assert topology.bandwidth_bytes_per_second(0, 3) == 300e9
    assert topology.bandwidth_bytes_per_second(3, 4) == 25e9
    assert topology.bandwidth_bytes_per_second(5, 5) == float("inf")


def test_a_topology_checks_itself():
    with pytest.raises(OptionError, match="topology level 1 has size 0; expected at least 1"):
        Topology((Level(2, 1.0), Level(0, 1.0)))
    with pytest.raises(OptionError, match=r"topology level 0 has bandwidth 0\.0; expected more than 0"):
        Topology((Level(2, 0.0),))
