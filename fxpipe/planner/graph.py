"""The graph that the search works on: nodes that must stay together are one atom of it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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
    return Graph(
        compute=np.bincount(atom_of, profile.compute_seconds, n),
        parameters=np.bincount(atom_of, profile.parameter_bytes, n),
        activations=np.bincount(atom_of, profile.output_bytes, n),
        labelled=labelled,
        single=single,
        value_bytes=profile.output_bytes[makers],
        value_source=atom_of[makers],
        value_start=np.append(start, len(nodes)),
        consumers=readers,
        members=members,
    )


def _atoms(profile: Profile, labels: Mapping[int, int | str]) -> tuple[Ints, tuple[tuple[int, ...], ...]]:
    atom_of = np.empty(profile.n_nodes, dtype=np.int64)
    groups: dict[int | str, list[int]] = defaultdict(list)
    for node in profile.order.tolist():
        if node in labels:
            groups[labels[node]].append(node)
    if all(len(group) == 1 for group in groups.values()):
        atom_of[profile.order] = np.arange(profile.n_nodes)
        return atom_of, tuple((node,) for node in profile.order.tolist())
    joined = _components(profile, list(groups.values()))
    for component in joined:
        found = sorted({str(labels[node]) for node in component if node in labels})
        if len(found) > 1:
            raise PartitionError(
                f"stage hints {found[0]!r} and {found[1]!r} cannot be parted: nodes of each lie between nodes of the "
                f"other; give these {len(component)} nodes one hint"
            )
    for atom, component in enumerate(joined):
        atom_of[list(component)] = atom
    return atom_of, tuple(joined)


def _components(profile: Profile, groups: list[list[int]]) -> list[tuple[int, ...]]:
    """The strongly connected components when each group is a cycle, in topological order (Tarjan, without recursion)."""
    n = profile.n_nodes
    next_nodes: list[list[int]] = [[] for _ in range(n)]
    for a, b in profile.edges.tolist():
        next_nodes[a].append(b)
    for group in groups:
        for a, b in zip(group, [*group[1:], group[0]], strict=True):
            next_nodes[a].append(b)
    place = {node: position for position, node in enumerate(profile.order.tolist())}
    index, low = [-1] * n, [0] * n
    stack: list[int] = []
    on_stack = [False] * n
    found: list[tuple[int, ...]] = []
    count = 0
    for root in reversed(profile.order.tolist()):  # late nodes first: found in reverse topological order
        if index[root] >= 0:
            continue
        calls = [(root, 0)]
        while calls:
            node, at = calls.pop()
            if at == 0:
                index[node] = low[node] = count
                count += 1
                stack.append(node)
                on_stack[node] = True
            elif on_stack[next_nodes[node][at - 1]]:
                low[node] = min(low[node], low[next_nodes[node][at - 1]])
            while at < len(next_nodes[node]):
                other = next_nodes[node][at]
                at += 1
                if index[other] < 0:
                    calls += [(node, at), (other, 0)]
                    break
                if on_stack[other]:
                    low[node] = min(low[node], index[other])
            else:
                if low[node] == index[node]:
                    cut = stack.index(node) if stack[-1] != node else len(stack) - 1
                    component, stack = stack[cut:], stack[:cut]
                    for member in component:
                        on_stack[member] = False
                    found.append(tuple(sorted(component, key=place.__getitem__)))
    return found[::-1]
