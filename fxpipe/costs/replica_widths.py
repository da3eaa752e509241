"""On how many ranks each stage is best run: what ``fxpipe.partition`` answers for the program's layers."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from fxpipe.costs.layer_profile import layer_hints, layer_profile
from fxpipe.cuts.cut_rules import CutRules
from fxpipe.errors import PartitionError
from fxpipe.planner.partition import partition


def replica_widths(
    rules: CutRules, n_ranks: int, bandwidth_bytes_per_second: float, n_microbatches: int
) -> tuple[int, ...]:
    """The replicas of each stage, first to last, of the fastest plan on ``n_ranks`` equal ranks.

    Gradients are added up once a step, so a microbatch bears its part of the parameters. What updates buffers is not
    replicated. Memory is not looked at. After US12056604B2.

    Raises:
        PartitionError: the fastest plan leaves ranks idle; says how many it takes.
    """
    profile = layer_profile(rules)
    for layer in profile["nodes"]:
        layer["parameter_bytes"] /= n_microbatches
    levels = [{"size": n_ranks, "bandwidth_bytes_per_second": bandwidth_bytes_per_second}]
    found = partition(
        profile,
        {"levels": levels, "memory_bytes": None},
        max_replicas=n_microbatches,
        stage_hints=layer_hints(rules, profile),
        not_replicated=_updating_layers(rules, profile),
    )
    widths = tuple(len(stage["devices"]) for stage in found.to_dict()["stages"])
    if sum(widths) != n_ranks:
        raise PartitionError(
            f"replicas 'auto': the fastest plan takes {sum(widths)} of {n_ranks} ranks ({','.join(map(str, widths))}); ask for "
            f"n_ranks={sum(widths)}, or say the replicas of each stage"
        )
    return widths


def _updating_layers(rules: CutRules, profile: Mapping[str, Any]) -> list[str]:
    """The layers of which a node writes a tensor of the model; a layer's id is its last node."""
    position = {node.name: place for node, place in rules.position.items()}
    ends = [position[layer["id"]] for layer in profile["nodes"]]
    places = (rules.position[node] for node in rules.updates())
    return sorted({profile["nodes"][bisect_left(ends, place)]["id"] for place in places})
