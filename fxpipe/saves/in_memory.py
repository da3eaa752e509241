"""Which values of a graph that Inductor compiles are in memory anyway, and which lie there alike."""

import operator
from collections.abc import Iterator

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpipe.saves.value_facts import storage_of, view_source

aten = torch.ops.aten

IN_MEMORY = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.linear.default,
)  # fmt: skip
"""What computes a value that is in memory anyway. Others may run in one kernel of Inductor's with what reads them."""


def is_in_memory(node: fx.Node) -> bool:
    """Given, or computed by no loop of Inductor's: by a matrix product, a convolution or an operator of fxpipe."""
    base = storage_of(node)
    producer = base.args[0] if base.target is operator.getitem else base
    return base.op == "placeholder" or base.target in IN_MEMORY or _is_own(producer)


def is_written(node: fx.Node) -> bool:
    """Whether something reads the value, or a view of it, that cannot be in a loop with what computes it."""
    return any(r.op == "output" or r.target in IN_MEMORY or _is_own(r) for r in readers(storage_of(node)))


def _is_own(node: object) -> bool:
    return isinstance(node, fx.Node) and getattr(node.target, "namespace", "") == "fxpipe"


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, seen through views."""
    for user in node.users:
        yield from readers(user) if view_source(user) is node else (user,)


def is_plain_sum(node: fx.Node) -> bool:
    """A sum of two tensors, neither of them scaled."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.Tensor) for a in node.args)


def lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of one dtype, device, shape and layout."""
    same = (a.dtype, a.device, a.dim(), a.stride()) == (b.dtype, b.device, b.dim(), b.stride())
    return same and all(map(statically_known_true, map(operator.eq, a.shape, b.shape)))


def flat_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whole tensors that are views of each other."""
    return a.is_contiguous() and b.is_contiguous() and statically_known_true(a.numel() == b.numel())
