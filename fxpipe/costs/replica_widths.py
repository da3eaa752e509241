"""On how many ranks each stage is best run: what ``fxpipe.partition`` answers for the program's layers."""

from fxpipe.costs.layer_profile import layer_hints, layer_profile
from fxpipe.cuts.cut_rules import CutRules
from fxpipe.errors import PartitionError
from fxpipe.planner.partition import partition


def replica_widths(
    rules: CutRules, n_ranks: int, bandwidth_bytes_per_second: float, n_microbatches: int
) -> tuple[int, ...]:
    """The replicas of each stage, first to last, of the fastest plan on ``n_ranks`` equal ranks.

    Gradients are added up once a step, so a microbatch bears its part of the parameters. What updates buffers is not
    replicated. After US12056604B2.

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
        not_replicated=_layers_with_state(rules, [layer["id"] for layer in profile["nodes"]]),
    )
    widths = tuple(len(stage["devices"]) for stage in found.to_dict()["stages"])
    if sum(widths) != n_ranks:
        raise PartitionError(
            f"replicas 'auto': the fastest plan takes {sum(widths)} of {n_ranks} ranks ({','.join(map(str, widths))}); ask for "
            f"n_ranks={sum(widths)}, or say the replicas of each stage"
        )
    return widths


def _layers_with_state(rules: CutRules, ids: list[str]) -> list[str]:
    """The layers of which a node writes what the model keeps; a layer's id is its last node."""
    ends = {name: layer for layer, name in enumerate(ids)}
    layers, layer = {}, 0
    for node in rules.nodes:
        layers[node] = ids[layer]
        layer = ends[node.name] + 1 if node.name in ends else layer
    writers = (n for n, storages in rules.written.items() if any(s.owner.op == "get_attr" for s in storages))
    return sorted({layers[n] for n in writers if n in layers})
