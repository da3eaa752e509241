"""One FX graph in ``torch.export``'s own JSON, and back. No tensor is in it, and reading it runs nothing.

torch's reader trusts its input: it evaluates sizes as Python, takes any attribute of torch for an operator, and unpickles
weights. So a graph is checked before it is handed over: sizes are numbers, operators registered ones, weights absent.
"""

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import torch.fx as fx
from torch import Tensor
from torch._export.serde import schema, serialize as serde
from torch._export.serde.union import _Union
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket, _OpNamespace
from torch.export import graph_signature as signature

from fxpipe.errors import PlanError
from fxpipe.printing import listing

KEPT_META = ("val", "stack_trace", "nn_module_stack")
HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
NOT_IN_A_PLAN = {
    "as_expr": "a size that is not a number",
    "as_custom_obj": "an object that is no tensor",
    "as_operator": "an operator as an argument",
}


def graph_to_json(module: fx.GraphModule) -> bytes:
    """The text that stands as ``models/model.json`` in torch's ``.pt2`` archives.

    Tensors that the graph reads with get_attr become placeholders. Where those come from, and the order of the nodes, stand
    in the graph's ``custom`` metadata, which torch's format leaves to its users.

    Raises:
        PlanError: the format has no place for something in the graph; names it.
    """
    graph, attributes = _lifted(module)
    try:
        text = _serialized(fx.GraphModule(module, graph), attributes)
        again = listing(_deserialized(json.loads(text), {})[0])
    except (serde.SerializeError, PlanError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise PlanError(f"a graph of this plan cannot be stored: {_cause(e)}") from e
    for line, found in zip(listing(graph).splitlines(), again.splitlines(), strict=True):
        if line != found:
            raise PlanError(f"a graph of this plan cannot be stored: {line!r} would come back as {found!r}")
    return text


def graph_from_json(text: bytes, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The inverse of ``graph_to_json``; what the graph reads with get_attr is taken from ``tensors`` by its name.

    Raises:
        PlanError: the text is not what ``graph_to_json`` writes, or calls something that is no registered operator.
    """
    try:
        program = json.loads(text)
        attributes = json.loads(program["graph_module"]["metadata"]["custom"])["attributes"]
        graph, submodules = _deserialized(program, attributes)
        return fx.GraphModule({**submodules, **{name: tensors[name] for name in attributes.values()}}, graph)
    except PlanError:
        raise
    except Exception as e:  # anything that torch's reader may raise on a text that it did not write
        raise PlanError(f"it holds no graph that fxpipe wrote: {_cause(e)}") from e


def _cause(error: Exception) -> str:
    """What went wrong, without the trace that torch's messages end in."""
    first = str(error).strip().partition("\n")[0]
    return f"{first}: {_cause(error.__cause__)}" if isinstance(error.__cause__, Exception) else first or type(error).__name__


# Writing.


def _lifted(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, str]]:
    """A copy whose tensors come in through placeholders, and the attribute that each such placeholder stands for."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    attributes: dict[str, str] = {}
    parts: dict[tuple[Any, ...], fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(value := operator.attrgetter(node.target)(module), Tensor):
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
            attributes[copies[node].name] = node.target
            node.meta.setdefault("val", value)
        elif node.target is operator.getitem and node.args in parts:
            copies[node] = parts[node.args]  # the format names each part of a tuple once
            continue
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target is operator.getitem:
            parts[node.args] = copies[node]
        copies[node].meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    return graph, attributes
