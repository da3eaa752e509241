"""What a plan's explanation says, against plans and evaluations made by hand."""

import json

import pytest

from fxpipe.cli import main
from fxpipe.errors import OptionError
from fxpipe.planner import explain
from fxpipe.planner.evaluate import evaluate
from fxpipe.planner.partition import partition

MiB = 2**20


def chain(seconds, output_bytes=0.0, parameter_bytes=0.0, names=None):
    nodes = [
        {
            "id": i,
            "name": names[i] if names else f"layer{i}",
            "forward_seconds": s / 3,
            "backward_seconds": 2 * s / 3,
            "output_bytes": output_bytes,
            "parameter_bytes": parameter_bytes,
        }
        for i, s in enumerate(seconds)
    ]
    return {"nodes": nodes, "edges": [[i, i + 1] for i in range(len(nodes) - 1)]}


def plan(seconds, topology="2@1GB/s", **options):
    return partition(chain(seconds, output_bytes=1e6, parameter_bytes=100 * MiB), topology, max_replicas=1, **options)


def test_a_sweep_goes_from_one_worker_to_the_plan_in_hand():
    result = plan([1, 2, 3, 4], "4@1GB/s")
    found = explain.sweep(result)
    assert [a.n_devices for a in found] == [1, 2, 3, 4]
    assert found[0].seconds == pytest.approx(10)
    assert found[1].seconds == pytest.approx(6)  # 1 2 3 | 4
    assert found[-1].result is result
    assert found[1].replicas == "1-1"


def test_a_sweep_of_a_hierarchy_fills_the_inner_level_first():
    assert [a.n_devices for a in explain.sweep(plan([1, 1, 1, 1], "2@1GB/s x 3@1GB/s"))] == [1, 2, 4, 6]
    assert [a.n_devices for a in explain.sweep(plan([1] * 4, "1@1GB/s x 32@1GB/s"))][-4:] == [4, 8, 16, 32]


def test_what_would_help_is_planned_anew():
    result = plan([1, 1, 1, 1], "3@1GB/s")
    more, twice, _ = explain.what_would_help(result)
    assert (result.bottleneck_seconds, more.seconds, twice.seconds) == pytest.approx((2, 1, 1))
    assert (more.change, more.n_devices, twice.n_devices) == ("one more worker", 4, 6)
    slow_links = plan([1, 1], "2@1MB/s")
    assert slow_links.bottleneck_seconds == pytest.approx(2)  # 1 MB both ways takes as long as both layers
    assert explain.what_would_help(slow_links)[2].seconds == pytest.approx(1)


def test_more_memory_helps_where_it_is_short():
    tight = plan([1, 1, 1, 3], "2@1TB/s, 500MB")
    assert tight.bottleneck_seconds == pytest.approx(4)
    assert explain.what_would_help(tight)[-1].change == "memory without a limit"
    assert explain.what_would_help(tight)[-1].seconds == pytest.approx(3)


def test_a_larger_microbatch_scales_time_and_activations_but_not_parameters():
    result = plan([1, 2])
    larger = explain.scaled(result.profile, 4.0)
    assert larger.compute_seconds.tolist() == pytest.approx([4, 8])
    assert larger.output_bytes.tolist() == [4e6, 4e6]
    assert larger.parameter_bytes.tolist() == result.profile.parameter_bytes.tolist()
    assert [a.seconds for a in explain.microbatch_sizes(result)] == pytest.approx([0.5, 1, 4, 8])


def test_moves_over_a_cut_are_evaluated():
    result = plan([2, 2, 3])
    there, back = explain.moves(result)
    assert (there.node, there.stage, there.to, back.node) == ("layer1 (1)", 0, 1, "layer2 (2)")
    assert back.evaluation is None  # stage 1 would be empty
    by_hand = evaluate(
        result.profile, result.topology, [{"nodes": [0], "devices": [0]}, {"nodes": [1, 2], "devices": [1]}]
    )
    assert there.evaluation == by_hand
    assert by_hand.bottleneck_seconds == pytest.approx(5)


def test_what_depends_on_a_moved_node_goes_along():
    result = plan([1, 1, 1, 3])
    (move,) = explain.moves_of(result, "1")
    assert (move.n_nodes, move.to) == (2, 1)
    assert move.evaluation.bottleneck_seconds == pytest.approx(5)


def test_a_node_is_found_by_id_or_by_a_name_that_is_its_own():
    result = partition(chain([1, 1, 1], names=["a", "b", "b"]), "2@1GB/s", max_replicas=1)
    assert explain.moves_of(result, "a")[0].node == "a (0)"
    with pytest.raises(OptionError, match="unknown node 'c'"):
        explain.moves_of(result, "c")
    with pytest.raises(OptionError, match=r"2 nodes are named 'b'; say which by its id: 1, 2"):
        explain.moves_of(result, "b")


def test_a_stage_of_one_node_is_said_to_be_stuck():
    assert "no cut makes this stage faster" in explain.limit_text(plan([1, 9]))
    assert "no cut" not in explain.limit_text(plan([2, 2, 2]))


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(chain([1, 2, 3, 4], output_bytes=1e6)))
    return str(path)


def test_the_command_prints_all_of_it(profile_file, capsys):
    assert (
        main(["partition", profile_file, "--topology", "4@1GB/s", "--max-replicas", "1", "--sweep", "--explain"]) == 0
    )
    page = capsys.readouterr().out
    for title in ("Fewer workers", "What limits it", "What would help", "Other microbatches", "Why the cuts are here"):
        assert title in page


def test_the_command_as_json(profile_file, capsys):
    assert main(["partition", profile_file, "--topology", "2@1GB/s", "--sweep", "--explain", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["n_devices"] for row in data["sweep"]] == [1, 2]
    assert {"what_would_help", "microbatch_sizes", "moves"} == data["explanation"].keys()
