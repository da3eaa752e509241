"""Fused attention that backward computes again, instead of receiving what it returned."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from fxpipe.graph_module import describe, returned, set_returned
from fxpipe.saves.save_points import first_user, replay, saved_pairs
from fxpipe.saves.value_facts import original_of

aten = torch.ops.aten

FUSED_ATTENTION: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default:
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention.default: aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention.default: aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention.default: aten._scaled_dot_product_cudnn_attention_backward.default,
}  # fmt: skip
OUTPUT, LOGSUMEXP = 0, 1
"""Where each of them returns these."""


def recompute_attention(forward: fx.Graph, backward: fx.Graph, n_outputs: int) -> None:
    """Backward computes the output and the logsumexp of fused attention again; forward saves neither. Edits both graphs.

    Backward takes attention's probabilities from query, key and logsumexp. Where query and key come back with an error, an
    exact logsumexp does not belong to them: a query's probabilities do not add up to one, and its gradient takes in what
    should have cancelled. What is computed again belongs to what was restored. Exact where query, key and value are.
    Attention that drops out is left as it is.

    Before::

        forward:  attention = aten._scaled_dot_product_flash_attention(q, k, v); ...
                  return out, q, k, v, attention[0], attention[1]
        backward: def backward(q, k, v, output, logsumexp, grad):
                  gradients = aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, output, logsumexp, ...)

    After::

        forward:  return out, q, k, v
        backward: def backward(q, k, v, grad):
                  again = aten._scaled_dot_product_flash_attention(q, k, v)
                  gradients = aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, again[0], again[1], ...)
    """
    outputs = returned(forward)
    dropped: set[fx.Node] = set()
    for attention, restored in _saved_results(forward, backward, n_outputs):
        inputs = _inputs_in_backward(attention, [placeholder for _, placeholder in restored])
        if inputs is None:
            continue
        results = _compute_again(attention, inputs, [placeholder for _, placeholder in restored])
        for node, placeholder in restored:
            source = original_of(node)
            result = results[_index(source)]
            if node is source:
                placeholder.replace_all_uses_with(result)
                backward.erase_node(placeholder)
            else:
                replay(node, placeholder, source, result)
            dropped.add(node)
    kept = [n for n in outputs[n_outputs:] if n not in dropped]
    set_returned(forward, [*outputs[:n_outputs], *kept])
    forward.eliminate_dead_code()


def _saved_results(
    forward: fx.Graph, backward: fx.Graph, n_outputs: int
) -> Iterator[tuple[fx.Node, list[tuple[fx.Node, fx.Node]]]]:
    """Each attention without dropout, with what is saved of its output and logsumexp, and backward's placeholders of these."""
    saved: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for node, placeholder in saved_pairs(forward, backward, n_outputs):
        source = original_of(node)
        attention = source.args[0] if source.target is operator.getitem else None
        if isinstance(attention, fx.Node) and attention.target in FUSED_ATTENTION and _index(source) <= LOGSUMEXP:
            saved.setdefault(attention, []).append((node, placeholder))
    yield from ((attention, found) for attention, found in saved.items() if not _arguments(attention).get("dropout_p"))


def _inputs_in_backward(attention: fx.Node, results: list[fx.Node]) -> dict[str, Any] | None:
    """The attention's arguments as the one call in backward that takes these results has them; None without such a call."""
    users = [
        user
        for user in results[0].graph.nodes
        if user.target is FUSED_ATTENTION[attention.target] and original_of(_arguments(user)["logsumexp"]) in results
    ]
    if len(users) != 1:
        return None
    there = _arguments(users[0])
    here = _arguments(attention)
    return {name: there[name] if isinstance(value, fx.Node) else value for name, value in here.items()}


def _compute_again(attention: fx.Node, inputs: dict[str, Any], results: list[fx.Node]) -> list[fx.Node]:
    """Puts the attention into backward before anything that reads the results; returns its output and logsumexp."""
    graph = results[0].graph
    first = min(first_user(placeholder) for placeholder in results)
    _move_before(first, [value for value in inputs.values() if isinstance(value, fx.Node)])
    target: Any = attention.target
    with graph.inserting_before(first):
        again = graph.call_function(target, kwargs=inputs, name=f"{attention.name}_again")
        describe(again, attention, attention.meta["val"])
        found = [graph.call_function(operator.getitem, (again, index)) for index in (OUTPUT, LOGSUMEXP)]
    for index, node in enumerate(found):
        describe(node, attention, attention.meta["val"][index])
    return found


def _move_before(place: fx.Node, nodes: list[fx.Node]) -> None:
    """Moves these, and what they are computed from, to before ``place`` where they come later."""
    later, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in later and node.op != "placeholder" and place <= node:
            later.add(node)
            todo += node.all_input_nodes
    for node in sorted(later):
        place.prepend(node)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Of a call, by name."""
    normal = node.normalized_arguments(torch.nn.Module(), normalize_to_only_use_kwargs=True)
    assert normal is not None
    return dict(normal.kwargs)


def _index(result: fx.Node) -> int:
    index = result.args[1]
    assert isinstance(index, int)
    return index
