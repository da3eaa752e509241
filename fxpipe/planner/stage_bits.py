"""Which stages keep to a time, as bits: of each cut where a stage may end, the cuts where it may begin, in 64-bit words."""

from collections.abc import Sequence
from math import inf
from typing import Any, TypeAlias

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
MOST_ROWS = 256  # at once, for the cache; whole words


class Stages:
    """What a stage between two cuts takes, in matrices by the cut after it and the cut before it, shape (n, n rounded up
    to 64); ``compute`` is infinite where there is no such stage. ``holds``: whether each cut (row) holds each other one."""

    def __init__(self, cuts: Cuts, holds: NDArray[np.bool_], model: CostModel, memory_bytes: float | None) -> None:
        self.cuts, self.model, self.memory_bytes = cuts, model, memory_bytes
        self.width = -(-cuts.n // 64) * 64
        if cuts.labelled[-1] > 1:
            holds = holds & (self._between(cuts.labelled)[:, : cuts.n] <= 1)
        self.compute = np.full((cuts.n, self.width), inf)
        np.subtract(cuts.compute[:, None], cuts.compute, out=self.compute[:, : cuts.n], where=holds)
        self.parameters = self._between(cuts.parameters)
        self.stored = None if memory_bytes is None else self._between(cuts.parameters + cuts.activations)
        self.single = self._between(cuts.single) > 0 if cuts.single[-1] else None
        # Large arrays made anew at each step would cost more than what is computed in them.
        shape = min(cuts.n, MOST_ROWS), self.width
        self.room, self.room_of_bits = np.empty(shape), np.empty(shape, dtype=bool)
        self.light, self.early = UpTo(cuts.crossing), UpTo(cuts.compute)

    def _between(self, sums: Floats | Ints) -> Floats:
        return np.asarray(sums[:, None] - np.pad(sums, (0, self.width - self.cuts.n)), dtype=np.float64)

    def device_seconds(self, key: Key, which: Any = ..., out: Floats | None = None) -> Floats:
        """The work of all or some stages on certain devices, all replicas together; infinite where a limit forbids it."""
        all_reduce, own_link, held, replicated, _ = key
        work: Floats = np.multiply(self.parameters[which], all_reduce, out=out)
        (np.maximum if self.model.overlap_all_reduce else np.add)(self.compute[which], work, out=work)
        if own_link:
            crossing = self.cuts.crossing
            work += own_link * (np.pad(crossing, (0, self.width - self.cuts.n)) + crossing[:, None])[which]
        if self.stored is not None and self.memory_bytes is not None:
            work[held * self.stored[which] > self.memory_bytes] = inf
        if self.single is not None and replicated:
            work[self.single[which]] = inf
        return work

    def within(self, keys: Sequence[Key], time: float, found: Words) -> None:
        """Enters from which cuts a stage may reach each cut in time; shape (n cuts after, n keys, n words of cuts before),
        with nothing above the diagonal."""
        for first in range(0, self.cuts.n, MOST_ROWS):
            which = slice(first, first + MOST_ROWS), slice(first + MOST_ROWS)
            shape = slice(min(MOST_ROWS, self.cuts.n - first)), which[1]
            room, bits, n_words = self.room[shape], self.room_of_bits[shape], which[1].stop // 64
            for at, key in enumerate(keys):
                if not at or key[:-1] != keys[at - 1][:-1]:
                    work = self.device_seconds(key, which, out=room)
                found[which[0], at, :n_words] = words_of(np.less_equal(work, time * key[-1], out=bits))

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


def words_of(bits: NDArray[np.bool_]) -> Words:
    """Rows of bits as rows of 64-bit words."""
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)
