"""Programs and facts as text: listings, tables, differences.

Equal programs give equal text on every run, so a listing can be compared, stored as a golden file and diffed.
"""

import difflib
import operator
import re
from typing import Any

import torch
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs

from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import LoweredStages
from fxpipe.tables import table

__all__ = ["diff", "listing", "module_path", "node_line", "operator_name", "program_listing", "table", "type_of"]


def diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """The lines that change from one listing to the next, as a unified diff; empty where nothing changes."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="")
    return "\n".join(lines)


def program_listing(program: Program) -> str:
    """The program's graph; once it is split, each stage's after it; once that is lowered, each stage's two halves instead."""
    parts = [listing(program.graph)]
    if LoweredStages in program.facts:
        for stage in program.fact(LoweredStages).stages:
            parts.append(f"# stage {stage.index} forward\n{listing(stage.forward.graph_module.graph)}")
            parts.append(f"# stage {stage.index} backward\n{listing(stage.backward.graph_module.graph)}")
    else:
        for name in (str(node.target) for node in program.graph.nodes if node.op == "call_module"):
            stage_module = program.graph_module.get_submodule(name)
            assert isinstance(stage_module, fx.GraphModule)
            parts.append(f"# {name}\n{listing(stage_module.graph)}")
    return "\n\n".join(parts)


def listing(graph: fx.Graph) -> str:
    """One line per node: ``relu: f32[16, 32] = aten.relu(linear)  # layers.0.1``."""
    return "\n".join(node_line(node) for node in graph.nodes)


def node_line(node: fx.Node) -> str:
    """The line of one node: its name, type, operator with arguments, and where in the model it comes from."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    value = f": {type_of(node.meta['val'])}" if "val" in node.meta else ""
    path = module_path(node)
    return f"{node.name}{value} = {_right_side(node)}" + (f"  # {path}" if path else "")


def type_of(value: object) -> str:
    """``f32[2, s0]`` for a tensor, ``(f32[2], i64[])`` for a tuple of them, ``int`` for a symbolic integer."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_abbrs[value.dtype]}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(type_of, value))})"
    symbolic = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool", type(None): "None"}
    return symbolic.get(type(value), type(value).__name__)


def module_path(node: fx.Node) -> str:
    """The submodule that the node was traced in, such as ``layers.0.1``; empty at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    path = path.removeprefix("L['self']").removeprefix(".")
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)  # a variable of the function that was compiled


def operator_name(node: fx.Node) -> str:
    """The operator of a node: ``aten.relu``, ``aten.add.Tensor``, ``getitem``; or what else the node is."""
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _right_side(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "placeholder"
    if node.op == "get_attr":
        return f"get_attr[{node.target}]"
    if node.target is operator.getitem:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{operator_name(node)}({', '.join(arguments)})"


def _argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_argument, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return dtype_abbrs[value]
    return repr(value) if isinstance(value, str) else str(value)
