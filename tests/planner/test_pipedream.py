"""PipeDream's optimiser, as the bench has it: against brute force over its own formulas, and its loops against its arrays."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from pipedream import plan
from pipedream_loops import plan_in_loops
from pipedream_states import TooLargeError, states_of
from planner.graphs import FAMILIES, random_profile

from fxpipe.planner.evaluate import evaluate
from fxpipe.planner.profile import read_profile
from fxpipe.planner.topology import parse_topology

BANDWIDTH = 20.0


def splits(n, size):
    """Every list of (first, last, units) that covers nodes 0..n-1 of a chain with all units."""
    if n == 0:
        return [[]] if size == 0 else []
    return [
        [*rest, (first, n - 1, units)]
        for first in range(n)
        for units in range(1, size + 1)
        for rest in splits(first, size - units)
    ]


def seconds(profile, stages):
    """By the text of ``pipedream.py``, fault included: the output of the first stage is not charged to it."""
    found = []
    for first, last, units in stages:
        parameters = profile.parameter_bytes[first : last + 1].sum()
        work = profile.compute_seconds[first : last + 1].sum() + 4 * (units - 1) / units * parameters / BANDWIDTH
        found.append(work / units)
        if first > 0:
            found.append(2 * profile.output_bytes[first - 1] / BANDWIDTH / units)
            found.append(2 * profile.output_bytes[last] / BANDWIDTH / units if last < profile.n_nodes - 1 else 0)
    return max(found)


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_against_every_split(seed):
    profile = read_profile(random_profile(seed, "chain", 6))
    topology = parse_topology(f"4@{BANDWIDTH:g}B/s")
    found = plan(profile, topology, states_of(profile, 100), 1e9, 60)
    assert found.predicted_seconds == pytest.approx(min(seconds(profile, s) for s in splits(6, 4)))
    evaluate(profile, topology, found.stages)


@pytest.mark.parametrize("topology", ["4@20B/s", "2@30B/s x 2@5B/s", "2@30B/s x 2@5B/s x 2@3B/s"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loops_and_arrays_agree(family, topology):
    for seed in range(5):
        profile, where = read_profile(random_profile(seed, family, 7)), parse_topology(topology)
        states = states_of(profile, 1000)
        said, _, finished = plan_in_loops(states, where, 60)
        assert finished
        assert plan(profile, where, states, 1e9, 60).predicted_seconds == pytest.approx(said, rel=1e-12)


def test_states_of_a_diamond():
    nodes = [
        {"id": i, "forward_seconds": 1, "backward_seconds": 0, "output_bytes": 10**i, "parameter_bytes": 0}
        for i in range(4)
    ]
    profile = read_profile({"nodes": nodes, "edges": [[0, 1], [0, 2], [1, 3], [2, 3]]})
    states = states_of(profile, 5)
    found = dict(zip(states.members, states.sent.tolist(), strict=True))
    # {0, 1, 2} counts node 0 though both of its readers are in it: one of the faults.
    assert found == {0b1: 1, 0b11: 11, 0b101: 101, 0b111: 111, 0b1111: 1000}
    assert np.all(np.diff([m.bit_count() for m in states.members]) >= -1)
    with pytest.raises(TooLargeError, match="more than 4 states"):
        states_of(profile, 4)
