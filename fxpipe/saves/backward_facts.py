"""What a backward graph does with the values that it takes from forward, where a small error of theirs would not stay small."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxpipe.saves.value_facts import COPIES, hint, is_floating, original_of, view_source

aten = torch.ops.aten

_COMPARISONS = {
    getattr(getattr(aten, name), kind) for name in ("eq", "ne", "le", "lt", "ge", "gt") for kind in ("Scalar", "Tensor")
}
_SIGNS = {aten.sign.default, aten.sgn.default}
_STEPS = {  # backward of a function with a kink: compares its second argument
    aten.threshold_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default,
    aten._prelu_kernel_backward.default, aten.hardswish_backward.default, aten.hardsigmoid_backward.default,
    aten.hardshrink_backward.default, aten.softshrink_backward.default,
}  # fmt: skip
_PRODUCTS = {
    *COPIES, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.abs.default,
    aten.sqrt.default, aten.square.default, aten.pow.Tensor_Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class BackwardFacts:
    """Names of backward's placeholders by what an error in them would do.

    ``exponentiated``: become a factor on every gradient of a row. ``compared``: decide the other way, and cut off a gradient
    that flowed, or the reverse. ``compared_with_zero``: the same, unless zeros stay zeros. ``divided``: blow up near zero.
    """

    exponentiated: frozenset[str]
    compared: frozenset[str]
    compared_with_zero: frozenset[str]
    divided: frozenset[str]


def backward_facts(backward: fx.Graph, saved: Iterable[fx.Node]) -> BackwardFacts:
    """The facts about ``saved``, the placeholders that come from forward; the others are gradients, which may be compared."""
    taken = set(saved)
    exact, with_zero, divided = set[str](), set[str](), set[str]()
    from_gradients = _reached(backward, {*backward.find_nodes(op="placeholder")} - taken)
    for node in backward.nodes:
        for operand, zero in _compared(node):
            if zero and original_of(operand) in taken:
                with_zero.add(original_of(operand).name)
            elif operand not in from_gradients:
                exact |= {n.name for n in _ancestors(operand, None) if n in taken}
        for denominator in _denominators(node):
            divided |= {n.name for n in _ancestors(denominator, _PRODUCTS) if n in taken}
    return BackwardFacts(_exponentiated(backward), frozenset(exact), frozenset(with_zero), frozenset(divided))


def _exponentiated(backward: fx.Graph) -> frozenset[str]:
    """The names of backward's placeholders that it exponentiates as softmax does: ``exp(x - statistic)``; masks of attention.

    An error in such a value becomes a factor on every gradient of the row.
    """
    found: set[str] = set()
    for node in backward.nodes:
        if node.target is aten.exp.default:
            found |= {n.name for n in _shifted_sources(_operand(node, 0))}
        found |= {original_of(mask).name for mask in _attention_masks(node)}
    return frozenset(found)


def _attention_masks(node: fx.Node) -> Iterator[fx.Node]:
    """What a fused attention adds to its scores, which it exponentiates."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.name.startswith("aten::_scaled_dot_product"):
        for name, value in zip([a.name for a in schema.arguments], node.args, strict=False):
            if name in ("attn_mask", "attn_bias") and isinstance(value, fx.Node):
                yield value
        yield from (v for k, v in node.kwargs.items() if k in ("attn_mask", "attn_bias") and isinstance(v, fx.Node))


def _shifted_sources(node: fx.Node, shifted: bool = False) -> Iterator[fx.Node]:
    if node.op == "placeholder":
        if shifted and is_floating(node):
            yield node
        return
    if (source := view_source(node)) is not None or node.target in COPIES:
        yield from _shifted_sources(source if source is not None else _operand(node, 0), shifted)
    elif node.target in (aten.sub.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self):
        size = _numel(node)
        for operand in node.all_input_nodes:
            if is_floating(operand) and _numel(operand) == size:
                yield from _shifted_sources(operand, shifted or _subtracts_smaller(node, size))


def _subtracts_smaller(node: fx.Node, size: int) -> bool:
    right = node.args[1] if len(node.args) > 1 else None
    return node.target is aten.sub.Tensor and isinstance(right, fx.Node) and _numel(right) < size


def _numel(node: fx.Node) -> int:
    val = node.meta["val"]
    return hint(val.numel()) if isinstance(val, torch.Tensor) else 0


def _compared(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Floating operands that the node compares, and whether with zero."""
    if node.target in _STEPS:
        yield _operand(node, 1), node.target is aten.threshold_backward.default and bool(node.args[2] == 0)
    elif node.target in _SIGNS:
        yield _operand(node, 0), True
    elif node.target in _COMPARISONS:
        operands = [a for a in node.args if isinstance(a, fx.Node) and is_floating(a)]
        zero = any(isinstance(a, int | float) and a == 0 for a in node.args)
        yield from ((operand, zero) for operand in operands)


def _denominators(node: fx.Node) -> Iterator[fx.Node]:
    if node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node):
        yield node.args[1]
    elif node.target in (aten.reciprocal.default, aten.rsqrt.default, aten.log.default):
        yield _operand(node, 0)
    elif node.target is aten.pow.Tensor_Scalar:
        power: Any = node.args[1]
        if isinstance(power, int | float) and power < 0:
            yield _operand(node, 0)


def _ancestors(node: fx.Node, through: set[Any] | None) -> Iterator[fx.Node]:
    """The placeholders that the node is computed from by way of floating values; of views and operators of ``through`` only, if
    given."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op == "placeholder":
            yield at
        elif through is None or at.target in through or view_source(at) is not None:
            todo.extend(filter(is_floating, at.all_input_nodes))


def _reached(graph: fx.Graph, starts: set[fx.Node]) -> set[fx.Node]:
    reached = set(starts)
    for node in graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _operand(node: fx.Node, index: int) -> fx.Node:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value
