"""Which values a graph proves that a node can have: a range of integers, or a few constants.

Only what is certain counts: operators define their results, and refuse indices outside of what they index.
"""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxpipe.saves.value_facts import COPIES, NOTHING, Received, view_source

aten = torch.ops.aten
Range = tuple[int, int]
"""Least and greatest, both included."""

_ARG_EXTREMES = {aten.argmax.default, aten.argmin.default}
_EXTREMES = {  # their second output tells where along a dimension: the position of that argument, and its default
    aten.max.dim: (1, None), aten.min.dim: (1, None), aten.median.dim: (1, None), aten.mode.default: (1, -1),
    aten.topk.default: (2, -1), aten.kthvalue.default: (2, -1), aten.sort.default: (1, -1),
}  # fmt: skip
_PLANES = {  # their second output tells where in a plane of the input, of so many dimensions
    aten.max_pool2d_with_indices.default: 2, aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2, aten.adaptive_max_pool3d.default: 3,
    aten.fractional_max_pool2d.default: 2,
}  # fmt: skip
_FILLS = {
    aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.fill.Scalar: 1,
    aten.scalar_tensor.default: 0,
}  # fmt: skip
_MOVES = {aten.repeat.default, aten.flip.default, aten.roll.default, *COPIES}
_TRIANGLES = {aten.triu.default, aten.tril.default}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}


def integer_range(node: fx.Node, received: Received = NOTHING) -> Range | None:
    """Least and greatest value of an integer tensor; ``None`` where neither its operator nor its uses bound it."""
    source = received.get(node, node)
    found = [r for r in (_own_range(source, received), *_ranges_of_uses(node)) if r is not None]
    return (max(low for low, _ in found), min(high for _, high in found)) if found else None


def _own_range(node: fx.Node, received: Received) -> Range | None:
    """As its operator defines it."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        return _range_of_indices(source) if node.args[1] == 1 else None
    if (source := view_source(node)) is not None:
        return integer_range(source, received)
    if target in _ARG_EXTREMES:
        dim = _argument(node, 1, "dim", None)
        sizes = _shape(node.args[0])
        return _below(math.prod(sizes) if dim is None else sizes[dim] if sizes else 1)
    if target in (aten.argsort.default, aten.argsort.stable):
        return _below(_sizes_along(node.args[0], _argument(node, 1, "dim", -1)))
    if target is aten.randint.low or target is aten.randint_like.low_dtype:
        low, high = node.args[:2] if target is aten.randint.low else node.args[1:3]
        return (low, high - 1) if isinstance(low, int) and isinstance(high, int) else None
    if target in _MOVES:
        source = node.args[0]
        return integer_range(source, received) if isinstance(source, fx.Node) and _is_integer(source) else None
    return _range_of_constants(node, received)


def _range_of_constants(node: fx.Node, received: Received) -> Range | None:
    values = constants_of(node, received)
    return (int(min(values)), int(max(values))) if values else None


def _range_of_indices(node: fx.Node) -> Range | None:
    """Of the second output of an operator that returns values and their places."""
    target: Any = node.target
    if target in _PLANES:
        return _below(math.prod(_shape(node.args[0])[-_PLANES[target] :]))
    if target is aten.sort.stable:
        return _below(_sizes_along(node.args[0], _argument(node, 2, "dim", -1)))
    if target in _EXTREMES:
        position, default = _EXTREMES[target]
        return _below(_sizes_along(node.args[0], _argument(node, position, "dim", default)))
    return None


def _ranges_of_uses(node: fx.Node) -> Iterator[Range | None]:
    """What the operators that take the value as an index refuse if it does not hold."""
    for user in node.users:
        if view_source(user) is node:
            if _covers(user, node):
                yield from _ranges_of_uses(user)
        elif user.target is aten.embedding.default and user.args[1] is node:
            yield _index(_shape(user.args[0])[0])
        elif user.target is aten.gather.default and user.args[2] is node:
            yield _index(_sizes_along(user.args[0], user.args[1]))
        elif user.target is aten.nll_loss_forward.default and user.args[1] is node:
            yield _with_ignored(_index(_shape(user.args[0])[-1]), user.args[4])


def _covers(view: fx.Node, node: fx.Node) -> bool:
    """Whether the view shows every value of the node."""
    return view.target not in (
        aten.slice.Tensor, aten.select.int, aten.as_strided.default, operator.getitem, aten.diagonal.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.narrow.default,
    ) and bool(view.meta["val"].numel() >= node.meta["val"].numel())  # fmt: skip


def _with_ignored(found: Range | None, ignored: Any) -> Range | None:
    return (min(found[0], ignored), max(found[1], ignored)) if found and isinstance(ignored, int) else None


def _below(size: Any) -> Range | None:
    """0 to one less than a size; ``None`` where that is symbolic."""
    return (0, max(size - 1, 0)) if isinstance(size, int) else None


def _index(size: Any) -> Range | None:
    """What may index so many: compiled code counts negative indices from the end where eager refuses them."""
    return (-size, max(size - 1, 0)) if isinstance(size, int) else None


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.meta["val"].shape)


def _sizes_along(value: Any, dim: Any) -> Any:
    sizes = _shape(value)
    return sizes[dim] if sizes else 1


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_integer(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex())


def constants_of(node: fx.Node, received: Received = NOTHING) -> frozenset[float]:
    """All values that the tensor can hold, as numbers of its dtype, where it is made of constants; empty where it is not.

    ``where(mask, 0, -inf)``, say, through copies and views. NaN and minus zero are no such constants.
    """
    if (source := received.get(node) or view_source(node)) is not None:
        return constants_of(source, received)
    if node.op != "call_function":
        return frozenset()
    target: Any = node.target
    if target in _FILLS or target in _ZEROS:
        return _rounded(node, [node.args[_FILLS[target]] if target in _FILLS else 0])
    if target is aten.where.self:
        return _all_of(node, [node.args[1], node.args[2]], received)
    if target is aten.masked_fill.Scalar:
        return _all_of(node, [node.args[0], node.args[2]], received)
    if target in _TRIANGLES:
        return _all_of(node, [node.args[0], 0], received)
    if target in _MOVES:
        return _all_of(node, [node.args[0]], received)
    return frozenset()


def _all_of(node: fx.Node, parts: list[Any], received: Received) -> frozenset[float]:
    """Numbers, and the constants of nodes; nothing if one of these has none."""
    found: list[float] = []
    for part in parts:
        values = constants_of(part, received) if isinstance(part, fx.Node) else [part]
        if not values:
            return frozenset()
        found += values
    return _rounded(node, found)


def _rounded(node: fx.Node, values: list[Any]) -> frozenset[float]:
    """In the node's dtype; nothing if one of them is no number that is told from the others by comparison."""
    if not all(isinstance(v, int | float) for v in values):
        return frozenset()
    dtype = node.meta["val"].dtype
    with unset_fake_temporarily():  # the compiler's mode, in which tensors have no values
        found = torch.tensor([float(v) for v in values], dtype=torch.float64).to(dtype).tolist()
    if any(math.isnan(v) or (v == 0 and math.copysign(1, v) < 0) for v in found):
        return frozenset()
    return frozenset(map(float, found))
