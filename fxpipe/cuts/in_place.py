"""Which storages each node of a graph writes: what the schema says, and what it leaves unsaid."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from fxpipe.costs.storages import Call, Storage, Value, Walk, argument_nodes, attribute_of, walk

aten = torch.ops.aten
_STATISTICS = {aten.batch_norm.default, aten.instance_norm.default}  # write arguments 3 and 4, if argument 5 is true
_WRITE_NO_DATA = {aten.detach_.default}


def written_storages(found: Walk, graph_module: fx.GraphModule) -> dict[fx.Node, list[Storage]]:
    """For each call of the walk the storages that it writes: in-place operators, running statistics, and what a
    subgraph (the body of a no_grad or autocast region) writes of its operands."""
    return {call.node: _written(call, found.values, graph_module) for call in found.calls}


def _written(call: Call, values: Mapping[fx.Node, list[Value]], graph_module: fx.GraphModule) -> list[Storage]:
    node = call.node
    if node.target in _WRITE_NO_DATA:
        return []
    if node.target in _STATISTICS and node.args[5]:
        return [v.storage for argument in node.args[3:5] if isinstance(argument, fx.Node) for v in values[argument]]
    inside = _subgraphs(node, graph_module)
    positions = {i for body in inside for i in _written_operands(body, len(call.arguments))} | {*call.probe.mutated}
    return [call.arguments[i].storage for i in sorted(positions)]


def _subgraphs(node: fx.Node, graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    found: list[Any] = [attribute_of(graph_module, n) for n in argument_nodes(node) if n.op == "get_attr"]
    return [module for module in found if isinstance(module, fx.GraphModule)]


def _written_operands(body: fx.GraphModule, n_arguments: int) -> set[int]:
    """Positions among the call's tensor arguments, the last of which are the body's placeholders in order."""
    placeholders = body.graph.find_nodes(op="placeholder")
    first = n_arguments - len(placeholders)
    found = walk(body)
    written = {id(s) for storages in written_storages(found, body).values() for s in storages}
    return {
        first + i for i, p in enumerate(placeholders) if any(id(v.storage) in written for v in found.values.get(p, ()))
    }
