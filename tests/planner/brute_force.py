"""Every plan there is, one after the other, each timed by its definition: slow, plain, and apart from the planner's code.

A plan is built from its first stage on: any set of nodes that can run, on any set of the devices that are left. Devices of
one innermost group are alike, so only how many of each group are taken is tried.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from math import inf
from typing import Any


def down_sets(n: int, edges: list[list[int]], done: frozenset[int]) -> Iterator[frozenset[int]]:
    """Every set of further nodes that can run after ``done``, none left out between."""
    left = [v for v in range(n) if v not in done]
    needs = {v: {a for a, b in edges if b == v} - done for v in left}
    for size in range(1, len(left) + 1):
        for chosen in map(frozenset, combinations(left, size)):
            if all(needs[v] <= chosen for v in chosen):
                yield chosen


def crossing_bytes(data: dict[str, Any], done: frozenset[int]) -> float:
    """The outputs of nodes in ``done`` that some node outside reads."""
    sources = {a for a, b in data["edges"] if a in done and b not in done}
    return sum(data["nodes"][a]["output_bytes"] for a in sources)


def replica_sets(free: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """How many devices of each innermost group a stage takes."""
    return (taken for taken in product(*(range(f + 1) for f in free)) if any(taken))


def all_reduce(taken: tuple[int, ...], levels: list[dict[str, Any]]) -> float:
    """Seconds for each byte of parameters."""
    total, counts = 0.0, [list(range(c)) for c in taken]
    units = [group * levels[0]["size"] + i for group, c in enumerate(counts) for i in c]
    for level in levels:
        above = [u // level["size"] for u in sorted(set(units))]
        g = max(above.count(u) for u in above)
        total += 4 * (g - 1) / g / level["bandwidth_bytes_per_second"]
        units = above
    return total


def link(before: tuple[int, ...], after: tuple[int, ...], levels: list[dict[str, Any]]) -> float:
    """Seconds for each byte that crosses, one way counted, both ways moved."""
    shares = [{g: c / sum(taken) for g, c in enumerate(taken)} for taken in (before, after)]
    worst = 2 / min(sum(before), sum(after)) / levels[0]["bandwidth_bytes_per_second"]
    for level, above in zip(levels[1:], levels[1:], strict=True):
        worst = max(
            worst, *(2 * abs(shares[0][u] - shares[1][u]) / level["bandwidth_bytes_per_second"] for u in shares[0])
        )
        merged = [dict.fromkeys((u // above["size"] for u in share), 0.0) for share in shares]
        for share, into in zip(shares, merged, strict=True):
            for u, part in share.items():
                into[u // above["size"]] += part
        shares = merged
    return worst


def best_time(data: dict[str, Any], topology: dict[str, Any], n_stages: int | None = None) -> float:
    """The least time of any plan; infinite where there is none."""
    n, levels, memory = len(data["nodes"]), topology["levels"], topology.get("memory_bytes") or inf
    inner = levels[0]["size"]
    n_groups = 1
    for level in levels[1:]:
        n_groups *= level["size"]
    everything = frozenset(range(n))
    sync, transfer = cache(lambda taken: all_reduce(taken, levels)), cache(lambda a, b: link(a, b, levels))

    @cache
    def stages(done: frozenset[int]) -> list[tuple[frozenset[int], float, float, float]]:
        """Every stage that can follow: what is done after it, its seconds, parameters and outputs."""
        found = []
        for nodes in down_sets(n, data["edges"], done):
            rows = [data["nodes"][v] for v in sorted(nodes)]
            seconds = sum(r["forward_seconds"] + r["backward_seconds"] for r in rows)
            stored = sum(r["parameter_bytes"] for r in rows), sum(r["output_bytes"] for r in rows)
            found.append((done | nodes, seconds, *stored))
        return found

    @cache
    def takes(free: tuple[int, ...], before: tuple[int, ...]) -> list[tuple[tuple[int, ...], int, float, float, Any]]:
        """Every set of replicas: how many, seconds for a byte of parameters and for a byte received, and what is left."""
        return [
            (
                t,
                sum(t),
                sync(t),
                transfer(before, t) if before else 0.0,
                tuple(f - u for f, u in zip(free, t, strict=True)),
            )
            for t in replica_sets(free)
        ]

    @cache
    def rest(
        done: frozenset[int], free: tuple[int, ...], before: tuple[int, ...], left: int | None
    ) -> list[tuple[int, float]]:
        """Pairs (replicas, time) of all ways to go on after ``done``: memory needs the number of later replicas."""
        found: dict[int, float] = {}
        if done == everything:
            return [(0, 0.0)] if left in (None, 0) else []
        x = crossing_bytes(data, done)
        for after, compute, parameters, activations in stages(done) if left != 0 else ():
            for taken, r, per_parameter, per_byte, remaining in takes(free, before):
                time = max((compute + parameters * per_parameter) / r, x * per_byte)
                for later, later_time in rest(after, remaining, taken, None if left is None else left - 1):
                    if -(-(r + later) // r) * (parameters + activations) <= memory:
                        found[r + later] = min(found.get(r + later, inf), max(time, later_time))
        return list(found.items())

    return min((time for _, time in rest(frozenset(), (inner,) * n_groups, (), n_stages)), default=inf)


def best_with_single_devices(data: dict[str, Any], n_stages: int, max_load: float = inf) -> tuple[float, float]:
    """The least compute of the busiest stage, and the fewest bytes over all cuts, both ways, within ``max_load`` seconds."""
    n = len(data["nodes"])
    everything = frozenset(range(n))

    @cache
    def stages(done: frozenset[int]) -> list[tuple[frozenset[int], float, float]]:
        """Every stage that can follow: what is done after it, its seconds, the bytes that cross after it."""
        return [
            (
                done | nodes,
                sum(data["nodes"][v]["forward_seconds"] + data["nodes"][v]["backward_seconds"] for v in nodes),
                2 * crossing_bytes(data, done | nodes),
            )
            for nodes in down_sets(n, data["edges"], done)
        ]

    @cache
    def rest(done: frozenset[int], left: int) -> tuple[float, float]:
        if left == 0:
            return (0.0, 0.0) if done == everything else (inf, inf)
        load, moved = inf, inf
        for after, seconds, crossing in stages(done):
            later = rest(after, left - 1)
            load = min(load, max(seconds, later[0]))
            if seconds <= max_load * (1 + 1e-12):
                moved = min(moved, later[1] + crossing)
        return load, moved

    return rest(frozenset(), n_stages)
