"""The search against brute force over every cut, in whole numbers, and its speed."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings, strategies as st

from fxpipe.cuts.chain import Chain, Cut, Limits, Shared
from fxpipe.cuts.cut_search import CutSearch
from fxpipe.errors import VerifyError


def stage_usage(chain, a, b):
    shared = [s for s in chain.shared if any(a <= p < b for p in s.positions)]
    ticks = sum(chain.ticks[a:b]) + sum(s.ticks for s in shared)
    saved = sum(chain.saved_bytes[a:b]) + sum(s.saved_bytes for s in shared)
    return ticks, saved, sum(s.state_bytes for s in shared)


def stage_memory(chain, a, b, stage, limits):
    _, saved, state = stage_usage(chain, a, b)
    once = state + chain.gradient_bytes[a] + chain.activation_bytes[b] + chain.gradient_bytes[b]
    return once + limits.in_flight(stage) * (saved + chain.activation_bytes[a])


def evaluated(chain, boundaries, limits):
    """The cut as the definitions in chain.py and cut_search.py have it, without prefix sums."""
    stages = list(enumerate(pairwise(boundaries)))
    ticks = tuple(stage_usage(chain, a, b)[0] for _, (a, b) in stages)
    memory = tuple(stage_memory(chain, a, b, s, limits) for s, (a, b) in stages)
    return Cut(tuple(boundaries), ticks, memory, max(*ticks, *(chain.link_ticks[b] for b in boundaries[1:-1]), 0))


def brute_force(chain, limits):
    """Every allowed cut: each stage with work, each within the memory."""
    n = len(chain.ticks)
    for inner in combinations(chain.legal, limits.n_stages - 1):
        cut = evaluated(chain, (0, *inner, n), limits)
        fits = limits.memory_bytes is None or max(cut.memory_bytes) <= limits.memory_bytes
        fits &= all(any(first < b <= last for b in inner) for first, last in chain.apart)
        if fits and (limits.n_stages == 1 or min(cut.ticks) > 0):
            yield cut


small = st.integers(0, 6)


@st.composite
def chains(draw):
    n = draw(st.integers(1, 9))
    shared = st.builds(
        Shared, st.sets(st.integers(0, n - 1), min_size=1).map(lambda s: tuple(sorted(s))), small, small, small
    )

    def numbers(length):
        return tuple(draw(st.lists(small, min_size=length, max_size=length)))

    def at_cuts():
        return (0, *numbers(n - 1), 0)

    legal = tuple(sorted(draw(st.sets(st.integers(1, n - 1))))) if n > 1 else ()
    items = tuple(draw(st.lists(shared, max_size=4)))
    places = sorted(draw(st.sets(st.integers(0, n - 1), max_size=4)))
    apart = tuple(zip(places[::2], places[1::2], strict=False))
    return Chain(numbers(n), numbers(n), items, legal, at_cuts(), at_cuts(), at_cuts(), apart)


@settings(max_examples=400, deadline=None)
@given(chains(), st.integers(1, 5), st.none() | st.integers(0, 90), st.none() | st.integers(1, 4))
def test_finds_the_best_cut_or_none_exists(chain, n_stages, memory_bytes, n_microbatches):
    limits = Limits(n_stages, memory_bytes, n_microbatches)
    known = list(brute_force(chain, limits))
    found = CutSearch(chain).best(limits)
    assert (found is None) == (not known)
    if found is not None:
        assert found == evaluated(chain, found.boundaries, limits)
        assert found in known
        assert found.bottleneck_ticks == min(cut.bottleneck_ticks for cut in known)


@settings(max_examples=300, deadline=None)
@given(chains(), st.integers(1, 4), st.none() | st.integers(1, 4))
def test_least_memory_is_the_least_with_which_a_cut_exists(chain, n_stages, n_microbatches):
    chain = replace(chain, apart=())
    search = CutSearch(chain)
    if n_stages <= search.most_stages():
        known = brute_force(chain, Limits(n_stages, None, n_microbatches))
        least = min(max(cut.memory_bytes) for cut in known)
        assert least <= search.least_memory_bytes(Limits(n_stages, None, n_microbatches)) <= least * 257 / 256


@settings(max_examples=300, deadline=None)
@given(chains())
def test_most_stages(chain):
    chain = replace(chain, apart=())
    possible = [s for s in range(1, 10) if any(True for _ in brute_force(chain, Limits(s)))]
    assert CutSearch(chain).most_stages() == max(possible)
    assert possible == list(range(1, max(possible) + 1))


def plain(ticks, link=None, legal=None):
    n = len(ticks)
    link = link or (0,) * (n + 1)
    return Chain(tuple(ticks), (0,) * n, (), legal or tuple(range(1, n)), tuple(link), tuple(link), (0,) * (n + 1))


@settings(max_examples=300, deadline=None)
@given(chains())
def test_least_stages_is_a_bound(chain):
    possible = [s for s in range(1, 10) if any(True for _ in brute_force(chain, Limits(s)))]
    assert not possible or CutSearch(chain).least_stages() <= min(possible)


def test_what_must_be_apart_is_parted():
    chain = replace(plain([1, 1, 9, 1]), apart=((0, 1),))
    assert CutSearch(chain).best(Limits(2)).boundaries == (0, 1, 4)
    assert CutSearch(chain).best(Limits(1)) is None
    assert CutSearch(chain).least_stages() == 2


def test_equal_work_is_halved():
    assert CutSearch(plain([5, 5, 5, 5])).best(Limits(2)).boundaries == (0, 2, 4)


def test_of_equal_cuts_the_one_with_the_least_traffic():
    # The last node is the bottleneck with 9; all cuts before it are as fast, the one after node 1 carries least.
    chain = plain([3, 3, 3, 9], link=[0, 4, 2, 4, 0])
    assert CutSearch(chain).best(Limits(2)).boundaries == (0, 3, 4)
    chain = plain([1, 1, 1, 9, 0], link=[0, 4, 2, 4, 4, 0])
    assert CutSearch(chain).best(Limits(3)).boundaries == (0, 2, 3, 5)


def test_of_equal_traffic_the_most_even():
    assert CutSearch(plain([1, 1, 1, 1, 9])).best(Limits(3)).boundaries == (0, 2, 4, 5)


def test_a_slow_link_moves_the_cut():
    # Halves of 10 need the cut after node 1, whose link takes 30; 15 | 5 is better.
    assert CutSearch(plain([5, 5, 5, 5], link=[0, 8, 30, 8, 0])).best(Limits(2)).bottleneck_ticks == 15


def test_a_recomputed_value_is_paid_by_each_stage_that_reads_it_once():
    chain = Chain((4, 1, 4, 4), (0,) * 4, (Shared((0, 2, 3), ticks=3),), (1, 2, 3), (0,) * 5, (0,) * 5, (0,) * 5)
    cut = CutSearch(chain).best(Limits(2))
    assert (cut.boundaries, cut.ticks) == ((0, 2, 4), (8, 11))


def test_memory_shifts_work_to_later_stages():
    # Stage 0 holds two microbatches, stage 1 one: (2 * saved 2) > 3 in halves, so one node moves over.
    chain = Chain((1,) * 4, (1,) * 4, (), (1, 2, 3), (0,) * 5, (0,) * 5, (0,) * 5)
    assert CutSearch(chain).best(Limits(2, memory_bytes=4)).boundaries == (0, 2, 4)
    assert CutSearch(chain).best(Limits(2, memory_bytes=3)).boundaries == (0, 1, 4)
    assert CutSearch(chain).best(Limits(2, memory_bytes=2)) is None
    assert CutSearch(chain).best(Limits(2, memory_bytes=2, n_microbatches=1)).boundaries == (0, 2, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"link_ticks": (0,)}, "a chain of 2 nodes has 3 boundaries; its links give another number"),
        ({"legal": (2,)}, r"legal cuts must increase strictly between 0 and 2; found \(2,\)"),
        ({"ticks": (1, -1)}, "node 1 of the chain has a negative cost: -1 ticks, 0 bytes saved"),
    ],
)
def test_a_chain_checks_itself(fields, message):
    good = vars(plain([1, 1]))
    with pytest.raises(VerifyError, match=message):
        Chain(**{**good, **fields})


def long_chain(n):
    draw = random.Random(0)
    items = tuple(Shared((i,), state_bytes=draw.randrange(10**6)) for i in range(n))
    mask = Shared(tuple(range(0, n, 40)), ticks=10**6, saved_bytes=10**4)
    tied = Shared((0, n - 1), state_bytes=10**8)
    link = (0, *(draw.choice((10**9, 3 * 10**9)) for _ in range(n - 1)), 0)
    byte = tuple(x // 10**3 for x in link)
    time_of = tuple(draw.randrange(10**9) for _ in range(n))
    return Chain(
        time_of,
        tuple(draw.randrange(10**6) for _ in range(n)),
        (*items, mask, tied),
        tuple(range(1, n)),
        link,
        byte,
        byte,
    )


def test_ten_thousand_nodes_in_sixty_four_stages():
    search = CutSearch(long_chain(10_000))
    free = search.best(Limits(64, None, 64))
    tight = search.best(Limits(64, max(free.memory_bytes) * 2 // 3, 64))
    assert tight is None or tight.bottleneck_ticks >= free.bottleneck_ticks
