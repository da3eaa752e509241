"""Which stages keep to a time, as bits: of each cut where a stage may end, the cuts where it may begin, in 64-bit words.

The work of a stage is a difference of two sums, one for the cut after it and one for the cut before it. What can begin in time
for a given end is therefore a row of a table: the cuts, sorted by their sum, added one by one.
"""

from collections.abc import Sequence
from itertools import groupby
from math import inf
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxpipe.planner.cost_model import CostModel
from fxpipe.planner.cuts import Cuts
from fxpipe.planner.profile import Floats, Ints

Words: TypeAlias = NDArray[np.uint64]
# What the work of a stage depends on: seconds per byte of its all-reduce, seconds per byte of its links where they add to the
# work (times replicas), microbatches held, whether it has several replicas, and how many.
Key: TypeAlias = tuple[float, float, float, bool, float]

MOST_CUTS = 1024
ROUNDING = 4e-16  # relative: of a sum


class Stages:
    """What a stage between two cuts takes. ``holds``: whether each cut (row) holds each other one."""

    def __init__(self, cuts: Cuts, holds: NDArray[np.bool_], model: CostModel, memory_bytes: float | None) -> None:
        self.cuts, self.model, self.memory_bytes = cuts, model, memory_bytes
        self.width = -(-cuts.n // 64) * 64
        if cuts.labelled[-1] > 1:
            holds = holds & (cuts.labelled[:, None] - cuts.labelled <= 1)
        self.holds = holds
        self.stored = None if memory_bytes is None else cuts.parameters + cuts.activations
        self.light, self.early = UpTo(cuts.crossing), UpTo(cuts.compute)
        self.least: dict[tuple[float, float, float], AtLeast] = {}
        self.allowed: dict[tuple[float, bool], Words] = {}

    def device_seconds(self, key: Key, after: Ints, before: Ints) -> Floats:
        """The work of the stages between some cuts on certain devices, all replicas together, as the two broadcast; infinite
        where there is no such stage or a limit forbids it."""
        all_reduce, own_link, held, replicated, _ = key
        cuts = self.cuts
        compute = cuts.compute[after] - cuts.compute[before]
        bytes_reduced = cuts.parameters[after] - cuts.parameters[before]
        both = np.maximum if self.model.overlap_all_reduce else np.add
        work: Floats = both(compute, all_reduce * bytes_reduced)
        if own_link:
            work = work + own_link * (cuts.crossing[after] + cuts.crossing[before])
        able = self.holds[after, before]
        if self.stored is not None and self.memory_bytes is not None:
            able = able & (held * (self.stored[after] - self.stored[before]) <= self.memory_bytes)
        if replicated:
            able = able & (cuts.single[after] <= cuts.single[before])
        return np.where(able, work, inf)

    def within(self, keys: Sequence[Key], time: float, found: Words) -> None:
        """Enters from which cuts a stage may reach each cut in time; shape (n cuts after, n keys, n words of cuts before).
        Keys that differ in their replicas alone are quickest side by side."""
        at = 0
        for (all_reduce, own_link, held, replicated), group in groupby(keys, lambda key: key[:-1]):
            seconds = time * np.array([key[-1] for key in group])
            end, allowed = at + len(seconds), self._allowed(held, replicated)[:, None]
            if self.model.overlap_all_reduce:
                words = self._in_time(0.0, own_link, seconds) & self._in_time(
                    all_reduce, own_link, seconds, compute=0.0
                )
            else:
                words = self._in_time(all_reduce, own_link, seconds)
            np.bitwise_and(words, allowed, out=found[:, at:end])
            at = end

    def _in_time(self, all_reduce: float, own_link: float, seconds: Floats, compute: float = 1.0) -> Words:
        """For each cut after a stage and each number of seconds the cuts before it; shape (n, n seconds, n words)."""
        key = all_reduce, own_link, compute
        if key not in self.least:
            cuts = self.cuts
            work, link = compute * cuts.compute + all_reduce * cuts.parameters, own_link * cuts.crossing
            self.least[key] = AtLeast(work + link, work - link)
        return self.least[key](seconds)

    def _allowed(self, held: float, replicated: bool) -> Words:
        """The stages that no limit forbids, shape (n cuts after, n words of cuts before)."""
        key = held, replicated
        if key not in self.allowed:
            cuts, able = self.cuts, self.holds
            if self.stored is not None and self.memory_bytes is not None:
                able = able & (held * (self.stored[:, None] - self.stored) <= self.memory_bytes)
            if replicated and cuts.single[-1]:
                able = able & (cuts.single[:, None] <= cuts.single)
            self.allowed[key] = words_of(np.pad(able, ((0, 0), (0, self.width - cuts.n))))
        return self.allowed[key]

    def bits(self, words: Words) -> NDArray[np.uint8]:
        """Words as ones and zeros, shape (..., n cuts)."""
        return np.unpackbits(words.view(np.uint8), axis=-1, count=self.cuts.n, bitorder="little")


class UpTo:
    """The cuts whose value, shape (n,), is no more than a limit."""

    def __init__(self, values: Floats) -> None:
        n, order = len(values), np.argsort(values, kind="stable")
        self.values = values[order]
        next_one = np.zeros((n + 1, -(-n // 64)), dtype=np.uint64)
        next_one[np.arange(1, n + 1), order // 64] = np.uint64(1) << (order % 64).astype(np.uint64)
        self.words = np.bitwise_or.accumulate(next_one, axis=0)  # row k: the k least

    def __call__(self, limits: Floats) -> Words:
        """For each limit the cuts as words, shape (..., n words)."""
        return self.words.take(self.values.searchsorted(limits, side="right"), axis=0)


class AtLeast:
    """Of each cut after a stage the cuts before it that are no further than some seconds: ``after - before <= seconds``, up
    to rounding."""

    def __init__(self, after: Floats, before: Floats) -> None:
        self.rounding = ROUNDING * float(max(np.abs(after).max(), np.abs(before).max()))
        self.after, self.before = after[:, None], UpTo(-before)

    def __call__(self, seconds: Floats) -> Words:
        """Shape (n cuts after, n seconds, n words of cuts before)."""
        return self.before(seconds + self.rounding - self.after)


def words_of(bits: NDArray[np.bool_]) -> Words:
    """Rows of bits as rows of 64-bit words."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)
