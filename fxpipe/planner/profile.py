"""What a model costs, layer by layer, as frozen arrays; read from and written to plain JSON objects.

    {"nodes": [{"id", "name", "forward_seconds", "backward_seconds", "output_bytes", "parameter_bytes"}],
     "edges": [[source id, target id]]}

Numbers are those of one microbatch on one device.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxpipe.errors import OptionError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
NodeId: TypeAlias = int | str

NUMBERS = ("forward_seconds", "backward_seconds", "output_bytes", "parameter_bytes")


@dataclass(frozen=True, eq=False)
class Profile:
    """A DAG of layers. Node ``i`` is ``ids[i]``; every array of numbers has shape (n_nodes,), ``edges`` (n_edges, 2).

    ``order`` lists the nodes so that every edge goes forward, as near to the order of the profile as the edges allow.
    """

    ids: tuple[NodeId, ...]
    names: tuple[str, ...]
    forward_seconds: Floats
    backward_seconds: Floats
    output_bytes: Floats
    parameter_bytes: Floats
    edges: Ints
    order: Ints

    @property
    def n_nodes(self) -> int:
        return len(self.ids)

    @property
    def compute_seconds(self) -> Floats:
        """Forward and backward together, shape (n_nodes,)."""
        return self.forward_seconds + self.backward_seconds

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``read_profile`` reads."""
        columns = [getattr(self, field).tolist() for field in NUMBERS]
        nodes = [
            {"id": id, "name": name, **dict(zip(NUMBERS, row, strict=True))}
            for id, name, *row in zip(self.ids, self.names, *columns, strict=True)
        ]
        return {"nodes": nodes, "edges": [[self.ids[a], self.ids[b]] for a, b in self.edges.tolist()]}


def read_profile(data: Mapping[str, Any]) -> Profile:
    """The profile that a JSON object describes; ``name`` may be missing and is then the id.

    Raises:
        OptionError: not such an object, a node twice, an edge to an unknown node, a number that is missing, negative or
            not finite, or a cycle; names the node or edge.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), Sequence) or isinstance(data["nodes"], str):
        raise OptionError('a profile is an object {"nodes": [...], "edges": [...]}; found no list of nodes')
    if not data["nodes"]:
        raise OptionError("the profile has no nodes; there is nothing to partition")
    index = _index(data["nodes"])
    columns = {field: _column(data["nodes"], field) for field in NUMBERS}
    edges = _edges(data.get("edges", []), index)
    names = tuple(str(node.get("name", node["id"])) for node in data["nodes"])
    order = _sorted(edges, tuple(index))
    return Profile(tuple(index), names, **columns, edges=_frozen(edges), order=_frozen(order))


def _index(nodes: Sequence[Any]) -> dict[NodeId, int]:
    index: dict[NodeId, int] = {}
    for position, node in enumerate(nodes):
        if not isinstance(node, Mapping) or not isinstance(node.get("id"), int | str):
            raise OptionError(f"node {position} of the profile has no id that is a number or a text: {node!r:.80}")
        if node["id"] in index:
            raise OptionError(f"the profile has two nodes with id {node['id']!r}; ids name one node each")
        index[node["id"]] = position
    return index


def _column(nodes: Sequence[Mapping[str, Any]], field: str) -> Floats:
    found = [node.get(field) for node in nodes]
    values = np.array(found, dtype=np.float64) if {type(value) for value in found} <= {int, float} else np.array([-1.0])
    if not (np.isfinite(values) & (values >= 0)).all():
        for node in nodes:
            _check_number(node, field)
    column: Floats = _frozen(np.array(found, dtype=np.float64))
    return column


def _check_number(node: Mapping[str, Any], field: str) -> None:
    value = node.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value < 0:
        found = f"is {value!r}" if field in node else "is missing"
        raise OptionError(f"node {node['id']!r}: {field} {found}; expected a finite number, at least 0")


def _edges(pairs: Sequence[Any], index: Mapping[NodeId, int]) -> Ints:
    """Each edge once, as positions of nodes."""
    found: dict[tuple[int, int], None] = {}
    for position, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise OptionError(f"edge {position} of the profile is {pair!r}; expected [source id, target id]")
        for end in pair:
            if not isinstance(end, int | str) or end not in index:
                raise OptionError(f"edge {list(pair)!r} names node {end!r}, which the profile does not have")
        found[index[pair[0]], index[pair[1]]] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, 2)


def _sorted(edges: Ints, ids: tuple[NodeId, ...]) -> Ints:
    if (edges[:, 0] < edges[:, 1]).all():
        return np.arange(len(ids))
    consumers: list[list[int]] = [[] for _ in ids]
    for source, target in edges.tolist():
        consumers[source].append(target)
    waiting_for = np.bincount(edges[:, 1], minlength=len(ids)).tolist()
    ready = deque(node for node, count in enumerate(waiting_for) if not count)
    order: list[int] = []
    while ready:
        order.append(ready.popleft())
        for target in consumers[order[-1]]:
            waiting_for[target] -= 1
            if not waiting_for[target]:
                ready.append(target)
    if len(order) < len(ids):
        names = " -> ".join(repr(ids[node]) for node in _cycle(edges, set(range(len(ids))) - set(order)))
        raise OptionError(f"the profile has a cycle: {names}; a value cannot be computed from itself")
    return np.array(order, dtype=np.int64)


def _cycle(edges: Ints, left: set[int]) -> list[int]:
    """One cycle among nodes that all wait for another of them; begins and ends with the same node."""
    source_of = {b: a for a, b in edges.tolist() if a in left and b in left}
    path, node = [], min(source_of)
    while node not in path:
        path.append(node)
        node = source_of[node]
    return [*path[path.index(node) :], node][::-1]


def _frozen(array: Any) -> Any:
    array.setflags(write=False)
    return array
