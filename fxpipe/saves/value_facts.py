"""What a forward graph proves about its values: non-negative, a statistic, full of infinities, a view of another.

Each function looks at a node of a functional ATen graph and the nodes that it was computed from, never at numbers.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

COPIES = {aten.clone.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default}
_REDUCTIONS = {
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.var.correction, aten.var_mean.correction,
    aten.std.correction, aten.std_mean.correction, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
    aten.logsumexp.default, aten.prod.default, aten.linalg_vector_norm.default,
}  # fmt: skip
_STATISTIC_OUTPUTS = {
    aten.native_layer_norm.default: (1, 2),
    aten.native_group_norm.default: (1, 2),
    aten._fused_rms_norm.default: (1,),
    aten.native_batch_norm.default: (1, 2),
    aten._native_batch_norm_legit.default: (1, 2),
    aten._native_batch_norm_legit.no_stats: (1, 2),
    aten._native_batch_norm_legit_functional.default: (1, 2, 3, 4),
    aten._scaled_dot_product_flash_attention.default: (1,),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (1,),
    aten._scaled_dot_product_efficient_attention.default: (1,),
    aten._scaled_dot_product_cudnn_attention.default: (1,),
    aten.nll_loss_forward.default: (0, 1),
    aten.nll_loss2d_forward.default: (0, 1),
}
_KEEP_SIGN = {
    *COPIES, aten.max_pool2d_with_indices.default, aten.mean.dim, aten.mean.default,
    aten.sum.dim_IntList, aten.sum.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten.native_dropout.default, aten.amax.default, aten.sqrt.default,
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default,
}  # fmt: skip
_KEEP_SIGN_OF_ALL = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.add.Scalar, aten.maximum.default,
}  # fmt: skip
_NON_NEGATIVE = {
    aten.relu.default, aten.sigmoid.default, aten._softmax.default, aten.exp.default, aten.abs.default, aten.rsqrt.default,
    aten._safe_softmax.default, aten.rand.default, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    aten.ones.default, aten.ones_like.default, aten.new_ones.default,
}  # fmt: skip
_SUMS_AND_PRODUCTS = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Scalar,
}  # fmt: skip
_MOVES = {
    aten.triu.default, aten.tril.default, aten.repeat.default, aten.flip.default, aten.roll.default, aten.cat.default,
    aten.stack.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.constant_pad_nd.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default, aten.copy.default,
    aten.scatter.src, aten.scatter.value,
}  # fmt: skip
_LINEAR = {
    *_SUMS_AND_PRODUCTS, *_MOVES, aten.div.Tensor, aten.div.Scalar, aten.neg.default, *COPIES,
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.maximum.default, aten.minimum.default,
}  # fmt: skip
_FILLS = {
    aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.new_full.default, aten.fill.Scalar,
}  # fmt: skip
_FILL_PARTS = {aten.masked_fill.Scalar, aten.constant_pad_nd.default, aten.scatter.value}
_TAKE_LITERALS = {
    *_FILLS,
    *_FILL_PARTS,
    *_SUMS_AND_PRODUCTS,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
}
HUGE = 1e4
"""A literal of at least this magnitude stands for infinity: -inf, or the least finite value of a dtype (float16: -65504)."""

Received = Mapping[fx.Node, fx.Node]
"""Placeholders that stand for a value of another graph (of the stage before), each with that graph's node."""
NOTHING: Received = MappingProxyType({})
Reason = bool | list[fx.Node]


def view_source(node: fx.Node) -> fx.Node | None:
    """The node whose storage this one shows, one step back, or ``None`` when it has its own."""
    if node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        return source if source.op == "call_function" and _returns_view(source.target) else None
    return source if _returns_view(node.target) else None


@functools.cache
def _returns_view(target: Any) -> bool:
    if target is aten._unsafe_view.default:  # an alias in fact, though its schema does not say so
        return True
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.returns:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write


def storage_of(node: fx.Node) -> fx.Node:
    """The node that allocated the storage which ``node`` shows: itself, or the end of its chain of views."""
    while (source := view_source(node)) is not None:
        node = source
    return node


def original_of(node: fx.Node) -> fx.Node:
    """What ``node`` shows or copies, in another dtype or layout perhaps: the end of its chain of views and copies."""
    while (source := view_source(node)) is not None or node.target in COPIES:
        node = source if source is not None else _arg(node)
    return node


def is_non_negative(node: fx.Node) -> bool:
    """Proved at least zero everywhere (or NaN): after a ReLU, sigmoid, softmax, square, or what keeps the sign of such."""
    return _proved(node, _why_non_negative)


def _proved(node: fx.Node, rule: Callable[[fx.Node], Reason]) -> bool:
    """Whether the rule holds for the node; it answers yes or no, or with all the nodes that it must hold for instead."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        reason = rule(at)
        if reason is False:
            return False
        if reason is not True:
            todo.extend(reason)
    return True


def _why_non_negative(node: fx.Node) -> Reason:
    if (source := view_source(node)) is not None:
        return [source]
    if node.op != "call_function":
        return False
    if node.target in _NON_NEGATIVE:
        return True
    if node.target is operator.getitem:
        source = _arg(node)
        return [_arg(source)] if node.args[1] == 0 and source.target in _KEEP_SIGN else False
    if node.target in _KEEP_SIGN:
        return [_arg(node)]
    if node.target in (aten.clamp_min.default, aten.clamp.default, aten.hardtanh.default):
        low = node.args[1] if len(node.args) > 1 else None
        return isinstance(low, int | float) and low >= 0
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return True
    if node.target is aten.masked_fill.Scalar:
        return _all_non_negative(node.args[0], node.args[2])
    if node.target in _KEEP_SIGN_OF_ALL:
        return _all_non_negative(*node.args, *node.kwargs.values())
    if node.target is aten.pow.Tensor_Scalar:
        power = node.args[1]
        even = isinstance(power, int | float) and float(power).is_integer() and int(power) % 2 == 0
        return even or [_arg(node)]
    if node.target is aten.where.self:
        return _all_non_negative(*node.args[1:])
    return False


def _all_non_negative(*values: Any) -> Reason:
    """Of numbers and tensors: no, or the tensors for which it is still to be proved."""
    open_questions = [v for v in values if isinstance(v, fx.Node) and not (_is_bool(v) or _literals_at_least_zero(v))]
    return open_questions if all(v >= 0 for v in values if isinstance(v, int | float)) else False


def _is_bool(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype is torch.bool


def _literals_at_least_zero(node: fx.Node) -> bool:
    numbers = [a for a in node.args if isinstance(a, int | float)]
    return node.target in _FILLS and bool(numbers) and all(x >= 0 for x in numbers)


def _arg(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def is_statistic(node: fx.Node, received: Received = NOTHING) -> bool:
    """A mean, variance, reciprocal deviation, log-sum-exp, maximum ...: from a reduction, or pointwise of such only."""
    return _proved(node, lambda at: _why_statistic(at, received))


def _why_statistic(node: fx.Node, received: Received) -> Reason:
    if (source := received.get(node) or view_source(node)) is not None:
        return [source]
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = _arg(node)
        target: Any = source.target
        return node.args[1] in _STATISTIC_OUTPUTS.get(target, ()) or source.target in _REDUCTIONS
    if node.target in _REDUCTIONS:
        return True
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return inputs if inputs and _is_pointwise(node.target) else False


def _is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ()) or target in COPIES


def holds_infinities(node: fx.Node, received: Received = NOTHING) -> bool:
    """A mask or masked scores: some literal of at least ``HUGE`` went in through fills, choices, sums or products."""
    return any(_has_huge_literal(n) for n in _linear_ancestors(node, received))


def _has_huge_literal(node: fx.Node) -> bool:
    return node.target in _TAKE_LITERALS and any(
        isinstance(a, int | float) and (math.isinf(a) or abs(a) >= HUGE) for a in node.args
    )


def _linear_ancestors(node: fx.Node, received: Received) -> Iterator[fx.Node]:
    """The node and all that reaches it through views, fills, choices, sums and products of floating values."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        yield at
        if (source := received.get(at) or view_source(at)) is not None:
            todo.append(source)
        elif at.target in _LINEAR:
            todo.extend(n for n in at.all_input_nodes if is_floating(n))


def is_floating(node: fx.Node) -> bool:
    """A floating-point tensor."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def is_softmax(node: fx.Node) -> bool:
    """A softmax written out: ``e / sum(e)`` where ``e`` is ``exp(...)``."""
    if node.target is not aten.div.Tensor:
        return False
    e, total = node.args
    return (
        isinstance(e, fx.Node)
        and isinstance(total, fx.Node)
        and e.target is aten.exp.default
        and total.target is aten.sum.dim_IntList
        and total.args[0] is e
    )


def is_log_softmax(node: fx.Node) -> bool:
    """A log-softmax, whole or written out as ``x - log(sum(exp(x)))``."""
    node = original_of(node)
    if node.target is aten._log_softmax.default:
        return True
    if node.target not in (aten.sub.Tensor,):
        return False
    right = node.args[1]
    return isinstance(right, fx.Node) and right.target is aten.log.default and is_statistic(right)


def hint(size: int | torch.SymInt) -> int:
    """The number, or the example's value of a symbolic one; 0 where only a run can tell."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size)


def memory_order(val: torch.Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest in memory: the order in which values are compressed without a copy."""
    strides = [hint(s) for s in val.stride()]
    return sorted(range(val.dim()), key=lambda d: (-strides[d], d))
