"""A program with its costs as the plain profile that ``fxpipe.partition`` plans with.

Nodes that no cut may part (``cut_rules``) are one layer. What an earlier layer computes cheaply from inputs alone is
computed again where it is read, as ``partition-stages`` has it, and makes no edge.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch.fx as fx
import torch.nn as nn

from fxpipe.costs.storages import attribute_of
from fxpipe.cuts.chain import TICKS_PER_SECOND
from fxpipe.cuts.cut_rules import CutRules, Span
from fxpipe.printing import module_path


def layer_profile(rules: CutRules) -> dict[str, Any]:
    """``{"nodes": [{"id", "name", "forward_seconds", ...}], "edges": [[source, target]]}`` for one microbatch on one device.

    A layer's id is the name of its last node, ``name`` where it stands in the model. ``output_bytes`` are those of every value
    that another layer reads or the program returns; ``parameter_bytes`` those of the parameters that no layer before reads.
    Nodes that no other layer has to do with (BatchNorm's counter, what is recomputed) belong to the layer after them.
    """
    legal = (0, *rules.chain().legal, len(rules.nodes))
    tied = {layer for edge in _edges(rules, legal) for layer in edge}
    bounds = (0, *(legal[i] for i in range(1, len(legal) - 1) if i - 1 in tied), len(rules.nodes))
    seen: set[int] = set()
    nodes = [_layer(rules, rules.nodes[a:b], seen) for a, b in pairwise(bounds)]
    return {"nodes": nodes, "edges": [[nodes[a]["id"], nodes[b]["id"]] for a, b in _edges(rules, bounds)]}


def _edges(rules: CutRules, bounds: tuple[int, ...]) -> list[Span]:
    """The pairs of layers of which the second reads what the first computes; layers lie between ``bounds``."""
    layer_of = [layer for layer, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)]
    pairs = (
        (layer_of[rules.position[source]], layer_of[reader])
        for node, reader in rules.position.items()
        for source in node.all_input_nodes
        if source in rules.position and source not in rules.closures
    )
    return sorted({(source, reader) for source, reader in pairs if source < reader})


def _layer(rules: CutRules, nodes: tuple[fx.Node, ...], seen: set[int]) -> dict[str, Any]:
    work = [rules.work[rules.position[n]] for n in nodes]
    inside = set(nodes)
    sent = [n for n in nodes if n not in rules.closures and not inside.issuperset(n.users)]
    return {
        "id": nodes[-1].name,
        "name": module_path(nodes[-1]) or nodes[-1].name,
        "forward_seconds": sum(w.forward_ticks for w in work) / TICKS_PER_SECOND,
        "backward_seconds": sum(w.backward_ticks for w in work) / TICKS_PER_SECOND,
        "output_bytes": sum(rules.work[rules.position[n]].output_bytes for n in sent),
        "parameter_bytes": sum(p.nbytes for p in _new_parameters(rules, nodes, seen)),
    }


def _new_parameters(rules: CutRules, nodes: tuple[fx.Node, ...], seen: set[int]) -> Iterator[nn.Parameter]:
    for source in (s for node in nodes for s in node.all_input_nodes if s.op == "get_attr"):
        tensor = attribute_of(rules.program.graph_module, source)
        if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def layer_hints(rules: CutRules, profile: Mapping[str, Any]) -> dict[int | str, int | str]:
    """The stage hint of every layer of the profile that has one, by id."""
    position = {node.name: place for node, place in rules.position.items()}
    ends = [position[layer["id"]] for layer in profile["nodes"]]
    return {profile["nodes"][bisect_left(ends, first)]["id"]: hint for hint, (first, _) in rules.hints.items()}
