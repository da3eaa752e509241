"""Topological orders of a graph: lines along which it may be cut."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from fxpipe.planner.graph import Graph
from fxpipe.planner.profile import Ints

Key = Callable[[int], object]


def some_orders(graph: Graph) -> list[Ints]:
    """Different orders, the profile's own first; one where there is only one."""
    own = np.arange(graph.n)
    if graph.is_chain:
        return [own]
    found = [own, depth_first(graph), least_live_bytes(graph), *level_orders(graph)]
    return list({order.tobytes(): order for order in found}.values())


def sorted_by(graph: Graph, key: Sequence[float] | Sequence[tuple[float, ...]]) -> Ints:
    """The order that always takes the ready atom with the least key."""
    waiting_for = [len(p) for p in graph.predecessors]
    ready = [(key[atom], atom) for atom in range(graph.n) if not waiting_for[atom]]
    heapq.heapify(ready)
    order = []
    while ready:
        atom = heapq.heappop(ready)[1]
        order.append(atom)
        for other in graph.successors[atom]:
            waiting_for[other] -= 1
            if not waiting_for[other]:
                heapq.heappush(ready, (key[other], other))
    return np.array(order, dtype=np.int64)


def level_orders(graph: Graph) -> list[Ints]:
    """As early as possible, and as late as possible, by the compute on the longest way there."""
    early, late = [0.0] * graph.n, [0.0] * graph.n
    compute = graph.compute.tolist()
    for atom in range(graph.n):
        early[atom] = max((early[p] + compute[p] for p in graph.predecessors[atom]), default=0.0)
    for atom in reversed(range(graph.n)):
        late[atom] = min((late[s] for s in graph.successors[atom]), default=0.0) - compute[atom]
    return [sorted_by(graph, early), sorted_by(graph, late)]


def depth_first(graph: Graph) -> Ints:
    """Follows a branch to its end before it starts the next."""
    waiting_for = [len(p) for p in graph.predecessors]
    stack = [atom for atom in reversed(range(graph.n)) if not waiting_for[atom]]
    order = []
    while stack:
        atom = stack.pop()
        order.append(atom)
        for other in reversed(graph.successors[atom]):
            waiting_for[other] -= 1
            if not waiting_for[other]:
                stack.append(other)
    return np.array(order, dtype=np.int64)


def least_live_bytes(graph: Graph, stage_of: Sequence[int] | None = None) -> Ints:
    """Always takes the ready atom that adds least to the bytes that are still to be read; stage by stage where given."""
    made: list[list[int]] = [[] for _ in range(graph.n)]
    read: list[list[int]] = [[] for _ in range(graph.n)]
    left = np.diff(graph.value_start).tolist()
    for value, source in enumerate(graph.value_source.tolist()):
        made[source].append(value)
    values = np.repeat(np.arange(len(left)), left)
    for value, consumer in zip(values.tolist(), graph.consumers.tolist(), strict=True):
        read[consumer].append(value)
    n_bytes = graph.value_bytes.tolist()
    added = [sum(n_bytes[v] for v in values) for values in made]
    stage = [0] * graph.n if stage_of is None else list(stage_of)

    def key(atom: int) -> tuple[int, float]:
        return stage[atom], added[atom] - sum(n_bytes[v] for v in read[atom] if left[v] == 1)

    waiting_for = [len(p) for p in graph.predecessors]
    best = {atom: key(atom) for atom in range(graph.n) if not waiting_for[atom]}
    ready = [(k, atom) for atom, k in best.items()]
    heapq.heapify(ready)
    readers = [graph.consumers[a:b].tolist() for a, b in zip(graph.value_start, graph.value_start[1:], strict=False)]
    order: list[int] = []
    while ready:
        found, atom = heapq.heappop(ready)
        if best.get(atom) != found:
            continue  # an older key of this atom
        del best[atom]
        order.append(atom)
        changed = [o for o in graph.successors[atom] if not _decrement(waiting_for, o)]
        for value in read[atom]:
            if not _decrement(left, value) - 1:  # its last reader now frees it
                changed += [o for o in readers[value] if o in best]
        for other in changed:
            best[other] = key(other)
            heapq.heappush(ready, (best[other], other))
    return np.array(order, dtype=np.int64)


def _decrement(counts: list[int], at: int) -> int:
    counts[at] -= 1
    return counts[at]
