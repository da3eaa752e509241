"""The best cut of a chain into stages of given numbers of replicas: exact, in whole numbers.

A stage of r replicas takes its microbatches in turn, so one takes it 1/r of its compute; its link to a stage of q replicas is
min(q, r) links. Its replicas also add up their gradients once a step: a ring all-reduce sends 2 (r - 1)/r of the parameters
over each link (Patarasuk, Yuan 2009), of which a microbatch bears its part. The problem is PipeDream's (SOSP 2019,
US12056604B2), the replicas given: the bottleneck is bisected, and for one bottleneck a sweep over the stages tells which
boundaries each reaches.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from fxpipe.cuts.atoms import Atoms
from fxpipe.cuts.chain import Chain, Cut, Limits
from fxpipe.cuts.cut_search import CutSearch


class ReplicatedSearch:
    """For one chain and ``limits.replicas``. ``ticks_per_byte`` of a link; indices inside count atoms."""

    def __init__(self, chain: Chain, limits: Limits, ticks_per_byte: Fraction) -> None:
        self.limits, self.replicas = limits, limits.replicas
        self._atoms = atoms = Atoms(chain)
        self._first = [bisect_right(atoms.at, max((p for p in chain.alone if p < end), default=-1)) for end in atoms.at]
        reducing = Fraction(ticks_per_byte, limits.n_microbatches or 1)
        self._searches = {r: CutSearch(_with_reduction(chain, (r - 1) * reducing)) for r in set(self.replicas)}

    def best(self) -> Cut | None:
        """The cut with the least bottleneck, or None where no cut keeps to the limits.

        ``ticks`` are those of one replica for each microbatch of all, with its part of the all-reduce. Of equal cuts: from the
        last boundary to the first, the least traffic, then the earliest.
        """
        low, high = 0, max(search.slowest for search in self._searches.values())
        if not self._possible(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._possible(middle) else (middle + 1, high)
        return self._read_back(low)

    def _possible(self, t: int) -> bool:
        return bool(self._sweep(t)[0][-1])

    def _sweep(self, t: int) -> tuple[list[list[int]], list[list[int]]]:
        """After 0, 1, ... stages, the boundaries that they can end at with every stage and link within ``t``; and for each
        stage, the earliest start of one that ends at each boundary."""
        earliest = {r: self._earliest(r, t) for r in self._searches}
        reached, starts = [[0]], [earliest[r] for r in self.replicas]
        for stage, first in enumerate(starts):
            ends = self._ends(t, stage)
            reached.append([b for b in ends if next(self._starts(stage, b, first[b], reached[-1]), None) is not None])
        return reached, starts

    def _earliest(self, n_replicas: int, t: int) -> list[int]:
        """As ``CutSearch.earliest``, of a stage of so many replicas, which must begin behind what is to be alone."""
        found = self._searches[n_replicas].earliest(t * n_replicas)
        return found if n_replicas == 1 else list(map(max, found, self._first))

    def _ends(self, t: int, stage: int) -> Sequence[int]:
        """The boundaries at which the stage may end as far as the link after it allows."""
        atoms, last = self._atoms, self._atoms.work[-1]
        if stage == len(self.replicas) - 1:
            return [atoms.n]
        n_links = min(self.replicas[stage], self.replicas[stage + 1])
        return [b for b in range(1, atoms.n) if atoms.link[b] <= t * n_links and 0 < atoms.work[b] < last]

    def _starts(self, stage: int, b: int, earliest: int, reached: Sequence[int]) -> Iterator[int]:
        """Where stage ``[a, b)`` may start, of ``reached`` boundaries: with work to do, in time and within the memory."""
        atoms = self._atoms
        for a in reached[bisect_left(reached, earliest) :]:
            if atoms.work[a] >= atoms.work[b]:
                return
            if self.limits.memory_bytes is None or self._memory(stage, a, b) <= self.limits.memory:
                yield a

    def _read_back(self, t: int) -> Cut:
        reached, earliest = self._sweep(t)
        boundaries = [self._atoms.n]
        for stage in reversed(range(len(self.replicas))):
            starts = self._starts(stage, boundaries[-1], earliest[stage][boundaries[-1]], reached[stage])
            boundaries.append(min(starts, key=lambda a: (self._atoms.link[a], a)))
        spans = list(enumerate(pairwise(boundaries[::-1])))
        return Cut(
            tuple(self._atoms.at[k] for k in boundaries[::-1]),
            tuple(-(-self._searches[self.replicas[s]].usage(a, b)[0] // self.replicas[s]) for s, (a, b) in spans),
            tuple(self._memory(s, a, b) for s, (a, b) in spans),
            t,
        )

    def _memory(self, stage: int, a: int, b: int) -> int:
        once, each = self._atoms.memory(a, b, self._atoms.usage(a, b))
        return once + self.limits.in_flight(stage) * each


def _with_reduction(chain: Chain, ticks_per_state_byte: Fraction) -> Chain:
    """The chain in which what has state takes longer: parameters with their gradients are twice what an all-reduce sums."""
    shared = (replace(s, ticks=s.ticks + round(s.state_bytes * ticks_per_state_byte)) for s in chain.shared)
    return replace(chain, shared=tuple(shared))
