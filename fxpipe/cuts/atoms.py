"""A chain between its legal cuts: the sums that the search for a cut needs, in constant time or step by step."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

from fxpipe.cuts.chain import Chain, Shared

Usage = tuple[int, int, int]  # of one stage: ticks, saved bytes for each microbatch in flight, state bytes
Touches = dict[int, list[tuple[int, int, Usage]]]  # atom -> (atom touched before, atom touched after, weight)


class Atoms:
    """What lies between two legal cuts is one atom. Boundary k stands before atom k, at position ``at[k]`` of the chain;
    ``n`` is the boundary after the last atom.

    ``link``, ``activation`` and ``gradient`` are the chain's, by boundary. ``ticks`` is the compute before each boundary,
    ``work`` the number of atoms before it that have any: stages between boundaries of equal ``work`` would do nothing.
    A stage that ends at boundary b starts no earlier than ``first[b]``.
    """

    def __init__(self, chain: Chain) -> None:
        self.at = (0, *chain.legal, len(chain.ticks))
        self.n = len(self.at) - 1
        self.link = [0, *(chain.link_ticks[p] for p in chain.legal), 0]
        self.activation = [chain.activation_bytes[p] for p in self.at]
        self.gradient = [chain.gradient_bytes[p] for p in self.at]
        atom_of = [k for k, (a, b) in enumerate(pairwise(self.at)) for _ in range(a, b)]
        own = [[0, 0, 0] for _ in range(self.n)]
        for position, k in enumerate(atom_of):
            _add(own[k], (chain.ticks[position], chain.saved_bytes[position], 0))
        self.touches = _touches(chain.shared, atom_of, own)
        self._touched = sorted(self.touches)
        self._sums = [list(accumulate((atom[i] for atom in own), initial=0)) for i in range(3)]
        self.ticks = self._sums[0]
        busy = [atom[0] > 0 or any(w[0] for *_, w in self.touches.get(k, ())) for k, atom in enumerate(own)]
        busy[-1] |= not any(busy)  # a chain without any work is one stage
        self.work = list(accumulate(busy, initial=0))
        self.first = self._first(chain.apart, atom_of)

    def _first(self, apart: Iterable[tuple[int, int]], atom_of: list[int]) -> list[int]:
        """For each boundary b the first a for which stage ``[a, b)`` has no two positions that must be apart."""
        parted = {atom_of[later]: atom_of[earlier] + 1 for earlier, later in apart}
        return [0, *accumulate((parted.get(k, 0) for k in range(self.n)), max)]

    def usage(self, a: int, b: int) -> Usage:
        """What stage ``[a, b)`` costs: what its atoms own, and each shared thing that it touches once."""
        total = [prefix[b] - prefix[a] for prefix in self._sums]
        for k in self._touched[bisect_left(self._touched, a) : bisect_left(self._touched, b)]:
            for before, _, weight in self.touches[k]:
                if before < a:
                    _add(total, weight)
        return total[0], total[1], total[2]

    def ending_later(self, a: int, b: int) -> Iterator[tuple[int, Usage]]:
        """``b``, b + 1, ... to the end, each with the usage of the stage from ``a`` to there."""
        total = list(self.usage(a, b))
        for end in range(b, self.n + 1):
            yield end, (total[0], total[1], total[2])
            if end < self.n:
                self._add_own(total, end)
                for before, _, weight in self.touches.get(end, ()):
                    if before < a:
                        _add(total, weight)

    def starting_earlier(self, b: int) -> Iterator[tuple[int, Usage]]:
        """b - 1, b - 2, ... 0, each with the usage of the stage from there to ``b``."""
        total = [0, 0, 0]
        for start in range(b - 1, -1, -1):
            self._add_own(total, start)
            for _, after, weight in self.touches.get(start, ()):
                if after >= b:
                    _add(total, weight)
            yield start, (total[0], total[1], total[2])

    def _add_own(self, total: list[int], k: int) -> None:
        for i, prefix in enumerate(self._sums):
            total[i] += prefix[k + 1] - prefix[k]

    def memory(self, a: int, b: int, usage: Usage) -> tuple[int, int]:
        """Bytes that stage ``[a, b)`` keeps once, and for each microbatch in flight.

        Once: parameters, their gradients, buffers; what it sends; the gradients that it receives and sends. In flight:
        what it saves for backward and what it has received.
        """
        once = usage[2] + self.gradient[a] + self.activation[b] + self.gradient[b]
        return once, usage[1] + self.activation[a]


def _add(total: list[int], weights: Iterable[int]) -> None:
    for i, weight in enumerate(weights):
        total[i] += weight


def _touches(shared: tuple[Shared, ...], atom_of: list[int], own: list[list[int]]) -> Touches:
    """Where shared things are touched; before the first touch stands -1, after the last the number of atoms.

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
