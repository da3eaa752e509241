"""What is legal, as code: a program after every pass."""

import torch.fx as fx

from fxpipe.errors import VerifyError
from fxpipe.ir.program import Program


def verify_program(program: Program, after: str) -> None:
    """Checks the graph and its agreement with the signature.

    Raises:
        VerifyError: naming the pass after which, the node at which, and the broken rule, with the graph around it.
    """
    graph = program.graph
    try:
        graph.lint()
    except (RuntimeError, ValueError) as e:
        raise VerifyError(f"after {after}: the graph is not well formed: {e}") from e
    found = tuple(n.name for n in graph.find_nodes(op="placeholder"))
    if found != program.signature.inputs:
        raise VerifyError(f"after {after}: placeholders are {found}, the signature says {program.signature.inputs}")
    outputs = graph.output_node().args[0]
    if not isinstance(outputs, tuple | list) or len(outputs) != program.signature.n_outputs:
        raise VerifyError(
            f"after {after}: the graph returns {outputs}, the signature says {program.signature.n_outputs} outputs"
        )
    for node in graph.nodes:
        _verify_node(node, after)


def _verify_node(node: fx.Node, after: str) -> None:
    if node.op in ("placeholder", "call_function", "call_module") and "val" not in node.meta:
        raise VerifyError(f"after {after}: node {node.name} has no shape (meta['val'])\n{around(node)}")
    if node.op not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
        raise VerifyError(
            f"after {after}: node {node.name} is a {node.op}, which a program may not hold\n{around(node)}"
        )


def around(node: fx.Node, radius: int = 2) -> str:
    """The lines of the graph about a node, the node's own marked."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    window = nodes[max(0, at - radius) : at + radius + 1]
    return "\n".join(f"{'>' if n is node else ' '} {n.format_node()}" for n in window)
