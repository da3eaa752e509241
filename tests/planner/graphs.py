"""Random profiles for the tests and benches of the planner: chains, branchy, series-parallel and dense graphs."""

import random
from typing import Any

FAMILIES = ("chain", "branchy", "series-parallel", "dense")


def random_edges(rng: random.Random, family: str, n: int) -> list[tuple[int, int]]:
    """Edges from lower to higher numbers."""
    if family == "chain":
        return [(i, i + 1) for i in range(n - 1)]
    if family == "branchy":
        return [(rng.randrange(max(0, i - 4), i), i) for i in range(1, n) for _ in range(rng.choice((1, 1, 2)))]
    if family == "dense":
        return [(i, j) for j in range(n) for i in range(j) if rng.random() < 0.5]
    return series_parallel(rng, list(range(n)))


def series_parallel(rng: random.Random, nodes: list[int]) -> list[tuple[int, int]]:
    """One source and one sink, between them parts in a row or side by side."""
    if len(nodes) <= 2:
        return [(nodes[0], nodes[1])] if len(nodes) == 2 else []
    source, *inner, sink = nodes
    if rng.random() < 0.5:
        middle = rng.randrange(1, len(nodes) - 1)
        return series_parallel(rng, nodes[: middle + 1]) + series_parallel(rng, nodes[middle:])
    split = rng.randrange(len(inner) + 1)
    sides = [series_parallel(rng, [source, *side, sink]) for side in (inner[:split], inner[split:])]
    return sorted(set(sides[0] + sides[1]))


def random_profile(seed: int, family: str, n: int) -> dict[str, Any]:
    """Numbers that vary a lot from node to node, with now and then a fat node or a fat value."""
    rng = random.Random(f"{family} {n} {seed}")

    def size(mean: float) -> float:
        return mean * rng.expovariate(1) * (5 if rng.random() < 0.1 else 1)

    scale = 10 ** rng.uniform(-1.5, 1)  # how much weighs communication against compute
    nodes = [
        {
            "id": i,
            "name": f"node_{i}",
            "forward_seconds": (forward := size(1.0)),
            "backward_seconds": 2 * forward,
            "output_bytes": round(scale * size(100)),
            "parameter_bytes": round(scale * size(100)),
        }
        for i in range(n)
    ]
    return {"nodes": nodes, "edges": [list(edge) for edge in random_edges(rng, family, n)]}
