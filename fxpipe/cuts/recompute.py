"""Which values are recomputed by each stage that reads them, in place of being sent.

A value can be, when it depends only on the program's inputs, on constants and on buffers that nobody writes, and is neither
differentiable nor random: masks, position ids, rotary tables, casts of labels, sizes. It is, when that is cheaper.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch._ops import OpOverload

from fxpipe.costs.storages import Call, Storage, Walk, attribute_of

MAX_CLOSURE = 256  # a value that needs more nodes than this is not cheap; bounds the work of finding out
_UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_PLAIN_MODULES = ("_operator", "math", "torch")  # getitem, arithmetic on sizes, torch.sym_max
_SIZES = (int, torch.SymInt, torch.SymFloat, torch.SymBool)

Closures = dict[fx.Node, frozenset[fx.Node]]


def recomputed(
    graph_module: fx.GraphModule,
    found: Walk,
    written: Mapping[fx.Node, list[Storage]],
    is_cheaper: Callable[[fx.Node, frozenset[fx.Node]], bool],
) -> Closures:
    """The nodes that are recomputed, each with all the nodes that this takes, itself included.

    Chosen are the values that can be and for which ``is_cheaper(value, all it takes)``, every size (a size cannot be sent),
    and what those need.
    """
    possible = _possible(graph_module, found, written)
    chosen: set[fx.Node] = set()
    for node, closure in possible.items():
        if isinstance(node.meta["val"], _SIZES) or is_cheaper(node, closure):
            chosen |= closure
    return {node: closure for node, closure in possible.items() if node in chosen}


def _possible(graph_module: fx.GraphModule, found: Walk, written: Mapping[fx.Node, list[Storage]]) -> Closures:
    unsteady = {id(s) for storages in written.values() for s in storages}
    closures: Closures = {}
    for call in found.calls:
        node = call.node
        storages = [v.storage for v in (*call.arguments, *found.values[node])]
        steady = not any(id(s) in unsteady or s.requires_grad for s in storages)
        if steady and not any(v.requires_grad for v in found.values[node]) and _is_repeatable(call):
            closure = _closure(node, node.all_input_nodes, closures, graph_module)
            if closure is not None:
                closures[node] = closure
    return closures


def _is_repeatable(call: Call) -> bool:
    target: Any = call.node.target
    if isinstance(target, OpOverload):
        name = target._schema.name.partition("::")[2]
        return torch.Tag.nondeterministic_seeded not in target.tags and name not in _UNINITIALISED
    return getattr(target, "__module__", "") in _PLAIN_MODULES and target is not torch._C._set_grad_enabled


def _closure(
    node: fx.Node, inputs: Iterable[fx.Node], closures: Closures, graph_module: fx.GraphModule
) -> frozenset[fx.Node] | None:
    needed = {node}
    for source in inputs:
        if source.op == "get_attr":
            attribute = attribute_of(graph_module, source)
            if not isinstance(attribute, torch.Tensor) or isinstance(attribute, nn.Parameter):
                return None
        elif source in closures:
            needed |= closures[source]
        elif source.op != "placeholder":
            return None
    return frozenset(needed) if len(needed) <= MAX_CLOSURE else None
