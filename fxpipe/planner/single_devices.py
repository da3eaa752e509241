"""Plans of a fixed number of stages on one device each: equal work, or least communication under a cap on the load.

Exact where the graph has few cuts, and along any one order; else the best of several orders, improved around the best.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TypeAlias

import numpy as np

from fxpipe.planner.bounds import single_device_bound
from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.cuts import Cuts, CutsOfOrder, Pairs, cuts_of_order, pairs_of
from fxpipe.planner.fastest import MOST_STEPS, all_cuts, orders_around
from fxpipe.planner.minimax import Found, Limits, least_bytes, minimax
from fxpipe.planner.orders import some_orders
from fxpipe.planner.placement import Placement, one_device_each
from fxpipe.planner.problem import Answer, Problem, answer_of, better
from fxpipe.planner.profile import Floats, Ints

MOST_ROUNDS = 8
MOST_IMPROVED = 1 << 22  # rounds x nodes x stages
SLACK = 1e-12

OverCuts: TypeAlias = Callable[[Cuts, Pairs, Placement, Limits], Found | None]
OnOrder: TypeAlias = Callable[[CutsOfOrder, Limits], tuple[float, list[int]] | None]


def most_even(problem: Problem) -> Answer | None:
    """The plan whose busiest stage computes least, and among the cuts that were found to allow that, with few bytes moved."""
    limits = _limits(problem)
    even = _solve(problem, limits, _even_on_order, _even_over_cuts)
    if even is None:
        return None
    light = least_communication(problem, even.cost)
    if light is None:
        return even
    bound = single_device_bound(problem.graph, limits.n_stages or 1)
    proved = even.proved_bound or (even.cost if even.cost <= bound * (1 + SLACK) else 0.0)
    return replace(light, cost=even.cost, proved_bound=proved)


def least_communication(problem: Problem, max_seconds: float | None) -> Answer | None:
    """The plan whose cuts are crossed by the fewest bytes, no stage computing longer than ``max_seconds``; costs are bytes."""
    limits = replace(_limits(problem), max_seconds=max_seconds)
    return _solve(problem, limits, _light_on_order, least_bytes)


def _even_over_cuts(cuts: Cuts, pairs: Pairs, placement: Placement, limits: Limits) -> Found | None:
    return minimax(cuts, pairs, placement, CostModel(), limits)


def _limits(problem: Problem) -> Limits:
    return replace(problem.limits, n_stages=problem.constraints.n_stages or problem.topology.n_devices)


def _solve(problem: Problem, limits: Limits, on_order: OnOrder, exactly: OverCuts) -> Answer | None:
    n_stages, graph = limits.n_stages or 1, problem.graph
    known = all_cuts(problem)
    if known is not None and np.count_nonzero(known[1]) * n_stages <= MOST_STEPS:
        found = exactly(known[0], pairs_of(known[1]), one_device_each(n_stages), limits)
        if found is None:
            return None
        return answer_of(known[0], found.cost, found.cuts, _devices(n_stages), found.cost or -1.0)
    best: Answer | None = None
    for order in some_orders(graph):
        best = better(best, _along(problem, limits, on_order, order))
    rounds = 0 if best is None or graph.is_chain else min(MOST_ROUNDS, MOST_IMPROVED // (graph.n * n_stages))
    for _ in range(rounds):
        assert best is not None
        before = best
        for order in orders_around(graph, before):
            best = better(best, _along(problem, limits, on_order, order))
        if best is before:
            break
    return replace(best, proved_bound=best.cost or -1.0) if best is not None and graph.is_chain else best


def _along(problem: Problem, limits: Limits, on_order: OnOrder, order: Ints) -> Answer | None:
    cuts = cuts_of_order(problem.graph, order)
    found = on_order(cuts, limits)
    return None if found is None else answer_of(cuts, *found, _devices(limits.n_stages or 1))


def _devices(n_stages: int) -> list[tuple[int, ...]]:
    return [(device,) for device in range(n_stages)]


def _even_on_order(cuts: CutsOfOrder, limits: Limits) -> tuple[float, list[int]] | None:
    """Bisection: with a limit on the load, every stage, from the last on, takes all that it can."""
    n_stages = limits.n_stages or 1
    total = float(cuts.compute[-1])
    low, high = total / n_stages, total
    best = _greedy(cuts, limits, high)
    if best is None:
        return None
    high = float(np.diff(cuts.compute[best]).max())
    while high - low > 4 * SLACK * total:
        middle = (low + high) / 2
        if (found := _greedy(cuts, limits, middle)) is None:
            low = middle
        else:
            best, high = found, min(middle, float(np.diff(cuts.compute[found]).max()))
    high = float(np.diff(cuts.compute[best]).max())
    return high, best


def _greedy(cuts: CutsOfOrder, limits: Limits, seconds: float) -> list[int] | None:
    """Cuts with no stage over ``seconds``, or None."""
    n_stages, stored = limits.n_stages or 1, cuts.parameters + cuts.activations
    slack = SLACK * float(cuts.compute[-1])
    at = [cuts.n - 1]
    for taken in range(1, n_stages + 1):
        end, left = at[-1], n_stages - taken
        first = int(np.searchsorted(cuts.compute, cuts.compute[end] - seconds - slack))
        first = max(first, int(np.searchsorted(cuts.labelled, cuts.labelled[end] - 1)), left)
        if limits.memory_bytes is not None:
            first = max(first, int(np.searchsorted(stored, stored[end] - limits.memory_bytes / taken)))
        if first >= end:
            return None
        at.append(first)
    return at[::-1] if at[-1] == 0 else None


def _light_on_order(cuts: CutsOfOrder, limits: Limits) -> tuple[float, list[int]] | None:
    """For each number of stages and each cut, the fewest bytes that the cuts after it are crossed by."""
    n_stages = limits.n_stages or 1
    reaches = [_furthest(cuts, limits, taken) for taken in range(1, n_stages + 1)]
    costs = np.full(cuts.n, inf)
    costs[-1] = 0.0
    layers = [costs]
    for reach in reaches:
        layers.append(_least_in_windows(layers[-1] + cuts.crossing, reach))
    if layers[-1][0] == inf:
        return None
    at = [0]
    for before, reach in zip(layers[-2::-1], reaches[::-1], strict=True):
        window = (before + cuts.crossing)[at[-1] + 1 : int(reach[at[-1]]) + 1]
        at.append(at[-1] + 1 + int(np.argmin(window)))
    return float(layers[-1][0]), at


def _furthest(cuts: CutsOfOrder, limits: Limits, taken: int) -> Ints:
    """The last cut at which a stage may end that begins at each cut, as the ``taken``-th from the last."""
    seconds = inf if limits.max_seconds is None else limits.max_seconds + SLACK * float(cuts.compute[-1])
    last = np.searchsorted(cuts.compute, cuts.compute + seconds, side="right") - 1
    last = np.minimum(last, np.searchsorted(cuts.labelled, cuts.labelled + 1, side="right") - 1)
    if limits.memory_bytes is not None:
        stored = cuts.parameters + cuts.activations
        last = np.minimum(last, np.searchsorted(stored, stored + limits.memory_bytes / taken, side="right") - 1)
    return last


def _least_in_windows(values: Floats, last: Ints) -> Floats:
    """For each i the least of ``values[i + 1 : last[i] + 1]``, infinite where that is empty."""
    n = len(values)
    first = np.arange(n) + 1
    found = np.full(n, inf)
    lengths = last - first + 1
    power, table = 1, values  # table[i] is the least of values[i : i + power]
    while True:
        now = np.flatnonzero((lengths >= power) & (lengths < 2 * power))
        found[now] = np.minimum(table[first[now]], table[last[now] - power + 1])
        if not (lengths >= 2 * power).any():
            return found
        table = np.minimum(table[:-power], table[power:])
        power *= 2
