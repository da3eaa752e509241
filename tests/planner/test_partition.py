"""Constraints, errors, determinism and the command."""

import copy
import json
import re
import subprocess
import sys

import pytest
from planner.graphs import random_profile

import fxpipe
from fxpipe.cli import main
from fxpipe.errors import OptionError, PartitionError

FLAT = "4@100B/s"
NODE = {"forward_seconds": 1, "backward_seconds": 2, "output_bytes": 10, "parameter_bytes": 0}


def chain(n, **fields):
    nodes = [{"id": i, "name": f"layer_{i}", **NODE, **fields} for i in range(n)]
    return {"nodes": nodes, "edges": [[i, i + 1] for i in range(n - 1)]}


def stage_of(result):
    return {node: s for s, stage in enumerate(result.to_dict()["stages"]) for node in stage["nodes"]}


def replicas(result):
    return [len(stage["devices"]) for stage in result.to_dict()["stages"]]


def test_fifteen_to_one_across_machines():
    """Heavy compute with light parameters, then a layer whose parameters are too heavy to copy."""
    data = chain(2)
    data["nodes"][0].update(forward_seconds=150, backward_seconds=0, output_bytes=1)
    data["nodes"][1].update(forward_seconds=9, backward_seconds=0, parameter_bytes=10**9)
    result = fxpipe.partition(data, "8@1KB/s x 2@100B/s")
    assert replicas(result) == [15, 1]
    assert (result.bottleneck_seconds, result.proved_optimal) == (10, True)


def test_copies_of_a_whole_pipeline():
    """Values too heavy for the links between machines, weights light: each machine runs the pipeline."""
    data = chain(2)
    data["nodes"][1]["parameter_bytes"] = data["nodes"][0]["parameter_bytes"] = 1
    data["nodes"][0]["output_bytes"] = 100
    result = fxpipe.partition(data, "2@1KB/s x 2@10B/s", n_stages=2)
    assert [stage["devices"] for stage in result.to_dict()["stages"]] == [[0, 2], [1, 3]]


def test_nodes_with_one_hint_stay_together_with_all_between():
    result = fxpipe.partition(chain(8), FLAT, stage_hints={2: "mid", "layer_5": "mid"})
    assert len({stage_of(result)[node] for node in (2, 3, 4, 5)}) == 1


@pytest.mark.parametrize("objective", ["time", "communication", "balance"])
def test_nodes_with_different_hints_part(objective):
    result = fxpipe.partition(chain(8), FLAT, objective, stage_hints={2: "a", 3: "b", 4: "c", 5: "d"})
    assert len({stage_of(result)[node] for node in (2, 3, 4, 5)}) == 4


def test_replication_can_be_forbidden_and_limited():
    assert replicas(fxpipe.partition(chain(1), FLAT)) == [4]
    assert replicas(fxpipe.partition(chain(1), FLAT, max_replicas=3)) == [3]
    assert replicas(fxpipe.partition(chain(1), FLAT, not_replicated=[0])) == [1]
    result = fxpipe.partition(chain(2), "16@100B/s", not_replicated=["layer_1"])
    assert replicas(result) == [15, 1] or result.bottleneck_seconds == 3


def test_the_same_plan_every_time():
    data = random_profile(5, "branchy", 200)
    shuffled = copy.deepcopy(data)
    results = [json.dumps(fxpipe.partition(d, "4@100B/s x 2@50B/s").to_dict()) for d in (data, shuffled, data)]
    assert len(set(results)) == 1


@pytest.mark.parametrize("family", ["chain", "branchy", "dense"])
@pytest.mark.parametrize("topology", ["16@100B/s", "4@1KB/s x 4@50B/s", "2@1KB/s x 4@99B/s x 2@50B/s"])
def test_larger_problems_have_valid_plans_within_the_constraints(family, topology):
    data = random_profile(7, family, 120)
    hints = {10: "a", 60: "b"}
    result = fxpipe.partition(data, topology, stage_hints=hints, not_replicated=[5], max_replicas=5)
    assert result.bottleneck_seconds >= result.lower_bound_seconds
    assert max(replicas(result)) <= 5
    assert replicas(result)[stage_of(result)[5]] == 1
    assert stage_of(result)[10] != stage_of(result)[60]
    assert not result.proved_optimal or result.lower_bound_seconds == pytest.approx(result.bottleneck_seconds)


def test_memory_is_kept_to():
    data = random_profile(7, "branchy", 120)
    stored = sum(node["output_bytes"] + node["parameter_bytes"] for node in data["nodes"])
    levels = [{"size": 16, "bandwidth_bytes_per_second": 100}]
    result = fxpipe.partition(data, {"levels": levels, "memory_bytes": stored // 3})
    assert max(stage.memory_bytes for stage in result.evaluation.stages) <= stored // 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "speed"}, OptionError, "unknown objective 'speed'; known: balance, communication, time"),
        ({"n_stages": 0}, OptionError, "n_stages is 0; expected a whole number, at least 1"),
        ({"max_replicas": 1.5}, OptionError, "max_replicas is 1.5"),
        ({"objective": "balance", "max_load_ratio": 0.9}, OptionError, "max_load_ratio is 0.9; expected"),
        ({"max_load_ratio": 1.1}, OptionError, "objective 'time' has stages of several devices"),
        ({"stage_hints": {"layer_9": 0}}, OptionError, "unknown node 'layer_9'; known: 0, 1, 2"),
        ({"not_replicated": [9]}, OptionError, "unknown node '9'"),
        ({"n_stages": 5}, PartitionError, "5 stages need 5 devices; the topology has 4, 1 too few"),
        ({"n_stages": 4}, PartitionError, "4 stages need 4 nodes; the profile has 3 nodes, 1 too few"),
        ({"objective": "balance"}, PartitionError, "4 stages need 4 nodes"),
        (
            {"n_stages": 3, "stage_hints": {0: "a", 1: "a"}},
            PartitionError,
            "the profile has 2 nodes or groups of nodes that stay together, 1 too few",
        ),
        (
            {"n_stages": 1, "stage_hints": {0: "a", 1: "b"}},
            PartitionError,
            "2 different stage hints need 2 stages, but there are 1 stages, 1 too few",
        ),
        (
            {"stage_hints": {0: "a", 1: "b", 2: "a"}},
            PartitionError,
            "stage hints 'a' and 'b' cannot be parted",
        ),
        (
            {"objective": "communication", "n_stages": 2, "max_load_ratio": 1.2},
            PartitionError,
            "no plan of 2 stages was found with the busiest at most 1.2 x the mean; the most even one has 1.333 x",
        ),
    ],
)
def test_what_cannot_be_asked_or_done_is_an_error(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fxpipe.partition(chain(3), FLAT, **options)


def test_hints_that_wait_for_each_other_cannot_be_parted():
    data = {"nodes": [{"id": id, **NODE} for id in "abcd"], "edges": [["a", "b"], ["c", "d"]]}
    assert fxpipe.partition(data, FLAT, stage_hints={"a": 1, "d": 1, "b": 2}) is not None
    with pytest.raises(PartitionError, match="stage hints '1' and '2' cannot be parted"):
        fxpipe.partition(data, FLAT, stage_hints={"a": 1, "d": 1, "b": 2, "c": 2})


def test_a_node_larger_than_memory_is_named_with_what_is_too_much():
    data = chain(3)
    data["nodes"][1]["parameter_bytes"] = 100
    with pytest.raises(PartitionError, match=r"node 1 needs 110 B \(parameters 100 B\), 10 B more than the memory"):
        fxpipe.partition(data, "4@100B/s, 100B")


@pytest.mark.parametrize("n", [3, 40])
def test_too_little_memory_says_how_much_is_needed(n):
    with pytest.raises(PartitionError, match=r"no plan fits into 21 B .* about (\d+ B|.* KiB) are needed"):
        fxpipe.partition(chain(n, parameter_bytes=10), "2@100B/s, 21B")


# The command.


@pytest.fixture
def profile(tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(chain(6)))
    return str(file)


def test_the_command_prints_json(profile, tmp_path, capsys):
    topology = tmp_path / "topology.json"
    topology.write_text('{"levels": [{"size": 4, "bandwidth_bytes_per_second": 100}], "memory_bytes": null}')
    assert main(["partition", profile, "--topology", str(topology), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == fxpipe.partition(chain(6), FLAT).to_dict()
    assert {"stages", "bottleneck_seconds", "lower_bound_seconds", "proved_optimal"} <= set(found)


def test_the_command_prints_a_page_that_names_what_limits(profile, capsys):
    line = ["partition", profile, "--topology", FLAT, "--objective", "balance", "--stages", "2", "--memory", "1KiB"]
    assert main(line) == 0
    page = capsys.readouterr().out
    assert page.startswith("6 nodes in 2 stages on 2 of 4 devices (4@100 B/s, 1.00 KiB), objective balance")
    assert re.search(r"layer_0 \.\. layer_2 \(3\) +0 ", page)
    assert "slowest   9 s for each microbatch (*): stage 0 compute" in page
    assert "proved optimal for balance" in page


def test_hints_of_the_command_are_ids_or_names(profile, capsys):
    line = ["partition", profile, "--topology", FLAT, "--json", "--stage-hint", "1=a", "--stage-hint", "layer_2=b"]
    assert main([*line, "--not-replicated", "0", "--max-replicas", "1"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert not any({1, 2} <= set(stage["nodes"]) for stage in stages)
    assert all(len(stage["devices"]) == 1 for stage in stages)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("missing.json --topology 4@1GB/s", 2, "cannot read missing.json: No such file"),
        ("PROFILE --topology missing.json", 2, "cannot read missing.json"),
        ("PROFILE --topology PROFILE", 2, "found no list of levels"),
        ("PROFILE --topology 4@1GB/s --objective fast", 2, "unknown objective 'fast'"),
        ("PROFILE --topology 4@1GB/s --stages 9", 1, "9 stages need 9 devices"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(line, code, message, profile, capsys):
    assert main(["partition", *line.replace("PROFILE", profile).split()]) == code
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    assert main(["partition", str(tmp_path / "broken.json"), "--topology", FLAT]) == 2
    assert "broken.json is not JSON" in capsys.readouterr().err


def test_the_command_loads_no_torch(profile):
    code = (
        "import sys; from fxpipe.cli import main; "
        f"main(['partition', {profile!r}, '--topology', '{FLAT}']); "
        "print({'torch', 'sympy', 'triton'} & set(sys.modules))"
    )
    shell = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shell.stdout.strip().endswith("set()"), shell.stderr
