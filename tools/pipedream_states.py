"""The states that PipeDream's optimiser (``pipedream.py``) goes through: sets of nodes with all that they depend on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from fxpipe.planner.profile import Floats, Ints, Profile


class TooLargeError(Exception):
    """It cannot plan this graph within the limits; says why."""


@dataclass(frozen=True)
class States:
    """Sets of nodes (bits), sorted so that each comes after those that it contains; sums and X of each, shape (n,);
    ``before[j]``: the states that come before state j on some way to it, ascending."""

    members: tuple[int, ...]
    compute: Floats
    parameters: Floats
    activations: Floats
    sent: Floats
    before: tuple[Ints, ...]

    @property
    def n(self) -> int:
        return len(self.members)

    def between(self, sums: Floats) -> Floats:
        """``[i, j]``: the sum of state j less that of state i - 1; infinite where j comes before i. Shape (n, n)."""
        found = sums[None, :] - np.concatenate([[0.0], sums[:-1]])[:, None]
        return np.where(np.triu(np.ones_like(found)) > 0, found, inf)


def states_of(profile: Profile, most: int) -> States:
    """Every state of a profile. Raises TooLargeError where there are more than ``most``."""
    graph = _Graph(profile)
    first = graph.closure[graph.source]
    after: dict[int, list[int]] = {}
    queue = [first]
    for state in queue:
        if state in after:
            continue
        after[state] = list(dict.fromkeys(state | graph.closure[v] for v in graph.next_nodes(state)))
        queue.extend(s for s in after[state] if s not in after)
        if len(after) > most:
            raise TooLargeError(f"more than {most} states")
    members = _sorted(first, after)
    place = {state: i for i, state in enumerate(members)}
    before = [0] * len(members)
    for i, state in enumerate(members):
        for s in after[state]:
            before[place[s]] |= before[i] | 1 << i
    return States(
        members=tuple(members),
        compute=np.array([graph.total(profile.compute_seconds, state) for state in members]),
        parameters=np.array([graph.total(profile.parameter_bytes, state) for state in members]),
        activations=np.array([graph.total(profile.output_bytes, state) for state in members]),
        sent=np.array([graph.total(profile.output_bytes, graph.counted(state)) for state in members]),
        before=tuple(np.array(list(_bits(b)), dtype=np.int64) for b in before),
    )


class _Graph:
    """Successors, and each node with all that it depends on, as bits."""

    def __init__(self, profile: Profile) -> None:
        n = profile.n_nodes
        self.successors: list[list[int]] = [[] for _ in range(n)]
        for a, b in profile.edges.tolist():
            self.successors[a].append(b)
        self.readers = [sum(1 << b for b in set(s)) for s in self.successors]
        self.closure = [1 << v for v in range(n)]
        for v in profile.order.tolist():
            for reader in self.successors[v]:
                self.closure[reader] |= self.closure[v]
        read = set(profile.edges[:, 1].tolist())
        self.source = next(v for v in profile.order.tolist() if v not in read)
        self.extra = [self._extra(v) for v in range(n)]

    def _extra(self, v: int) -> int:
        """The ancestors of a node that some node which is no ancestor of it reads as well."""
        return sum(1 << p for p in _bits(self.closure[v] & ~(1 << v)) if self.readers[p] & ~self.closure[v])

    def counted(self, state: int) -> int:
        """The nodes whose outputs X adds up: the newest, and what else ``_extra`` finds."""
        newest = [v for v in _bits(state) if not self.readers[v] & state]
        return sum(1 << v for v in newest) | _union(self.extra[v] for v in newest)

    def next_nodes(self, state: int) -> Iterator[int]:
        for v in _bits(self.counted(state)):
            yield from (reader for reader in self.successors[v] if not state >> reader & 1)

    def total(self, values: Floats, state: int) -> float:
        return float(values[list(_bits(state))].sum())


def _union(sets: Iterable[int]) -> int:
    found = 0
    for bits in sets:
        found |= bits
    return found


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _sorted(first: int, after: dict[int, list[int]]) -> list[int]:
    """Depth first, each state before all that come after it."""
    done, left = {first}, [(first, iter(after[first]))]
    found: list[int] = []
    while left:
        rest = left[-1][1]
        new = next((s for s in rest if s not in done), None)
        if new is None:
            found.append(left.pop()[0])
        else:
            done.add(new)
            left.append((new, iter(after[new])))
    return found[::-1]
