"""Norms and dropouts in a graph: as one operator, or written out as Inductor's decompositions have them."""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from fxpipe.saves.value_facts import COPIES

aten = torch.ops.aten


@dataclass(frozen=True)
class FoundNorm:
    """A layer norm or RMS norm over the last dimension of ``x``; ``steps``: the nodes that only it needs.

    ``first`` is a node of it that nothing which reads its results stands before.
    """

    kind: str
    eps: float
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    first: fx.Node
    y: fx.Node
    mean: fx.Node | None
    rstd: fx.Node | None
    steps: tuple[fx.Node, ...]


@dataclass(frozen=True)
class FoundDropout:
    """``x`` times a mask of bools and times ``kept``; ``steps`` compute the product and nothing else."""

    x: fx.Node
    mask: fx.Node
    kept: float
    steps: tuple[fx.Node, ...]


def found_norms(graph: fx.Graph) -> Iterator[FoundNorm]:
    """The norms of a graph, in its order; whole ones first."""
    for target in (aten.native_layer_norm.default, aten._fused_rms_norm.default):
        yield from filter(None, map(_whole, graph.find_nodes(op="call_function", target=target)))
    yield from filter(None, map(_written_out, graph.find_nodes(op="call_function", target=aten.rsqrt.default)))


def found_dropout(node: fx.Node) -> FoundDropout | None:
    """The dropout whose output the node is, or a product that is one."""
    if node.target is operator.getitem:
        return _whole_dropout(node)
    inner = node.args[0] if node.target is aten.mul.Tensor else None
    if not (isinstance(inner, fx.Node) and isinstance(node.args[1], float) and _is_product(inner)):
        return None
    for mask, x in itertools.permutations(inner.all_input_nodes):
        if _val(mask).dtype is torch.bool and len(inner.users) == 1:
            return FoundDropout(x, mask, node.args[1], (inner, node))
    return None


def _whole_dropout(node: fx.Node) -> FoundDropout | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    masks = [n for n in source.users if n.args[1] == 1]
    if source.target is not aten.native_dropout.default or node.args[1] != 0 or not masks:
        return None
    x, p, train = source.args
    if not (train is True and isinstance(p, float) and 0 < p < 1 and isinstance(x, fx.Node)):
        return None
    return FoundDropout(x, masks[0], 1 / (1 - p), (node,))


def _whole(node: fx.Node) -> FoundNorm | None:
    layer = node.target is aten.native_layer_norm.default
    x, shape, weight, *rest = node.args
    eps = rest[-1] if rest else None
    if not (isinstance(x, fx.Node) and isinstance(shape, list) and len(shape) == 1 and isinstance(eps, float)):
        return None
    results: dict[object, fx.Node] = {n.args[1]: n for n in node.users}
    if 0 not in results:
        return None
    bias = rest[0] if layer else None
    return FoundNorm(
        "layer" if layer else "rms", eps, x, _node(weight), _node(bias), node, results[0],
        results.get(1) if layer else None, results.get(2 if layer else 1), (node,),
    )  # fmt: skip


def _written_out(rstd: fx.Node) -> FoundNorm | None:
    """``((x32 - mean) * rsqrt(var + eps)) * weight + bias``, or ``x32 * rsqrt(mean(x32 ** 2) + eps) * weight``, converted."""
    added = rstd.args[0]
    if (
        not isinstance(added, fx.Node)
        or added.target not in (aten.add.Tensor, aten.add.Scalar)
        or len(added.users) != 1
    ):
        return None
    variance, eps = added.args[0], added.args[1]
    if not (isinstance(variance, fx.Node) and isinstance(eps, float) and len(variance.users) == 1):
        return None
    found = _of_layer_norm(variance) or _of_rms_norm(variance)
    if found is None:
        return None
    kind, wide, mean, centred, steps = found
    products = [n for n in rstd.users if _is_product(n) and set(n.args) == {centred, rstd}]
    x = wide.args[0] if wide.target in COPIES else wide
    if len(products) != 1 or not isinstance(x, fx.Node) or _val(wide).dtype != torch.float32:
        return None
    weight, bias, chain = _affine(products[0], _val(x))
    return FoundNorm(
        kind, eps, x, weight, bias, steps[0] if x is wide else wide, chain[-1], mean, rstd,
        (wide, *steps, variance, added, *([centred] if mean else []), *chain),
    )  # fmt: skip


def _of_layer_norm(variance: fx.Node) -> tuple[str, fx.Node, fx.Node | None, fx.Node, list[fx.Node]] | None:
    """(kind, float32 input, mean, centred input, what computes the variance)."""
    both = variance.args[0]
    if variance.target is not operator.getitem or variance.args[1] != 0 or not isinstance(both, fx.Node):
        return None
    wide, dims = both.args[:2] if len(both.args) > 1 else (None, None)
    if both.target is not aten.var_mean.correction or both.kwargs != {"correction": 0, "keepdim": True}:
        return None
    means = [n for n in both.users if n.args[1] == 1]
    if not isinstance(wide, fx.Node) or not _is_last(dims, wide) or not means:
        return None
    centred = [n for n in means[0].users if n.target is aten.sub.Tensor and n.args == (wide, means[0]) and not n.kwargs]
    return ("layer", wide, means[0], centred[0], [both]) if len(centred) == 1 and len(centred[0].users) == 1 else None


def _of_rms_norm(variance: fx.Node) -> tuple[str, fx.Node, fx.Node | None, fx.Node, list[fx.Node]] | None:
    square = variance.args[0]
    if variance.target is not aten.mean.dim or variance.args[2:] != (True,) or not isinstance(square, fx.Node):
        return None
    wide = square.args[0]
    if square.target is not aten.pow.Tensor_Scalar or square.args[1] != 2 or len(square.users) != 1:
        return None
    return (
        ("rms", wide, None, wide, [square]) if isinstance(wide, fx.Node) and _is_last(variance.args[1], wide) else None
    )


def _affine(normalised: fx.Node, x: torch.Tensor) -> tuple[fx.Node | None, fx.Node | None, list[fx.Node]]:
    """(weight, bias, nodes) of what follows, each the only reader of the one before, to the last of the dtype of ``x``."""
    weight = bias = None
    chain = [normalised]
    whole: tuple[fx.Node | None, fx.Node | None, list[fx.Node]] = None, None, [normalised]
    while len(chain[-1].users) == 1:
        node, last = next(iter(chain[-1].users)), chain[-1]
        others = [a for a in node.args if a is not last]
        other = others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
        if node.target in COPIES and _val(node).dtype == x.dtype:
            pass
        elif other is None or list(_val(other).shape) != [x.shape[-1]] or node.kwargs or bias is not None:
            break
        elif node.target is aten.mul.Tensor and weight is None:
            weight = other
        elif node.target is aten.add.Tensor:
            bias = other
        else:
            break
        chain.append(node)
        if _val(node).dtype == x.dtype:
            whole = (weight, bias, list(chain))
    return whole


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args)


def _is_last(dims: object, x: fx.Node) -> bool:
    return dims in ([_val(x).dim() - 1], [-1])


def _node(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _val(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
