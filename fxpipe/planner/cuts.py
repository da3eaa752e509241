"""Where a graph may be cut: sets of atoms that nothing outside leads into (down-sets), with the sums that a stage needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxpipe.planner.graph import Graph
from fxpipe.planner.profile import Floats, Ints

Holds: TypeAlias = NDArray[np.bool_]  # whether each cut (row) holds each other one (column) and more, shape (n, n)

SUMS = ("compute", "parameters", "activations", "labelled", "single")


@dataclass(frozen=True, eq=False)
class Cuts:
    """Cuts 0..n-1, the first empty, the last the whole graph, none inside an earlier one; arrays have shape (n,).

    Sums over the atoms before the cut: compute in seconds, bytes of parameters and of activations, atoms with a label, atoms
    that forbid replication. ``crossing``: bytes that cross, one way.
    """

    compute: Floats
    parameters: Floats
    activations: Floats
    labelled: Ints
    single: Ints
    crossing: Floats

    @property
    def n(self) -> int:
        return len(self.compute)


@dataclass(frozen=True, eq=False)
class CutsOfOrder(Cuts):
    """Cut ``i`` comes after the first ``i`` atoms of ``order``, so each lies inside all later ones."""

    order: Ints

    def atoms(self, before: int, after: int) -> list[int]:
        """The atoms between two cuts."""
        atoms: list[int] = self.order[before:after].tolist()
        return atoms


@dataclass(frozen=True, eq=False)
class CutSets(Cuts):
    """Any down-sets: ``inside[i, atom]`` says whether the atom comes before cut ``i``."""

    inside: NDArray[np.bool_]

    def atoms(self, before: int, after: int) -> list[int]:
        """The atoms between two cuts."""
        return np.flatnonzero(self.inside[after] & ~self.inside[before]).tolist()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of cuts, the first inside the second: what a stage may be. Sorted by ``before``, then by ``after``; those of
    cut ``i`` are ``after[start[i] : start[i + 1]]``."""

    before: Ints
    after: Ints
    start: Ints

    def keep(self, mask: NDArray[np.bool_]) -> "Pairs":
        """The pairs where the mask is true."""
        before = self.before[mask]
        return Pairs(before, self.after[mask], np.searchsorted(before, np.arange(len(self.start))))


def cuts_of_order(graph: Graph, order: Ints) -> CutsOfOrder:
    """The n + 1 cuts along one topological order, in O(nodes + edges)."""
    position = np.empty(graph.n, dtype=np.int64)
    position[order] = np.arange(graph.n)
    change = np.zeros(graph.n + 2)
    alive = np.zeros(graph.n + 2, dtype=np.int64)
    if len(graph.value_source):
        first = position[graph.value_source] + 1
        last = np.maximum.reduceat(position[graph.consumers], graph.value_start[:-1]) + 1
        for at, sign in ((first, 1), (last, -1)):
            np.add.at(change, at, sign * graph.value_bytes)
            np.add.at(alive, at, sign)
    crossing = np.where(np.cumsum(alive)[:-1] > 0, np.maximum(np.cumsum(change)[:-1], 0), 0.0)

    sums: dict[str, Any] = {field: np.append(0, np.cumsum(getattr(graph, field)[order])) for field in SUMS}
    return CutsOfOrder(**sums, crossing=crossing, order=order)


def cut_sets(graph: Graph, inside: NDArray[np.bool_]) -> CutSets:
    """The cuts given as rows of ``inside``, sorted by size."""
    inside = inside[np.argsort(inside.sum(axis=1), kind="stable")]
    crossing = np.zeros(len(inside))
    if len(graph.value_source):
        read = np.logical_and.reduceat(inside[:, graph.consumers], graph.value_start[:-1], axis=1)
        crossing = _sum_of(inside[:, graph.value_source] & ~read, graph.value_bytes)
    sums: dict[str, Any] = {field: _sum_of(inside, getattr(graph, field)) for field in SUMS}
    return CutSets(**sums, crossing=crossing, inside=inside)


def _sum_of(rows: NDArray[np.bool_], values: Any) -> Any:
    """The sum of the values that each row chooses; no matrix product, which would start threads."""
    return np.where(rows, values, 0).sum(axis=1)


def lattice(graph: Graph, limit: int) -> NDArray[np.bool_] | None:
    """Every down-set as a row of (n cuts, n atoms), or None where there are more than ``limit``."""
    needs = [sum(1 << p for p in predecessors) for predecessors in graph.predecessors]
    first = sum(1 << atom for atom in range(graph.n) if not needs[atom])
    ready = {0: first}  # of each down-set, the atoms that may follow
    waiting = [0]
    for cut in waiting:  # grows as we go
        left = ready[cut]
        while left:
            bit = left & -left
            left ^= bit
            if (larger := cut | bit) in ready:
                continue
            if len(ready) >= limit:
                return None
            new = sum(1 << s for s in graph.successors[bit.bit_length() - 1] if not needs[s] & ~larger)
            ready[larger] = (ready[cut] ^ bit) | new
            waiting.append(larger)
    n_bytes = -(-graph.n // 8)
    packed = np.frombuffer(b"".join(c.to_bytes(n_bytes, "little") for c in waiting), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(waiting), n_bytes), axis=1, bitorder="little")
    return bits[:, : graph.n].astype(bool)


def sets_of_orders(graph: Graph, orders: Sequence[Ints]) -> NDArray[np.bool_]:
    """The cuts of several orders together, each once, as rows of (n cuts, n atoms)."""
    rows = np.concatenate([np.argsort(order) < np.arange(graph.n + 1)[:, None] for order in orders])
    packed = np.packbits(rows, axis=1)
    first = {row.tobytes(): at for at, row in reversed(list(enumerate(packed)))}
    return rows[sorted(first.values())]


def nested_line(n: int) -> Holds:
    """The same as ``nested`` for n cuts of which each lies inside all later ones."""
    return np.tri(n, k=-1, dtype=bool)


def nested(cuts: CutSets) -> Holds:
    """Which cuts, sorted by size and all different, hold which."""
    found = np.zeros((cuts.n, cuts.n), dtype=bool)
    n_atoms = cuts.inside.shape[1]
    words = np.packbits(np.pad(cuts.inside, ((0, 0), (0, -n_atoms % 64))), axis=1).view(np.uint64).T.copy()
    for at in range(0, cuts.n, 32):  # small enough for the cache; later cuts are no smaller
        end = at + 32
        outside = np.bitwise_or.reduce(words[:, None, :end] & ~words[:, at:end, None], axis=0)
        np.equal(outside, 0, out=found[at:end, :end])
    np.fill_diagonal(found, False)
    return found


def pairs_of(holds: Holds) -> Pairs:
    """All pairs of cuts of which one holds the other."""
    before, after = np.nonzero(holds.T)
    return Pairs(before, after, np.searchsorted(before, np.arange(len(holds) + 1)))
