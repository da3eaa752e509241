"""The cut for given replicas against brute force over every cut, in whole numbers."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from cuts.test_cut_search import brute_force, chains
from hypothesis import given, settings, strategies as st

from fxpipe.cuts.chain import Chain, Limits, Shared
from fxpipe.cuts.replicated_cuts import ReplicatedSearch


def slowest(chain, cut, limits, ticks_per_byte):
    """The bottleneck as the docstring has it: compute and all-reduce over the replicas, links side by side."""
    replicas, n = limits.replicas, limits.n_microbatches or 1
    times = [0]
    for r, (a, b) in zip(replicas, pairwise(cut.boundaries), strict=True):
        ticks = sum(chain.ticks[a:b])
        for item in (s for s in chain.shared if any(a <= p < b for p in s.positions)):
            ticks += item.ticks + round(item.state_bytes * (r - 1) * ticks_per_byte / n)
        times.append(-(-ticks // r))
    for b, pair in zip(cut.boundaries[1:-1], pairwise(replicas), strict=True):
        times.append(-(-chain.link_ticks[b] // min(pair)))
    return max(times)


def replicates(chain, cut, replicas):
    """Whether a stage of several replicas has what is to be alone."""
    stages = zip(replicas, pairwise(cut.boundaries), strict=True)
    return any(r > 1 and any(a <= p < b for p in chain.alone) for r, (a, b) in stages)


@settings(max_examples=300, deadline=None)
@given(
    chains(),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    st.none() | st.integers(0, 90),
    st.none() | st.integers(1, 6),
    st.fractions(0, 3, max_denominator=8),
    st.sets(st.integers(0, 8), max_size=2),
)
def test_finds_the_best_cut_or_none_exists(chain, replicas, memory_bytes, n_microbatches, ticks_per_byte, alone):
    chain = replace(chain, alone=tuple(sorted(p for p in alone if p < len(chain.ticks))))
    limits = Limits(len(replicas), memory_bytes, n_microbatches, replicas)
    allowed = (cut for cut in brute_force(chain, limits) if not replicates(chain, cut, replicas))
    known = {cut.boundaries: slowest(chain, cut, limits, ticks_per_byte) for cut in allowed}
    found = ReplicatedSearch(chain, limits, ticks_per_byte).best()
    assert (found is None) == (not known)
    if found is not None:
        assert found.bottleneck_ticks == min(known.values()) == known[found.boundaries]
        assert memory_bytes is None or max(found.memory_bytes) <= memory_bytes


def plain(ticks, link=None, state=0):
    n = len(ticks)
    none = (0,) * (n + 1)
    shared = (Shared((0,), state_bytes=state),) if state else ()
    return Chain(tuple(ticks), (0,) * n, shared, tuple(range(1, n)), tuple(link or none), none, none)


def best(chain, replicas, n_microbatches=8, ticks_per_byte=0):
    return ReplicatedSearch(
        chain, Limits(len(replicas), None, n_microbatches, replicas), Fraction(ticks_per_byte)
    ).best()


def test_fifteen_and_one():
    """PipeDream's VGG: what has the work is replicated, what has the parameters is not."""
    cut = best(plain([30] * 15 + [30]), (15, 1))
    assert (cut.boundaries, cut.ticks, cut.bottleneck_ticks) == ((0, 15, 16), (30, 30), 30)


def test_a_wide_link_carries_more():
    chain = plain([6, 6, 6, 6], link=[0, 90, 90, 90, 0])
    assert best(chain, (1, 3)).bottleneck_ticks == 90
    assert best(chain, (2, 2)).bottleneck_ticks == 45


def test_replicas_pay_for_their_parameters_once_a_step():
    """Of 80 bytes, 40 of them gradients, four replicas send 2 * 3/4 * 40 = 60 in a ring; one of 6 microbatches bears 10."""
    assert best(plain([0, 8], state=80), (4,), n_microbatches=6, ticks_per_byte=1).bottleneck_ticks == 2 + 10


@pytest.mark.parametrize(("n_microbatches", "in_flight"), [(None, [4, 2, 1]), (8, [4, 2, 1]), (3, [3, 2, 1])])
def test_microbatches_in_flight(n_microbatches, in_flight):
    """Stage 1, of two ranks: one microbatch for the rank after it, shared by the two, and its own."""
    limits = Limits(3, None, n_microbatches, (1, 2, 1))
    assert [limits.in_flight(s) for s in range(3)] == in_flight
