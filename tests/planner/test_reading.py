"""Profiles and topologies, as JSON and as text, right and wrong."""

import copy
import re

import numpy as np
import pytest
from planner.graphs import random_profile

from fxpipe.errors import OptionError
from fxpipe.ir.topology import Level, Topology
from fxpipe.planner.profile import read_profile
from fxpipe.planner.topology import check_n_devices, parse_topology, read_topology, topology_dict, topology_text

GOOD = random_profile(1, "branchy", 5)


def changed(**fields):
    """GOOD with other fields in node 2."""
    data = copy.deepcopy(GOOD)
    data["nodes"][2].update(fields)
    return data


def without(field):
    data = copy.deepcopy(GOOD)
    del data["nodes"][2][field]
    return data


def with_edges(*edges):
    return {**GOOD, "edges": [*GOOD["edges"], *edges]}


def test_a_profile_reads_what_it_writes():
    assert read_profile(GOOD).to_dict() == {
        "nodes": GOOD["nodes"],
        "edges": [list(e) for e in dict.fromkeys(map(tuple, GOOD["edges"]))],
    }


def test_nodes_may_come_in_any_order_with_any_ids():
    nodes = [{**node, "id": f"n{node['id']}"} for node in reversed(GOOD["nodes"])]
    profile = read_profile({"nodes": nodes, "edges": [[f"n{a}", f"n{b}"] for a, b in GOOD["edges"]]})
    place = np.argsort(profile.order)
    assert (place[profile.edges[:, 0]] < place[profile.edges[:, 1]]).all()


def test_arrays_are_frozen():
    with pytest.raises(ValueError, match="read-only"):
        read_profile(GOOD).forward_seconds[0] = 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "found no list of nodes"),
        ({"nodes": []}, "the profile has no nodes"),
        (changed(id=None), "node 2 of the profile has no id"),
        (changed(id=1), "two nodes with id 1"),
        (changed(forward_seconds=-1), "node 2: forward_seconds is -1; expected a finite number, at least 0"),
        (changed(backward_seconds=float("nan")), "node 2: backward_seconds is nan"),
        (changed(output_bytes=float("inf")), "node 2: output_bytes is inf"),
        (changed(parameter_bytes="4"), "node 2: parameter_bytes is '4'"),
        (changed(parameter_bytes=True), "node 2: parameter_bytes is True"),
        (changed(output_bytes=None), "node 2: output_bytes is None"),
        (without("output_bytes"), "node 2: output_bytes is missing"),
        (with_edges([0, 9]), "edge [0, 9] names node 9, which the profile does not have"),
        (with_edges([0]), "is [0]; expected [source id, target id]"),
        (with_edges([4, 4]), "the profile has a cycle: 4 -> 4"),
    ],
)
def test_a_wrong_profile_is_an_error_that_names_the_item(data, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        read_profile(data)


def test_a_cycle_is_named_in_its_direction():
    nodes = [{**GOOD["nodes"][0], "id": id} for id in "abcd"]
    with pytest.raises(OptionError, match="cycle: 'b' -> 'c' -> 'd' -> 'b'"):
        read_profile({"nodes": nodes, "edges": [["a", "b"], ["b", "c"], ["c", "d"], ["d", "b"]]})


def test_a_topology_as_text_is_the_one_as_json():
    topology = Topology((Level(8, 450e9), Level(4, 50e9)), 80 * 10**9)
    assert parse_topology("8@450GB/s x 4@50GB/s, 80GB") == topology
    assert parse_topology("8@450GB/s x 4@50GB/s", "80GB") == topology
    assert read_topology(topology_dict(topology)) == topology
    assert topology_text(topology) == "8@450 GB/s x 4@50.0 GB/s, 74.5 GiB"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("8@450GB", "'450GB' is not a bandwidth"),
        ("8x4", "'8x4' in topology '8x4' is no level; write SIZE@BANDWIDTH"),
        ("8@0GB/s", "topology level 0 has bandwidth 0.0; expected more than 0"),
        ("8@1GB/s x 0@1GB/s", "topology level 1 has size 0"),
        ({"levels": []}, "found no list of levels"),
        ({"levels": [{"size": 2}]}, "topology level 0: bandwidth_bytes_per_second is missing"),
        ({"levels": [{"size": 2.5, "bandwidth_bytes_per_second": 1}]}, "topology level 0: size is 2.5"),
        ({"levels": [{"size": 2, "bandwidth_bytes_per_second": -1}]}, "topology level 0 has bandwidth -1"),
        ({"levels": [2]}, "topology level 0 is 2; expected an object"),
        ({"levels": [{"size": 1, "bandwidth_bytes_per_second": 1}], "memory_bytes": 0}, "memory of a device is 0"),
    ],
)
def test_a_wrong_topology_is_an_error_that_names_the_level(data, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        read_topology(data)


def test_the_sizes_multiply_to_the_ranks():
    check_n_devices(parse_topology("8@1GB/s x 4@1GB/s"), 32)
    with pytest.raises(OptionError, match="8 x 4 = 32 devices, but there are 16 ranks"):
        check_n_devices(parse_topology("8@1GB/s x 4@1GB/s"), 16)
