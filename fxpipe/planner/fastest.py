"""The fastest plan: exact where the graph has few cuts, else the best of several orders, improved step by step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from fxpipe.planner.cuts import (
    CutSets,
    Holds,
    cut_sets,
    cuts_of_order,
    lattice,
    nested,
    nested_line,
    pairs_of,
    sets_of_orders,
)
from fxpipe.planner.device_sets import all_sets, n_moves_of_sets
from fxpipe.planner.feasible import NEAR, Feasible
from fxpipe.planner.graph import Graph
from fxpipe.planner.line import Line
from fxpipe.planner.minimax import minimax
from fxpipe.planner.numberings import numberings
from fxpipe.planner.orders import depth_first, least_live_bytes, some_orders, sorted_by
from fxpipe.planner.placement import Placement, contiguous
from fxpipe.planner.problem import Answer, Problem, answer_of
from fxpipe.planner.profile import Ints
from fxpipe.planner.ranges import Ranges, numbers_of_copies
from fxpipe.planner.stage_bits import MOST_CUTS as MOST_CUTS_AS_BITS, Stages

MOST_CUTS = 4200  # of an exact search: every graph of 12 nodes
MOST_CUTS_ON_LEVELS = 512  # of a search on several levels that does not try all sets of devices
MOST_PAIRS = 1 << 20
MOST_STEPS = 1 << 26  # pairs of cuts x moves of devices
MOST_STEPS_AS_BITS = 1 << 28
MOST_MOVES = 1 << 16
MOST_ROUNDS = 8  # of improvement
MOST_IMPROVED = 1 << 21  # rounds x nodes x devices
PRECISION = 1e-4
ROUGH = 0.02  # what a placement must gain where all sets of devices are tried after it
GAIN = 2e-3  # what another order must promise before it is searched on a large problem
MOST_NUMBERED = 1 << 15  # nodes x devices for which other numberings of the devices are tried
MOST_SMALL = 1 << 18  # nodes x devices (x stages, where their number is given)


def fastest(problem: Problem) -> Answer | None:
    """The plan with the least time of its slowest stage that the search finds; None where it finds none."""
    search = _Fastest(problem)
    return search.run()


def all_cuts(problem: Problem) -> tuple[CutSets, Holds] | None:
    """Every cut of the graph, and which of them holds which; None where they, or the stages between two, are too many."""
    graph = problem.graph
    if graph.n + 1 > MOST_CUTS or (inside := lattice(graph, MOST_CUTS)) is None:
        return None
    cuts = cut_sets(graph, inside)
    holds = nested_line(cuts.n) if cuts.n == graph.n + 1 else nested(cuts)
    return None if np.count_nonzero(holds) > MOST_PAIRS else (cuts, holds)


class _Fastest:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.graph, self.topology = problem, problem.graph, problem.topology
        self.model, self.limits = problem.model, problem.limits
        self.bound = problem.time_bound
        self.layers = self.limits.n_stages or 1
        self.blocks = [Ranges(self.topology, self.model, n) for n in numbers_of_copies(self.topology)]
        self.best: Answer | None = None
        self.size = problem.graph.n * problem.topology.n_devices * self.layers
        self.large = self.size > MOST_SMALL
        self.precision = 1e-3 if self.large else PRECISION

    @cached_property
    def numberings(self) -> Sequence[Ranges]:
        """Other numberings of the devices."""
        return numberings(self.topology, self.model) if self.size <= MOST_NUMBERED else []

    def run(self) -> Answer | None:
        """Exactly where that is quick; else along orders, over their cuts together, and around the best plan."""
        known = all_cuts(self.problem)
        if known is not None and self._affordable(*known):
            self._over_placements(*known, complete=True)
            return self.best
        orders = some_orders(self.graph)
        if self._over_cuts_of(orders):
            self._improve(self._over_cuts_of)
            return self.best
        for at, order in enumerate(orders):
            self._along(order, self._blocks_of_best() if self.large and at else [*self.blocks, *self.numberings])
        if not self.graph.is_chain:
            self._improve(self._along_each)
        return self.best

    def _sets_affordable(self, cuts: CutSets, holds: Holds) -> bool:
        """Whether an exact search over any set of devices is quick."""
        n_moves, different = n_moves_of_sets(self.topology)
        most = MOST_STEPS_AS_BITS if self._as_bits(cuts) else MOST_STEPS
        return n_moves <= MOST_MOVES and int(np.count_nonzero(holds)) * different * self.layers <= most

    def _affordable(self, cuts: CutSets, holds: Holds) -> bool:
        """Whether an exact search is quick; where several levels would make it slow, only with few cuts."""
        if self._sets_affordable(cuts, holds):
            return True
        n, free = self.topology.n_devices, self.limits.n_stages is None
        if len(self.topology.levels) > 1 and free and not self.graph.is_chain and cuts.n > MOST_CUTS_ON_LEVELS:
            return False
        return n * n * int(np.count_nonzero(holds)) * self.layers <= MOST_STEPS and n**3 * cuts.n <= MOST_STEPS

    def _as_bits(self, cuts: CutSets) -> bool:
        return self.limits.n_stages is None and cuts.n <= MOST_CUTS_AS_BITS

    def _over_placements(self, cuts: CutSets, holds: Holds, complete: bool) -> None:
        """Over all ranges of devices, other numberings of them and, where that is quick, all sets; a good plan makes the
        rest quick. ``complete``: these are all cuts that there are."""
        as_bits, sets = self._as_bits(cuts), self._sets_affordable(cuts, holds)
        stages = Stages(cuts, holds, self.model, self.limits.memory_bytes) if as_bits else None
        pairs = None if as_bits else pairs_of(holds)
        for placement in self._placements(as_bits, sets):
            below = np.inf if self.best is None else self.best.cost
            if stages is not None:
                least_gain = ROUGH if sets and not placement.complete else NEAR
                found = Feasible(stages, placement, self.limits.max_replicas).search(self.bound, below, least_gain)
            elif pairs is not None:
                found = minimax(cuts, pairs, placement, self.model, self.limits, below)
            if found is not None and found.cost < below:
                self.best = answer_of(cuts, found.cost, found.cuts, placement.devices(found.moves)[::-1])
            if self.best is not None and complete and placement.complete:
                self.best = replace(self.best, proved_bound=self.best.cost)

    def _placements(self, as_bits: bool, sets: bool) -> Iterator[Placement]:
        """Placements, while a plan may be found that is better than the best; made when they are asked for."""
        for ranges in [self.blocks[0], *self.blocks[:0:-1]]:
            if not self._proved():
                yield contiguous(ranges)
        if not self._proved() and (as_bits or not sets):
            yield from map(contiguous, self.numberings)
        if sets and not self._proved():
            yield all_sets(self.topology, self.model)

    def _proved(self) -> bool:
        return self.best is not None and (self.best.proved_bound > 0 or self.best.cost <= self.bound * (1 + NEAR))

    def _over_cuts_of(self, orders: Sequence[Ints]) -> bool:
        """Over the cuts of several orders together; False where they are too many."""
        if self.graph.is_chain or self.large or self.limits.n_stages is not None or self.graph.n > MOST_CUTS_ON_LEVELS:
            return False
        cuts = cut_sets(self.graph, sets_of_orders(self.graph, orders))
        holds = nested(cuts) if cuts.n <= MOST_CUTS_ON_LEVELS else None
        if holds is None or not self._affordable(cuts, holds):
            return False
        self._over_placements(cuts, holds, complete=False)
        return True

    def _may_gain(self) -> bool:
        return self.best is None or self.best.cost > self.bound * (1 + PRECISION)

    def _along(self, order: Ints, where: Sequence[Ranges]) -> None:
        """Searches one order on some ways to copy or to number the devices."""
        cuts = cuts_of_order(self.graph, order)
        for ranges in where:
            if not self._may_gain():
                return
            line = Line(cuts, ranges, self.model, self.limits)
            if not len(line.sizes):
                continue
            high = np.inf if self.best is None else self.best.cost * (1 - (GAIN if self.large else self.precision))
            if high < self.bound or (found := line.search(self.bound, high, self.precision)) is None:
                continue
            devices = [ranges.devices(a, b) for a, b in zip(found.starts, found.ends, strict=True)]
            proved = line.refused_seconds if line.is_exact(line.refused_seconds) and self.graph.is_chain else 0.0
            self.best = answer_of(cuts, found.seconds, found.cuts, devices, proved)

    def _improve(self, search: Callable[[Sequence[Ints]], object]) -> None:
        """Orders that keep the stages of the best plan apart but arrange the inside of each differently: cuts near those
        of the plan become possible, until none helps."""
        for _ in range(min(MOST_ROUNDS, MOST_IMPROVED // self.size)):
            if self.best is None or not self._may_gain():
                return
            before = self.best
            search(orders_around(self.graph, before))
            if self.best is before:
                return

    def _along_each(self, orders: Sequence[Ints]) -> None:
        for order in orders:
            self._along(order, self._blocks_of_best())

    def _blocks_of_best(self) -> list[Ranges]:
        """The most copies that the best plan may be made of, and every numbering; all of them while there is no plan."""
        blocks = self.blocks
        if self.best is not None:
            replicas = [len(devices) for devices in self.best.devices]
            blocks = [block for block in blocks if not any(r % block.n_copies for r in replicas)][-1:]
        return [*blocks, *self.numberings]


def orders_around(graph: Graph, plan: Answer) -> list[Ints]:
    """Orders that run the stages of a plan one after the other, each inside in another way."""
    stage_of = plan.stage_of(graph.n).tolist()
    depth = np.empty(graph.n, dtype=np.int64)
    depth[depth_first(graph)] = np.arange(graph.n)
    keys = (depth, -graph.compute, graph.compute)
    orders = [sorted_by(graph, list(zip(stage_of, key.tolist(), strict=True))) for key in keys]
    orders.append(least_live_bytes(graph, stage_of))
    return list({order.tobytes(): order for order in orders}.values())
