"""Plans against every plan there is (``brute_force.py``), and the searches of large problems against the exact one."""

from functools import cache
from itertools import combinations
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from planner.brute_force import best_time, best_with_single_devices
from planner.graphs import FAMILIES, random_profile

from fxpipe.errors import PartitionError
from fxpipe.planner import fastest, single_devices
from fxpipe.planner.constraints import Constraints
from fxpipe.planner.cost_model import CostModel, link_seconds_per_byte
from fxpipe.planner.cuts import cut_sets, cuts_of_order, lattice, nested, nested_line, pairs_of, sets_of_orders
from fxpipe.planner.evaluate import evaluate
from fxpipe.planner.graph import build_graph
from fxpipe.planner.line import Line
from fxpipe.planner.minimax import Limits, minimax
from fxpipe.planner.numberings import numberings
from fxpipe.planner.orders import some_orders
from fxpipe.planner.partition import partition
from fxpipe.planner.placement import contiguous
from fxpipe.planner.problem import Problem
from fxpipe.planner.profile import read_profile
from fxpipe.planner.ranges import Ranges, numbers_of_copies
from fxpipe.planner.topology import parse_topology, topology_dict

FLAT, MACHINES = parse_topology("4@20B/s"), parse_topology("2@30B/s x 2@5B/s")
profiles = st.builds(random_profile, st.integers(0, 10**6), st.sampled_from(FAMILIES), st.integers(1, 7))
small = settings(max_examples=40, deadline=None)


def seconds_of(data):
    return sum(node["forward_seconds"] + node["backward_seconds"] for node in data["nodes"])


def time_or_none(data, topology, **options):
    try:
        result = partition(data, topology, **options)
    except PartitionError:
        return inf
    found = evaluate(result.profile, result.topology, result.to_dict()["stages"])
    assert found.bottleneck_seconds == result.bottleneck_seconds
    assert result.lower_bound_seconds <= result.bottleneck_seconds
    assert result.proved_optimal
    assert not any("too much" in warning for warning in result.evaluation.warnings)
    return result.bottleneck_seconds


@small
@given(profiles, st.sampled_from([FLAT, MACHINES]), st.sampled_from([None, 0.3, 0.8, 1.5]))
def test_no_plan_is_faster(data, topology, memory):
    stored = sum(node["output_bytes"] + node["parameter_bytes"] for node in data["nodes"])
    topology = {**topology_dict(topology), "memory_bytes": None if memory is None else int(memory * stored) + 1}
    assert time_or_none(data, topology) == pytest.approx(best_time(data, topology))


@small
@given(profiles, st.sampled_from([FLAT, MACHINES]), st.integers(1, 4))
def test_no_plan_of_so_many_stages_is_faster(data, topology, n_stages):
    expected = best_time(data, topology_dict(topology), n_stages)
    assert time_or_none(data, topology, n_stages=n_stages) == pytest.approx(expected)


@small
@given(profiles, st.integers(1, 4), st.sampled_from([1.0, 1.1, 1.5, 3.0]))
def test_no_plan_is_more_even_or_moves_less(data, n_stages, ratio):
    cap = ratio * seconds_of(data) / n_stages
    load, moved = best_with_single_devices(data, n_stages, cap)
    if load == inf:
        return
    even = partition(data, FLAT, "balance", n_stages)
    assert max(stage.compute_seconds for stage in even.evaluation.stages) == pytest.approx(load)
    if moved == inf:
        with pytest.raises(PartitionError, match=r"the most even one has \d"):
            partition(data, FLAT, "communication", n_stages, ratio)
        return
    light = partition(data, FLAT, "communication", n_stages, ratio)
    assert light.proved_optimal
    assert light.evaluation.communication_bytes == pytest.approx(moved)
    assert light.evaluation.load_ratio <= ratio * (1 + 1e-9)


@pytest.mark.parametrize("text", ["12@20B/s", "3@30B/s x 4@5B/s", "2@30B/s x 2@9B/s x 3@5B/s"])
@pytest.mark.parametrize("model", [CostModel(), CostModel(ring_all_reduce=True), CostModel(overlap_all_reduce=True)])
@pytest.mark.parametrize("memory", [None, 0.4])
def test_the_search_along_an_order_is_as_good_as_the_exact_one(text, model, memory):
    topology = parse_topology(text)
    for seed in range(3):
        profile = read_profile(random_profile(seed, "chain", 40))
        graph = build_graph(profile, Constraints(not_replicated=(3,), stage_hints={5: "a", 30: "b"}))
        stored = float((graph.parameters + graph.activations).sum())
        limits = Limits(None if memory is None else memory * stored, max_replicas=6)
        cuts = cuts_of_order(graph, np.arange(graph.n))
        for n_copies in numbers_of_copies(topology)[:3]:
            line = Line(cuts, Ranges(topology, model, n_copies), model, limits)
            if not len(line.sizes):
                continue
            exact = minimax(
                cuts, pairs_of(nested_line(cuts.n)), contiguous(Ranges(topology, model, n_copies)), model, limits
            )
            found = line.search(float(graph.compute.sum()) / topology.n_devices, inf, 1e-4)
            if exact is None:
                assert found is None
            else:
                assert found is not None
                assert found.seconds <= exact.cost * (1 + 1e-4)  # it may leave devices idle, so it may be better


@pytest.mark.parametrize("n_stages", [1, 3, 5])
def test_the_search_along_an_order_keeps_to_the_number_of_stages(n_stages):
    graph = build_graph(read_profile(random_profile(1, "chain", 40)), Constraints())
    cuts, limits, topology = cuts_of_order(graph, np.arange(40)), Limits(n_stages=n_stages), parse_topology("8@20B/s")
    exact = minimax(cuts, pairs_of(nested_line(41)), contiguous(Ranges(topology, CostModel(), 1)), CostModel(), limits)
    found = Line(cuts, Ranges(topology, CostModel(), 1), CostModel(), limits).search(1e-3, inf, 1e-4)
    assert len(found.starts) == len(exact.moves) == n_stages
    assert found.seconds <= exact.cost * (1 + 1e-4)


@pytest.mark.parametrize("family", ["branchy", "dense", "series-parallel"])
def test_the_search_over_orders_is_near_the_exact_one(family, monkeypatch):
    """With the exact search out of reach, on graphs where it can still be asked what is best."""
    ratios = []
    for seed in range(12):
        data = random_profile(seed, family, 12)
        exact = [partition(data, topology).bottleneck_seconds for topology in (FLAT, MACHINES)]
        with monkeypatch.context() as patch:
            patch.setattr(fastest, "MOST_CUTS", 0)
            found = [partition(data, topology) for topology in (FLAT, MACHINES)]
        ratios += [f.bottleneck_seconds / e for f, e in zip(found, exact, strict=True)]
        assert all(f.lower_bound_seconds <= e * (1 + 1e-9) for f, e in zip(found, exact, strict=True))
    assert min(ratios) >= 1 - 1e-9
    assert np.exp(np.mean(np.log(ratios))) < 1.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fixed_stage_searches_over_orders_are_exact_on_chains_and_near_it_elsewhere(family, monkeypatch):
    for seed in range(8):
        data = random_profile(seed, family, 12)
        exact = [partition(data, FLAT, o, 3, r) for o, r in (("balance", None), ("communication", 2.5))]
        with monkeypatch.context() as patch:
            patch.setattr(fastest, "MOST_CUTS", 0)
            found = [partition(data, FLAT, o, 3, r) for o, r in (("balance", None), ("communication", 2.5))]
        loads = [max(s.compute_seconds for s in result[0].evaluation.stages) for result in (found, exact)]
        moved = [result[1].evaluation.communication_bytes for result in (found, exact)]
        most = 1 + 1e-9 if family == "chain" else 1.35
        assert 1 - 1e-9 <= loads[0] / loads[1] <= most
        assert moved[1] * (1 - 1e-9) <= moved[0] <= moved[1] * max(most, 2)
        assert found[0].proved_optimal == (family == "chain") or loads[0] == pytest.approx(loads[1])


def test_every_order_can_run_and_every_cut_is_a_down_set():
    for family in FAMILIES:
        graph = build_graph(read_profile(random_profile(2, family, 9)), Constraints())
        for order in some_orders(graph):
            place = np.argsort(order)
            assert all(place[a] < place[b] for a in range(9) for b in graph.successors[a])
            line, sets = cuts_of_order(graph, order), cut_sets(graph, sets_of_orders(graph, [order]))
            np.testing.assert_allclose(line.crossing, sets.crossing)
            np.testing.assert_allclose(line.compute, sets.compute)
        cuts = cut_sets(graph, lattice(graph, 1 << 9))
        down_sets = [
            bits
            for bits in range(1 << 9)
            if all(bits >> a & 1 for b in range(9) if bits >> b & 1 for a in graph.predecessors[b])
        ]
        assert cuts.n == len(down_sets)
        holds = nested(cuts)
        assert (
            len(pairs_of(holds).after)
            == holds.sum()
            == sum(a & b == a and a != b for a in down_sets for b in down_sets)
        )


def test_too_many_cuts_are_not_listed(monkeypatch):
    profile, constraints = read_profile(random_profile(2, "chain", 9)), Constraints()
    graph = build_graph(profile, constraints)
    assert lattice(graph, 9) is None
    assert lattice(graph, 10).shape == (10, 9)
    cuts, topology = cut_sets(graph, lattice(graph, 10)), parse_topology("4@20B/s")
    assert (nested(cuts) == nested_line(10)).all()
    problem = Problem(profile, topology, CostModel(), constraints, graph)
    assert fastest.all_cuts(problem)[1].sum() == 45
    monkeypatch.setattr(fastest, "MOST_PAIRS", 44)
    assert fastest.all_cuts(problem) is None
    assert single_devices.MOST_STEPS == fastest.MOST_STEPS


def every_numbering(topology, model):
    return [Ranges(topology, model, 1), *numberings(topology, model)]


@pytest.mark.parametrize("text", ["4@30B/s x 4@5B/s", "3@30B/s x 2@5B/s", "2@30B/s x 4@9B/s x 2@5B/s"])
@pytest.mark.parametrize("model", [CostModel(), CostModel(ring_all_reduce=True)])
def test_ranges_are_charged_as_the_cost_model_says(text, model):
    topology = parse_topology(text)
    for ranges in every_numbering(topology, model):
        assert sorted(ranges.devices(0, ranges.block)) == list(range(topology.n_devices))
        for start, middle, end in combinations(range(ranges.block + 1), 3):
            before, after = ranges.devices(start, middle), ranges.devices(middle, end)
            found = ranges.link(*(np.array([at]) for at in (start, middle, middle, end)))[0]
            assert found == pytest.approx(max(link_seconds_per_byte(topology, before, after)))
            shared = ranges.all_reduce(np.array([start]), np.array([middle]))[0]
            assert shared == pytest.approx(model.all_reduce_seconds_per_byte(topology, before))


def fastest_ending_at(profile, topology, last):
    """Over all ranges of a chain whose last stage ends at device ``last`` - 1: stage by stage, by the cost model alone."""
    n, model, crossing = profile.n_nodes, CostModel(), [0.0, *profile.output_bytes[:-1], 0.0]

    @cache
    def best(node, device, end):  # of the first nodes, the last of their stages on devices [device, end)
        devices, found = tuple(range(device, end)), inf
        shared = model.all_reduce_seconds_per_byte(topology, devices)
        for first in range(node):
            rows = slice(first, node)
            seconds = profile.compute_seconds[rows].sum() + shared * profile.parameter_bytes[rows].sum()
            before = 0.0 if first == 0 else inf
            for start in range(device if first else 0):
                links = link_seconds_per_byte(topology, tuple(range(start, device)), devices)
                before = min(before, max(max(links) * crossing[first], best(first, start, device)))
            found = min(found, max(seconds / len(devices), before))
        return found

    return min(best(n, device, last) for device in range(last))


def test_the_last_devices_may_stay_idle():
    topology, gains = parse_topology("4@60B/s x 2@5B/s"), []
    for seed in (0, 1, 44):
        profile = read_profile(random_profile(seed, "chain", 7))
        graph = build_graph(profile, Constraints())
        cuts, ranges = cuts_of_order(graph, np.arange(7)), Ranges(topology, CostModel(), 1)
        found = minimax(cuts, pairs_of(nested_line(8)), contiguous(ranges), CostModel(), Limits())
        by_end = [fastest_ending_at(profile, topology, last) for last in range(8, 8 - ranges.most_idle - 1, -1)]
        assert found.cost == pytest.approx(min(by_end))
        assert minimax(cuts, pairs_of(nested_line(8)), contiguous(ranges), CostModel(), Limits(), found.cost) is None
        above = found.cost * (1 + 1e-9)
        assert (
            minimax(cuts, pairs_of(nested_line(8)), contiguous(ranges), CostModel(), Limits(), above).cost == found.cost
        )
        line = Line(cuts, ranges, CostModel(), Limits()).search(1e-3, inf, 1e-4)
        assert line.seconds <= found.cost * (1 + 1e-4)
        gains.append(by_end[0] / min(by_end))
    assert max(gains) > 1.004


def test_other_numberings_of_the_devices_are_tried():
    data, topology, model = random_profile(2, "chain", 5), parse_topology("4@60B/s x 4@15B/s"), CostModel()
    found = partition(data, topology)
    cuts = cuts_of_order(build_graph(read_profile(data), Constraints()), np.arange(5))
    blocks = [Ranges(topology, model, n) for n in numbers_of_copies(topology)]
    plain = [minimax(cuts, pairs_of(nested_line(6)), contiguous(ranges), model, Limits()).cost for ranges in blocks]
    assert found.bottleneck_seconds < min(plain) / 1.05
    assert evaluate(found.profile, topology, found.stages).bottleneck_seconds == found.bottleneck_seconds
