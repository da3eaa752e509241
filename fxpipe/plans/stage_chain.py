"""The outermost graph of a split program, taken apart and put together: inputs, and one call of each stage."""

import operator
from collections.abc import Mapping
from typing import Any

import torch.fx as fx

from fxpipe.errors import PlanError


def taken_apart(program: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Any]]:
    """A graph that returns its placeholders, and what is called with them, in JSON's types.

    Raises:
        PlanError: the program is not a chain of stage modules.
    """
    frame, calls = fx.Graph(), list[dict[str, Any]]()
    inputs = [frame.node_copy(node) for node in program.graph.find_nodes(op="placeholder")]
    frame.output(tuple(inputs))
    for node in program.graph.nodes:
        if node.op == "call_module":
            results = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
            arguments = [argument.name for argument in node.args]
            calls.append(
                {"module": node.target, "arguments": arguments, "results": [results[i] for i in range(len(results))]}
            )
        elif node.op not in ("placeholder", "output") and node.target is not operator.getitem:
            raise PlanError(
                f"only a program that is split into stages can be saved; it has the node {node.format_node()}"
            )
    returned: Any = program.graph.output_node().args[0]
    return fx.GraphModule({}, frame), {"calls": calls, "returns": [value.name for value in returned]}


def put_together(
    frame: fx.GraphModule, chain: Mapping[str, Any], modules: Mapping[str, fx.GraphModule]
) -> fx.GraphModule:
    """The inverse of ``taken_apart``, over these stage modules."""
    graph = frame.graph
    graph.erase_node(graph.output_node())
    values = {node.name: node for node in graph.nodes}
    for call in chain["calls"]:
        returned: Any = modules[call["module"]].graph.output_node().args[0]
        arguments = tuple(values[name] for name in call["arguments"])
        made = graph.create_node("call_module", call["module"], arguments, name=call["module"])
        made.meta["val"] = tuple(result.meta["val"] for result in returned)
        for i, (name, result) in enumerate(zip(call["results"], returned, strict=True)):
            values[name] = graph.call_function(operator.getitem, (made, i), name=name)
            values[name].meta = dict(result.meta)
    graph.output(tuple(values[name] for name in chain["returns"]))
    return fx.GraphModule(dict(modules), graph, "SplitProgram")
