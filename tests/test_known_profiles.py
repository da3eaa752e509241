"""The layer graphs of the bench against PipeDream: sizes from the papers, and neighbours made one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from known_profiles import MODELS, contracted, known_profile

from fxpipe.planner.profile import read_profile


def node(id, seconds, output, parameters):
    return {
        "id": id,
        "name": str(id),
        "forward_seconds": seconds,
        "backward_seconds": 2 * seconds,
        "output_bytes": output,
        "parameter_bytes": parameters,
    }


def test_neighbours_with_one_key_are_one():
    nodes = [node("a", 1, 10, 100), node("b", 2, 20, 200), node("c", 4, 40, 400), node("d", 8, 80, 800)]
    profile = {"nodes": nodes, "edges": [["a", "b"], ["a", "c"], ["b", "c"], ["c", "d"]]}
    found = contracted(profile, ["x", "y", "y", "x"])
    rows = [(n["name"], n["forward_seconds"], n["output_bytes"], n["parameter_bytes"]) for n in found["nodes"]]
    assert rows == [("x", 1, 10, 100), ("y", 6, 40, 600), ("x", 8, 80, 800)]
    assert found["edges"] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("name", "parameters", "multiplications"),
    [("VGG-16", 138_357_544, 15.5e9), ("ResNet-50", 25_557_032, 4.1e9)],
)
def test_sizes_are_those_of_the_papers(name, parameters, multiplications):
    profile = read_profile(known_profile(name, "A100"))
    assert profile.parameter_bytes.sum() == 4 * parameters
    least = 3 * 2 * 32 * multiplications / 19.5e12  # forward and twice that backward, at the device's peak
    assert least < profile.compute_seconds.sum() < 3 * least


def test_every_family_is_there():
    assert [name.partition("-")[0] for name in MODELS] == [
        "VGG", "ResNet", "Inception", "DenseNet", "NASNet", "GNMT", "BERT", "GPT",
    ]  # fmt: skip
