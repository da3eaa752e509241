"""The best cut of a chain into consecutive stages: exact, in whole numbers, in plain Python.

Stage ``[a, b)`` takes the longest of its compute and its two links; the search finds the boundaries whose slowest stage
is fastest. The problem is PipeDream's (SOSP 2019, US12056604B2), with one worker for each stage (``replicated_cuts`` has
more). Here the bottleneck t is bisected; for one t a sweep tells in linear time which numbers of stages reach which
boundary. The room that a stage needs depends on its place in the pipeline and on its two boundaries, so under a memory
limit the sweep looks at pairs of boundaries, but only within the windows that the place, t and the limit leave for each.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise

from fxpipe.cuts.atoms import Atoms, Usage
from fxpipe.cuts.chain import Chain, Cut, Limits

Counts = list[int]  # for each boundary the numbers of stages that reach it, as the bits of an integer


class CutSearch:
    """Answers for one chain. Every index inside counts atoms (``fxpipe.cuts.atoms``)."""

    def __init__(self, chain: Chain) -> None:
        self._atoms = atoms = Atoms(chain)
        self._largest_atom = max(atoms.usage(k, k + 1)[0] for k in range(atoms.n))
        self._slowest = max(atoms.usage(0, atoms.n)[0], *atoms.link)

    @property
    def slowest(self) -> int:
        """Ticks within which every stage and every link is."""
        return self._slowest

    def usage(self, a: int, b: int) -> Usage:
        """Of the stage between boundaries ``a`` and ``b``."""
        return self._atoms.usage(a, b)

    def most_stages(self) -> int:
        """The largest number of stages that the legal cuts allow, each with work to do."""
        return self._atoms.work[self._atoms.n]

    def least_stages(self) -> int:
        """The smallest number of stages that keeps apart what must be."""
        n_stages, b = 0, self._atoms.n
        while b > 0:
            n_stages, b = n_stages + 1, min(self._atoms.first[b], b - 1)
        return n_stages

    def best(self, limits: Limits) -> Cut | None:
        """The cut with the least bottleneck, or None where no cut keeps the limits.

        Of equal cuts: from the last boundary to the first, the least traffic, then the most even work, then the
        earliest.
        """
        mean = -(-self._atoms.ticks[-1] // limits.n_stages)
        t = self._least(
            max(self._largest_atom, mean), lambda t: self._reaches_the_end(self._by_time(t, limits), limits)
        )
        if t is None or limits.memory_bytes is None:
            return None if t is None else self._read_back(t, self._by_time(t, limits), limits)
        t = self._least(t, lambda t: self._has_room(t, limits))
        return None if t is None else self._read_back(t, self._by_memory(t, limits), limits)

    def least_memory_bytes(self, limits: Limits) -> int:
        """A memory limit with which a cut into this many stages exists, at most 0.4 % above the least such limit."""
        free = self.best(Limits(limits.n_stages, None, limits.n_microbatches))
        assert free is not None, "more stages than most_stages()"
        low, high = 0, max(free.memory_bytes)
        while high - low > high >> 8:
            middle = (low + high) // 2
            enough = self._has_room(self._slowest, Limits(limits.n_stages, middle, limits.n_microbatches))
            low, high = (low, middle) if enough else (middle + 1, high)
        return high

    def _least(self, low: int, possible: Callable[[int], bool]) -> int | None:
        """The least bottleneck from ``low`` on that is possible: larger steps up, then bisection; None if none is."""
        slowest, top, step = max(low, self._slowest), low, max(1, low >> 6)
        while not possible(top):
            if top == slowest:
                return None
            low, top, step = top + 1, min(slowest, top + step), 2 * step
        while low < top:
            middle = (low + top) // 2
            low, top = (low, middle) if possible(middle) else (middle + 1, top)
        return top

    def _reaches_the_end(self, counts: Counts, limits: Limits) -> bool:
        return bool(counts[-1] >> limits.n_stages & 1)

    def _cuttable(self, t: int) -> list[int]:
        """0, the boundaries whose link keeps to ``t`` with work on both sides, and the end."""
        atoms, last = self._atoms, self._atoms.work[-1]
        return [0, *(k for k in range(1, atoms.n) if atoms.link[k] <= t and 0 < atoms.work[k] < last), atoms.n]

    def earliest(self, t: int) -> list[int]:
        """For each boundary b the first a for which stage ``[a, b)`` computes within ``t``; b itself if none does."""
        ticks, touches = self._atoms.ticks, self._atoms.touches
        first, shared, found = 0, 0, [0]
        for b in range(1, self._atoms.n + 1):
            shared += sum(w[0] for before, _, w in touches.get(b - 1, ()) if before < first)
            while ticks[b] - ticks[first] + shared > t:
                shared -= sum(w[0] for _, after, w in touches.get(first, ()) if after >= b)
                first += 1
            found.append(max(first, self._atoms.first[b]))
        return found

    def _by_time(self, t: int, limits: Limits) -> Counts:
        """The numbers of stages, up to ``n_stages``, that reach each boundary with every stage and link within ``t``.

        A stage that shrinks never slows down, so the numbers that reach a boundary are all from the fewest, whose last
        stage starts as early as it can, to the most, whose last stage starts as late as it can.
        """
        earliest, work = self.earliest(t), self._atoms.work
        counts, fewest, most = ([0] * len(work) for _ in range(3))
        counts[0], reached, i, j = 1, [0], 0, 0
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

    def _has_room(self, t: int, limits: Limits) -> bool:
        """Whether a cut within ``t`` keeps to the memory limit: a greedy one, or any that the full sweep finds."""
        return self._has_greedy_room(t, limits) or self._reaches_the_end(self._by_memory(t, limits), limits)

    def _has_greedy_room(self, t: int, limits: Limits) -> bool:
        """Whether stages that each reach as far as they can, leaving work for those after them, get to the end."""
        atoms, cuttable, a = self._atoms, set(self._cuttable(t)), 0
        for stage in range(limits.n_stages):
            last = stage == limits.n_stages - 1
            reached = a
            for b, usage in atoms.ending_later(a, a + 1):
                after = limits.n_stages - 1 - stage
                if a < atoms.first[b] or usage[0] > t or self._least_memory(usage, stage, limits) > limits.memory:
                    break
                enough = atoms.work[a] < atoms.work[b] <= atoms.work[-1] - after and (b == atoms.n) == last
                if enough and b in cuttable and self._memory(a, b, usage, stage, limits) <= limits.memory:
                    reached = b
            if reached == a:
                return False
            a = reached
        return True

    def _windows(self, t: int, limits: Limits) -> tuple[list[int], list[int]]:
        """The first and the last boundary at which stage s may start, for s up to the end after the last stage.

        Found greedily from both ends with what only grows with the stage: its compute, its state, what it saves.
        """
        atoms, stages = self._atoms, range(limits.n_stages)

        def fits(a: int, b: int, usage: Usage, stage: int) -> bool:
            allowed = a >= atoms.first[b] and usage[0] <= t
            return allowed and self._least_memory(usage, stage, limits) <= limits.memory

        first, last = [atoms.n], [0]
        for stage in stages:
            a = last[-1]
            grown = atoms.ending_later(a, a)
            last.append(next((b - 1 for b, usage in grown if not fits(a, b, usage, stage)), atoms.n))
        for stage in reversed(stages):
            b = first[-1]
            first.append(next((a + 1 for a, usage in atoms.starting_earlier(b) if not fits(a, b, usage, stage)), 0))
        return first[::-1], last

    def _by_memory(self, t: int, limits: Limits) -> Counts:
        """As ``_by_time``, with every stage within the memory limit at its place in the pipeline."""
        atoms, n_stages = self._atoms, limits.n_stages
        counts = [0] * (atoms.n + 1)
        first, last = self._windows(t, limits)
        if first[0] > 0 or last[-1] < atoms.n:
            return counts
        counts[0] = 1
        cuttable = [False] * (atoms.n + 1)
        for k in self._cuttable(t):
            cuttable[k] = True
        for a in range(atoms.n):
            begin, end = bisect_left(last, a), min(bisect_right(first, a), n_stages)
            counts[a] &= max(0, (1 << end) - (1 << begin))  # the stages that may start here
            if not counts[a]:
                continue
            fewest, most = (counts[a] & -counts[a]).bit_length() - 1, counts[a].bit_length() - 1
            for b, usage in atoms.ending_later(a, max(a + 1, first[fewest + 1])):
                too_long = b > last[most + 1] or a < atoms.first[b] or usage[0] > t
                if too_long or usage[1] + usage[2] > limits.memory:
                    break
                if cuttable[b] and atoms.work[a] < atoms.work[b]:
                    skipped = self._stages_without_room(a, b, usage, limits)
                    counts[b] |= (counts[a] >> skipped << skipped) << 1
        return counts

    def _stages_without_room(self, a: int, b: int, usage: Usage, limits: Limits) -> int:
        """How many of the first stages ``[a, b)`` cannot be, because what is in flight there would not fit."""
        once, each = self._atoms.memory(a, b, usage)
        fits = int((limits.memory - once) // max(each, 1))
        if limits.memory < once or (each and fits < 1):
            return limits.n_stages
        everywhere = not each or (limits.n_microbatches is not None and fits >= limits.n_microbatches)
        return 0 if everywhere else max(0, limits.n_stages - fits)

    def _read_back(self, t: int, counts: Counts, limits: Limits) -> Cut:
        """The cut that the sweep found, chosen from the end to the start; see ``best`` for the choice among equals."""
        atoms, earliest, boundaries = self._atoms, self.earliest(t), [self._atoms.n]
        for stage in range(limits.n_stages - 1, -1, -1):
            b = boundaries[-1]
            starts = (a for a in range(earliest[b], b) if counts[a] >> stage & 1 and atoms.work[a] < atoms.work[b])
            ranked = sorted(starts, key=self._preference(b, stage))
            fits = (a for a in ranked if self._memory(a, b, atoms.usage(a, b), stage, limits) <= limits.memory)
            boundaries.append(next(fits))
        stages = list(enumerate(pairwise(boundaries[::-1])))
        usages = [atoms.usage(a, b) for _, (a, b) in stages]
        memory = [self._memory(a, b, usage, s, limits) for (s, (a, b)), usage in zip(stages, usages, strict=True)]
        times = tuple(usage[0] for usage in usages)
        slowest = max(*times, *(atoms.link[a] for a in boundaries))
        return Cut(tuple(atoms.at[k] for k in boundaries[::-1]), times, tuple(memory), slowest)

    def _preference(self, b: int, stage: int) -> Callable[[int], tuple[int, int, int]]:
        ticks, link = self._atoms.ticks, self._atoms.link
        return lambda a: (link[a], abs(ticks[a] * (stage + 1) - ticks[b] * stage), a)

    def _memory(self, a: int, b: int, usage: Usage, stage: int, limits: Limits) -> int:
        once, each = self._atoms.memory(a, b, usage)
        return once + limits.in_flight(stage) * each

    def _least_memory(self, usage: Usage, stage: int, limits: Limits) -> int:
        return usage[2] + limits.in_flight(stage) * usage[1]
