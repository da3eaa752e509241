"""The graph that the search works on: nodes that must stay together are one atom of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

import numpy as np

from fxpipe.errors import PartitionError
from fxpipe.planner.constraints import Constraints
from fxpipe.planner.profile import Floats, Ints, Profile


@dataclass(frozen=True, eq=False)
class Graph:
    """Atoms 0..n-1, numbered so that every edge goes forward.

    Per atom, shape (n,): compute in seconds, bytes of parameters, of outputs (``activations``); whether it has a label,
    whether its stage must not be replicated. Value ``v`` is ``value_bytes[v]`` made by atom ``value_source[v]`` and read by
    the atoms ``consumers[value_start[v] : value_start[v + 1]]``, never none. ``members``: the nodes of each atom, by
    position in the profile, in an order in which they can run.
    """

    compute: Floats
    parameters: Floats
    activations: Floats
    labelled: Ints
    single: Ints
    value_bytes: Floats
    value_source: Ints
    value_start: Ints
    consumers: Ints
    members: tuple[tuple[int, ...], ...]

    @property
    def n(self) -> int:
        return len(self.compute)

    @cached_property
    def successors(self) -> list[list[int]]:
        """The atoms that read something of each atom, ascending."""
        return self._neighbours(self._edges)

    @cached_property
    def predecessors(self) -> list[list[int]]:
        """The atoms that each atom reads something of, ascending."""
        return self._neighbours(self._edges[:, ::-1])

    @cached_property
    def is_chain(self) -> bool:
        """Whether there is only one order in which the atoms can run."""
        edges = self._edges
        return int((edges[:, 1] - edges[:, 0] == 1).sum()) == self.n - 1

    @cached_property
    def _edges(self) -> Ints:
        sources = np.repeat(self.value_source, np.diff(self.value_start))
        keys = np.unique(sources * self.n + self.consumers)
        return np.stack([keys // self.n, keys % self.n], axis=1)

    def _neighbours(self, edges: Ints) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.n)]
        for a, b in edges.tolist():
            found[a].append(b)
        return found


def build_graph(profile: Profile, constraints: Constraints) -> Graph:
    """The graph of a profile, with the nodes that carry one label made one atom, with all that lies between them.

    Raises:
        OptionError: a label or ``not_replicated`` names no node.
        PartitionError: nodes with different labels cannot be parted, because each lies between nodes of the other.
    """
    labels = constraints.labels(profile)
    atom_of, members = _atoms(profile, labels)
    n = len(members)
    single = np.zeros(n, dtype=np.int64)
    single[[atom_of[node] for node in constraints.single(profile)]] = 1
    labelled = np.zeros(n, dtype=np.int64)
    labelled[[atom_of[node] for node in labels]] = 1
    keys = np.unique(profile.edges[:, 0] * n + atom_of[profile.edges[:, 1]])  # node, atom that reads it
    nodes, readers = keys // n, keys % n
    nodes, readers = nodes[atom_of[nodes] != readers], readers[atom_of[nodes] != readers]
    makers, start = np.unique(nodes, return_index=True)

    def total(values: Floats) -> Floats:
        return np.bincount(atom_of, values, n).astype(np.float64)

    return Graph(
        compute=total(profile.compute_seconds),
        parameters=total(profile.parameter_bytes),
        activations=total(profile.output_bytes),
        labelled=labelled,
        single=single,
        value_bytes=profile.output_bytes[makers],
        value_source=atom_of[makers],
        value_start=np.append(start, len(nodes)),
        consumers=readers,
        members=members,
    )


def _atoms(profile: Profile, labels: Mapping[int, int | str]) -> tuple[Ints, tuple[tuple[int, ...], ...]]:
    """The atom of each node and the nodes of each atom; a node between two of one label is in their atom."""
    known = list(dict.fromkeys(labels.values()))
    between = _labels_around(profile, {node: 1 << known.index(label) for node, label in labels.items()})
    members: dict[int, list[int]] = {}  # by the first node
    first_of: dict[int, int] = {}  # by the label, as a bit
    first = np.empty(profile.n_nodes, dtype=np.int64)
    for node in profile.order.tolist():
        bit = between[node]
        if bit & (bit - 1):
            raise _inseparable([label for at, label in enumerate(known) if bit >> at & 1])
        first[node] = first_of.setdefault(bit, node) if bit else node
        members.setdefault(int(first[node]), []).append(node)
    atom_of = np.empty(profile.n_nodes, dtype=np.int64)
    order = list(members) if len(members) == profile.n_nodes else _sorted(profile, first, members, labels)
    for atom, of in enumerate(order):
        atom_of[members[of]] = atom
    return atom_of, tuple(tuple(members[of]) for of in order)


def _labels_around(profile: Profile, bits: Mapping[int, int]) -> list[int]:
    """For each node the labels that lie both at or before it and at or after it, as bits."""
    if not bits:
        return [0] * profile.n_nodes
    before, after = ([bits.get(node, 0) for node in range(profile.n_nodes)] for _ in range(2))
    place = np.argsort(profile.order)
    for source, target in profile.edges[np.argsort(place[profile.edges[:, 0]], kind="stable")].tolist():
        before[target] |= before[source]
    for source, target in profile.edges[np.argsort(-place[profile.edges[:, 1]], kind="stable")].tolist():
        after[source] |= after[target]
    return [a & b for a, b in zip(before, after, strict=True)]


def _sorted(profile: Profile, first: Ints, members: Mapping[int, object], labels: Mapping[int, int | str]) -> list[int]:
    """The atoms, by their first nodes, in an order in which they can run."""
    sorter: TopologicalSorter[int] = TopologicalSorter({atom: [] for atom in members})
    for source, target in first[profile.edges].tolist():
        if source != target:
            sorter.add(target, source)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise _inseparable([labels[atom] for atom in error.args[1][:-1] if atom in labels]) from error


def _inseparable(labels: Sequence[int | str]) -> PartitionError:
    names = sorted(map(str, labels))
    return PartitionError(
        f"stage hints {names[0]!r} and {names[1]!r} cannot be parted: each has nodes that must run before nodes of the "
        "other; give them one hint, or give fewer nodes a hint"
    )
