"""The best cut of a chain into consecutive stages: exact, in whole numbers, in plain Python.

Stage ``[a, b)`` takes the longest of its compute and its two links; the search finds the boundaries whose slowest stage
is fastest. The problem is PipeDream's (SOSP 2019, US12056604B2), without replication. Here the bottleneck T is bisected;
for one T a sweep tells in linear time which numbers of stages reach which boundary. The room that a stage needs depends
on its place in the pipeline, so under a memory limit the sweep looks at pairs of boundaries, but only at those that are
fast enough for T.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise

from fxpipe.chain import Chain, Cut, Limits, Shared

Usage = tuple[int, int, int]  # of one stage: ticks, saved bytes for each microbatch in flight, state bytes
Touches = dict[int, list[tuple[int, int, Usage]]]  # atom -> (atom touched before, atom touched after, weight)
Sweep = Callable[[int, Limits], list[int]]  # bottleneck -> for each boundary the stage counts that reach it, as bits


class CutSearch:
    """Answers for one chain. The nodes between two legal cuts are one atom; every index inside counts atoms."""

    def __init__(self, chain: Chain) -> None:
        self._at = (0, *chain.legal, len(chain.ticks))
        self._end = len(self._at) - 1
        self._link = [0, *(chain.link_ticks[p] for p in chain.legal), 0]
        self._activation = [chain.activation_bytes[p] for p in self._at]
        self._gradient = [chain.gradient_bytes[p] for p in self._at]
        atom_of = [k for k, (a, b) in enumerate(pairwise(self._at)) for _ in range(a, b)]
        own = [[0, 0, 0] for _ in range(self._end)]
        for position, k in enumerate(atom_of):
            _add(own[k], (chain.ticks[position], chain.saved_bytes[position], 0))
        self._touches = _touches(chain.shared, atom_of, own)
        self._touched = sorted(self._touches)
        self._sums = [list(accumulate((atom[i] for atom in own), initial=0)) for i in range(3)]
        busy = [atom[0] > 0 or any(w[0] for *_, w in self._touches.get(k, ())) for k, atom in enumerate(own)]
        busy[-1] |= not any(busy)  # a chain without any work is one stage
        self._work = list(accumulate(busy, initial=0))  # boundaries with the same entry have no work between them

    def most_stages(self) -> int:
        """The largest number of stages that the legal cuts allow, each with work to do."""
        return self._work[self._end]

    def best(self, limits: Limits) -> Cut | None:
        """The cut with the least bottleneck, or None where no cut keeps the limits.

        Of equal cuts: from the last boundary to the first, the least traffic, then the most even work, then the
        earliest.
        """
        at_least = max(self._fastest_atom(), -(-self._sums[0][self._end] // limits.n_stages))
        sweep: Sweep = self._by_time
        fast = self._least(at_least, limits, sweep)
        if fast is not None and limits.memory_bytes is not None:
            sweep = self._by_memory
            fast = self._least(fast, limits, sweep)
        return None if fast is None else self._read_back(fast, sweep(fast, limits), limits)

    def least_memory_bytes(self, limits: Limits) -> int:
        """A memory limit with which a cut into this many stages exists, at most 0.4 % above the least such limit."""
        free = self.best(Limits(limits.n_stages, None, limits.n_microbatches))
        assert free is not None, "the caller has checked most_stages"
        low, high = 0, max(free.memory_bytes)
        while high - low > max(0, high >> 8):
            middle = (low + high) // 2
            tried = Limits(limits.n_stages, middle, limits.n_microbatches)
            found = self._reaches_the_end(self._by_memory(self._slowest(), tried), tried)
            low, high = (low, middle) if found else (middle + 1, high)
        return high

    def _least(self, low: int, limits: Limits, sweep: Sweep) -> int | None:
        """The least bottleneck from ``low`` on with which the sweep gets to the end; None where there is none."""
        high, step = max(low, self._slowest()), max(1, low >> 6)
        top = low
        while not self._reaches_the_end(sweep(top, limits), limits):
            if top == high:
                return None
            low, top, step = top + 1, min(high, top + step), 2 * step
        while low < top:
            middle = (low + top) // 2
            found = self._reaches_the_end(sweep(middle, limits), limits)
            low, top = (low, middle) if found else (middle + 1, top)
        return top

    def _fastest_atom(self) -> int:
        return max((self._usage(k, k + 1)[0] for k in range(self._end)), default=0)

    def _slowest(self) -> int:
        return max(self._usage(0, self._end)[0], *self._link)

    def _reaches_the_end(self, counts: list[int], limits: Limits) -> bool:
        return bool(counts[self._end] >> limits.n_stages & 1)

    def _usage(self, a: int, b: int) -> Usage:
        """What stage ``[a, b)`` costs: what its atoms own, and each shared thing that it touches once."""
        total = [prefix[b] - prefix[a] for prefix in self._sums]
        for k in self._touched[bisect_left(self._touched, a) : bisect_left(self._touched, b)]:
            for before, _, weight in self._touches[k]:
                if before < a:
                    _add(total, weight)
        return total[0], total[1], total[2]

    def _cuttable(self, t: int) -> list[int]:
        """0, the boundaries whose link keeps to ``t`` with work on both sides, and the end."""
        last = self._work[self._end]
        inner = (k for k in range(1, self._end) if self._link[k] <= t and 0 < self._work[k] < last)
        return [0, *inner, self._end]

    def _earliest(self, t: int) -> list[int]:
        """For each boundary b the first a for which stage ``[a, b)`` computes within ``t``; b itself if none does."""
        ticks, touches = self._sums[0], self._touches
        first, shared, found = 0, 0, [0]
        for b in range(1, self._end + 1):
            shared += sum(w[0] for before, _, w in touches.get(b - 1, ()) if before < first)
            while ticks[b] - ticks[first] + shared > t:
                shared -= sum(w[0] for _, after, w in touches.get(first, ()) if after >= b)
                first += 1
            found.append(first)
        return found

    def _by_time(self, t: int, limits: Limits) -> list[int]:
        """For each boundary the set of stage counts (as bits) that reach it with every stage and link within ``t``.

        A stage that shrinks never slows down, so the counts that reach a boundary are all from the fewest, whose last
        stage starts as early as it can, to the most, whose last stage starts as late as it can.
        """
        earliest, work = self._earliest(t), self._work
        counts, fewest, most = [0] * (self._end + 1), [0] * (self._end + 1), [0] * (self._end + 1)
        reached, i, j = [0], 0, 0
        counts[0] = 1
        for b in self._cuttable(t)[1:]:
            while i < len(reached) and reached[i] < earliest[b]:
                i += 1
            while j + 1 < len(reached) and work[reached[j + 1]] < work[b]:
                j += 1
            if i <= j and work[reached[j]] < work[b]:
                fewest[b], most[b] = fewest[reached[i]] + 1, min(most[reached[j]] + 1, limits.n_stages)
                counts[b] = (2 << most[b]) - (1 << fewest[b]) if fewest[b] <= most[b] else 0
                reached.append(b)
        return counts

    def _to_the_end(self, earliest: list[int], cuts: list[int]) -> list[int]:
        """For each cut, in the order of ``cuts``, the fewest stages that lead from it to the end."""
        need, i = [0] * len(cuts), len(cuts) - 1
        for k in range(len(cuts) - 2, -1, -1):
            while earliest[cuts[i]] > cuts[k]:
                i -= 1
            need[k] = need[i] + 1 if self._work[cuts[k]] < self._work[cuts[i]] else len(cuts)
        return need

    def _by_memory(self, t: int, limits: Limits) -> list[int]:
        """As ``_by_time``, with every stage within the memory limit at its place in the pipeline."""
        earliest, cuts = self._earliest(t), self._cuttable(t)
        need = self._to_the_end(earliest, cuts)
        counts = [1] + [0] * self._end
        for i, a in enumerate(cuts[:-1]):
            fewest = (counts[a] & -counts[a]).bit_length() - 1
            if not 0 <= fewest < limits.n_stages:
                continue
            start = bisect_left(need, fewest + 1 - limits.n_stages, i + 1, key=int.__neg__)
            for b, usage in self._growing(a, cuts[start:]):
                if earliest[b] > a or usage[1] + usage[2] > (limits.memory_bytes or 0):
                    break
                if self._work[a] < self._work[b]:
                    skipped = self._stages_without_room(a, b, usage, limits)
                    counts[b] |= (counts[a] >> skipped << skipped) << 1
        return counts

    def _growing(self, a: int, ends: list[int]) -> Iterator[tuple[int, Usage]]:
        """Each b of ``ends`` (increasing) with the usage of stage ``[a, b)``."""
        total, at = list(self._usage(a, ends[0])), ends[0]
        for b in ends:
            for k in range(at, b):
                _add(total, (prefix[k + 1] - prefix[k] for prefix in self._sums))
                for before, _, weight in self._touches.get(k, ()):
                    if before < a:
                        _add(total, weight)
            at = b
            yield b, (total[0], total[1], total[2])

    def _memory(self, a: int, b: int, usage: Usage) -> tuple[int, int]:
        """Bytes that stage ``[a, b)`` keeps once, and for each microbatch in flight.

        Once: parameters, their gradients, buffers; what it sends; the gradients that it receives and sends. In flight:
        what it saves for backward and what it has received.
        """
        once = usage[2] + self._gradient[a] + self._activation[b] + self._gradient[b]
        return once, usage[1] + self._activation[a]

    def _stages_without_room(self, a: int, b: int, usage: Usage, limits: Limits) -> int:
        """How many of the first stages ``[a, b)`` cannot be, because what is in flight there would not fit."""
        assert limits.memory_bytes is not None
        once, each = self._memory(a, b, usage)
        fits = (limits.memory_bytes - once) // max(each, 1)
        if limits.memory_bytes < once or (each and fits < 1):
            return limits.n_stages
        everywhere = not each or (limits.n_microbatches is not None and fits >= limits.n_microbatches)
        return 0 if everywhere else max(0, limits.n_stages - fits)

    def _read_back(self, t: int, counts: list[int], limits: Limits) -> Cut:
        """The cut that the sweep found, chosen from the end to the start; see ``best`` for the choice among equals."""
        earliest, boundaries = self._earliest(t), [self._end]
        for stage in range(limits.n_stages - 1, -1, -1):
            b = boundaries[-1]
            starts = (a for a in range(earliest[b], b) if counts[a] >> stage & 1 and self._work[a] < self._work[b])
            ranked = sorted(starts, key=self._preference(b, stage))
            boundaries.append(next(a for a in ranked if self._fits(a, b, stage, limits)))
        stages = list(enumerate(pairwise(boundaries[::-1])))
        times = tuple(self._usage(a, b)[0] for _, (a, b) in stages)
        memory = tuple(self._stage_memory(a, b, stage, limits) for stage, (a, b) in stages)
        slowest = max(*times, *(self._link[a] for _, (a, _) in stages))
        return Cut(tuple(self._at[k] for k in boundaries[::-1]), times, memory, slowest)

    def _preference(self, b: int, stage: int) -> Callable[[int], tuple[int, int, int]]:
        ticks = self._sums[0]
        return lambda a: (self._link[a], abs(ticks[a] * (stage + 1) - ticks[b] * stage), a)

    def _stage_memory(self, a: int, b: int, stage: int, limits: Limits) -> int:
        once, each = self._memory(a, b, self._usage(a, b))
        return once + limits.in_flight(stage) * each

    def _fits(self, a: int, b: int, stage: int, limits: Limits) -> bool:
        return limits.memory_bytes is None or self._stage_memory(a, b, stage, limits) <= limits.memory_bytes


def _add(total: list[int], weights: Iterable[int]) -> None:
    for i, weight in enumerate(weights):
        total[i] += weight


def _touches(shared: tuple[Shared, ...], atom_of: list[int], own: list[list[int]]) -> Touches:
    """For each atom the shared things that it touches; -1 stands before the first atom, the number of atoms after the last.

    Things that touch the same atoms are joined; what touches a single atom is added to what that atom owns.
    """
    joined: dict[tuple[int, ...], list[int]] = {}
    for item in shared:
        atoms = tuple(sorted({atom_of[p] for p in item.positions}))
        _add(joined.setdefault(atoms, [0, 0, 0]), (item.ticks, item.saved_bytes, item.state_bytes))
    touches: Touches = {}
    for atoms, (time, saved, state) in joined.items():
        if len(atoms) == 1:
            _add(own[atoms[0]], (time, saved, state))
        for before, k, after in zip((-1, *atoms), atoms, (*atoms[1:], len(own)), strict=False):
            if len(atoms) > 1:
                touches.setdefault(k, []).append((before, after, (time, saved, state)))
    return touches
