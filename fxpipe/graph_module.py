"""Graph modules that write their Python code when it is first wanted.

A pipeline edits a graph many times and calls it at the end, if at all; ``fx.GraphModule`` would generate and compile the
code at every step, which took a third of the passes' time. torch.compile uses the same class for the same reason.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module


def new_graph_module(root: nn.Module | Mapping[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module of class ``name`` that runs ``graph`` on the tensors and submodules of ``root``."""
    return _LazyGraphModule(root if isinstance(root, nn.Module) else dict(root), graph, name)


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A new graph, with a new ``meta`` at every node, over the same tensors and submodules."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies)).meta = dict(module.graph.output_node().meta)
    for node, copied in copies.items():
        copied.meta = dict(node.meta)
    result = new_graph_module(module, graph, type(module).__name__)
    result.train(module.training)
    return result


def returned(graph: fx.Graph) -> list[Any]:
    """What the graph returns: nodes, and ``None`` where it returns nothing."""
    values: Any = graph.output_node().args[0]
    return list(values)


def set_returned(graph: fx.Graph, values: Sequence[Any]) -> None:
    """Makes the graph return these, as a list or tuple like before."""
    output = graph.output_node()
    output.args = (list(values) if isinstance(output.args[0], list) else tuple(values),)


def set_own_values(graph: fx.Graph) -> None:
    """Gives every placeholder a ``meta["val"]`` of its own: compilers take two inputs with one value for one input."""
    seen: set[int] = set()
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if id(value) in seen and isinstance(value, torch.Tensor):
            value = value.new_empty_strided(value.shape, value.stride())
            node.meta = {**node.meta, "val": value}
        seen.add(id(value))


def lazy_graph_modules() -> AbstractContextManager[None]:
    """Inside, the graph modules that torch itself makes are of this kind too."""
    return _use_lazy_graph_module(True)
