"""canonicalize: drop what computes nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass

_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default}
_MAY_RETURN_INPUT = {
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.alias.default,
}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Removes assertions about metadata, conversions that convert nothing, and dead nodes.

    Before::

        add = aten.add(x, y)
        _assert = aten._assert_tensor_metadata(add, dtype=f32)
        to = aten.to(add, f32)
        relu = aten.relu(to)

    After::

        add = aten.add(x, y)
        relu = aten.relu(add)
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program) -> Program:
        graph = program.graph
        for node in list(graph.nodes):
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
            elif node.target in _MAY_RETURN_INPUT and _changes_nothing(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _has_effect(n))
        program.graph_module.recompile()
        return program.with_graph(program.graph_module)


def _changes_nothing(node: fx.Node) -> bool:
    """The operator returned its input itself: same dtype, device and strides, and no copy asked for."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    a, b = source.meta.get("val"), node.meta["val"]
    if not isinstance(a, torch.Tensor) or node.kwargs.get("copy") or True in node.args[2:]:
        return False
    return bool(a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and a.stride() == b.stride())


def _has_effect(node: fx.Node) -> bool:
    """Writes to an argument, or draws from the random generator (so that later draws stay the same)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    return schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
