"""Tries of one time, as bits, against the dynamic programme over values, which brute force holds to the truth."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from planner.brute_force import best_time
from planner.graphs import FAMILIES, random_profile

from fxpipe.planner import following
from fxpipe.planner.constraints import Constraints
from fxpipe.planner.cost_model import CostModel, link_seconds_per_byte
from fxpipe.planner.cuts import cut_sets, lattice, nested, pairs_of
from fxpipe.planner.device_sets import all_sets, n_moves_of_sets
from fxpipe.planner.feasible import Feasible
from fxpipe.planner.following import Following
from fxpipe.planner.graph import build_graph
from fxpipe.planner.minimax import Limits, minimax
from fxpipe.planner.numberings import numberings
from fxpipe.planner.placement import contiguous
from fxpipe.planner.profile import read_profile
from fxpipe.planner.ranges import Ranges, numbers_of_copies
from fxpipe.planner.stage_bits import Stages, words_of
from fxpipe.planner.topology import parse_topology, topology_dict

TOPOLOGIES = ["5@20B/s", "2@30B/s x 2@5B/s", "2@30B/s x 4@5B/s", "2@30B/s x 2@10B/s x 2@5B/s"]
MODELS = [
    CostModel(),
    CostModel(ring_all_reduce=True),
    CostModel(overlap_all_reduce=True),
    CostModel(serial_links=True),
]
profiles = st.builds(random_profile, st.integers(0, 10**6), st.sampled_from(FAMILIES), st.integers(1, 9))


def cuts_of(data, not_replicated=()):
    constraints = Constraints(None, None, None, {}, tuple(not_replicated))
    graph = build_graph(read_profile(data), constraints)
    cuts = cut_sets(graph, lattice(graph, 10**4))
    return cuts, nested(cuts)


def placements(topology, model):
    yield from (contiguous(Ranges(topology, model, n)) for n in numbers_of_copies(topology))
    yield from map(contiguous, numberings(topology, model))
    yield all_sets(topology, model)


@settings(max_examples=60, deadline=None)
@given(
    profiles,
    st.sampled_from(TOPOLOGIES),
    st.sampled_from(MODELS),
    st.sampled_from([None, 0.3, 0.8]),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.booleans(),
)
def test_the_search_finds_the_best_plan_of_every_placement(data, text, model, memory, max_replicas, single, large):
    cuts, holds = cuts_of(data, [data["nodes"][0]["id"]] if single else [])
    if cuts.n > 150:
        return
    stored = float(cuts.parameters[-1] + cuts.activations[-1])
    limits = Limits(None if memory is None else memory * stored, max_replicas)
    for placement in placements(parse_topology(text), model):
        best = minimax(cuts, pairs_of(holds), placement, model, limits)
        stages = Stages(cuts, holds, model, limits.memory_bytes)
        with pytest.MonkeyPatch.context() as patch:
            if large:  # pairs of moves made in each try, without those that another makes needless
                patch.setattr(following, "MOST_KEPT", -1)
            tries = Feasible(stages, placement, max_replicas)
            assert (tries.following.kept is None) == large
        if best is None:
            assert tries.search(0.0, 1e9) is None
            assert tries.search(0.0, np.inf) is None
            continue
        assert tries.search(0.0, np.inf).cost == pytest.approx(best.cost, rel=1e-8)
        found = tries.search(0.0, 3 * best.cost)
        assert found.cost == pytest.approx(best.cost, rel=1e-8)
        assert found.cuts[0] == 0
        assert found.cuts[-1] == cuts.n - 1
        assert len(found.cuts) == len(found.moves) + 1
        assert sorted(sum(placement.devices(found.moves), ())) == sorted(set(sum(placement.devices(found.moves), ())))
        assert tries.search(0.0, best.cost * (1 - 1e-8)) is None


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(FAMILIES),
    st.sampled_from([(3, "2@30B/s x 3@5B/s"), (2, "2@30B/s x 2@10B/s x 2@5B/s"), (5, "2@30B/s x 2@5B/s")]),
    st.sampled_from([None, 0.4, 0.9]),
)
def test_any_sets_of_devices_are_tried(seed, family, size, memory):
    """Against every plan there is, with pairs of moves made in each try."""
    n, text = size
    data, topology = random_profile(seed, family, n), topology_dict(parse_topology(text))
    stored = sum(node["output_bytes"] + node["parameter_bytes"] for node in data["nodes"])
    topology["memory_bytes"] = None if memory is None else int(memory * stored) + 1
    cuts, holds = cuts_of(data)
    stages = Stages(cuts, holds, CostModel(), topology["memory_bytes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "MOST_KEPT", -1)
        found = Feasible(stages, all_sets(parse_topology(text), CostModel())).search(0.0, np.inf)
    assert (np.inf if found is None else found.cost) == pytest.approx(best_time(data, topology))


@pytest.mark.parametrize("text", ["3@2B/s", "2@10B/s x 3@1B/s", "2@7B/s x 2@5B/s x 2@1B/s", "1@7B/s x 3@5B/s x 2@1B/s"])
def test_sets_that_differ_in_numbers_alone_are_listed_once(text):
    """The number in closed form, and stages on disjoint devices of the sizes that the moves say."""
    topology = parse_topology(text)
    placement = all_sets(topology, CostModel())
    n_states = len(np.unique(placement.source)) + 1  # with the state of all devices taken
    assert len(np.unique(placement.like)) == n_moves_of_sets(topology)[1] - n_states
    rng = np.random.default_rng(0)
    for _ in range(50):
        path, state = [], 0
        while len(out := np.flatnonzero(placement.source == state)):
            path.append(int(rng.choice(out)))
            state = int(placement.target[path[-1]])
        devices = placement.devices(path)
        assert [len(of) for of in devices] == placement.replicas[path].tolist()
        assert sorted(sum(devices, ())) == list(range(topology.n_devices))
        for at, move in enumerate(path):
            shared = CostModel().all_reduce_seconds_per_byte(topology, devices[at])
            assert placement.all_reduce[move] == pytest.approx(shared)
            if at:
                link = max(link_seconds_per_byte(topology, devices[at], devices[at - 1]))
                assert placement.links(np.array([move]), np.array([path[at - 1]])) == pytest.approx(link)


@pytest.mark.parametrize("text", ["2@30B/s x 3@5B/s", "2@30B/s x 2@10B/s x 2@5B/s"])
def test_what_may_be_left_out_gives_a_stage_the_same_devices_with_one_less_taken(text, monkeypatch):
    monkeypatch.setattr(following, "MOST_KEPT", -1)
    placement = all_sets(parse_topology(text), CostModel())
    found = Following(placement, np.arange(placement.n), serial_links=False)
    assert found.fewer is not None
    of_row = {
        name: getattr(placement, name)[found.move_of_row] for name in ("source", "replicas", "taken", "all_reduce")
    }
    assert ((found.fewer >= 0).any(axis=1) == (of_row["source"] > 0)).all()
    rows, at = np.nonzero(found.fewer >= 0)
    less = found.fewer[rows, at]
    assert (of_row["taken"][less] == of_row["taken"][rows] - 1).all()
    assert (of_row["replicas"][less] == of_row["replicas"][rows]).all()
    assert (of_row["all_reduce"][less] == of_row["all_reduce"][rows]).all()


def test_bits_come_back_from_words():
    cuts, holds = cuts_of(random_profile(3, "branchy", 8))
    stages = Stages(cuts, holds, CostModel(), None)
    bits = np.random.default_rng(0).random((5, stages.width)) < 0.5
    assert (stages.bits(words_of(bits)) == bits[:, : cuts.n]).all()


def test_a_stage_keeps_to_a_time_or_not():
    cuts, holds = cuts_of(random_profile(5, "series-parallel", 9))
    stages, pairs = Stages(cuts, holds, CostModel(), None), pairs_of(holds)
    key = (0.5, 0.0, 0.0, True, 2)
    seconds = np.full((cuts.n, cuts.n), np.inf)
    between = [sums[pairs.after] - sums[pairs.before] for sums in (cuts.compute, cuts.parameters)]
    seconds[pairs.after, pairs.before] = (between[0] + 0.5 * between[1]) / 2
    time = float(np.median(seconds[np.isfinite(seconds)]))
    found = np.zeros((cuts.n, 1, stages.width // 64), dtype=np.uint64)
    stages.within([key], time * (1 + 1e-9), found)
    assert (stages.bits(found[:, 0]) == (seconds <= time * (1 + 1e-9))).all()
    assert 0 < stages.bits(found).sum() < len(pairs.after)
