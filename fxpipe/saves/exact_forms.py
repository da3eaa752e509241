"""Small forms that lose nothing, where a graph proves that a value has few bits: which, how it is stored, and restored."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxpipe.errors import FormatError
from fxpipe.graph_module import describe
from fxpipe.saves.value_facts import NOTHING, Received, is_floating, view_source
from fxpipe.saves.value_ranges import constants_of, integer_range

aten, prims = torch.ops.aten, torch.ops.prims

INTEGERS = {"uint8": (0, 255), "int16": (-(2**15), 2**15 - 1), "int32": (-(2**31), 2**31 - 1)}
BITS, SIGNS = "bits", "signs"


@dataclass(frozen=True)
class ExactForm:
    """How a value is stored without loss. Its text is ``name``, or ``either(-inf,0.0)`` with the ``constants``.

    ``bits``: a bool, eight to a byte (``fxpipe::pack_bools``). ``uint8``, ``int16``, ``int32``: an integer that fits.
    ``either``: a value that is one of two constants, as a bit. ``signs``: whether a value is positive or NaN, as a bit, where
    backward asks for no more; it gets 1 in its place, and else 0.
    """

    name: str
    constants: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.name + (f"({','.join(map(str, self.constants))})" if self.constants else "")

    @staticmethod
    def parse(text: str) -> "ExactForm":
        """The inverse of ``str``; raises FormatError for anything else."""
        match = re.fullmatch(r"(\w+)(?:\(([^,()]+),([^,()]+)\))?", text)
        if match and (match[1] in (*INTEGERS, BITS, SIGNS) if match[2] is None else match[1] == "either"):
            return ExactForm(match[1], tuple(map(float, match.groups()[1:])) if match[2] else ())
        raise FormatError(
            f"unknown exact form {text!r}; known: {BITS}, {SIGNS}, {', '.join(INTEGERS)}, either(LOW,HIGH)"
        )

    def stored_bytes(self, numel: int) -> int:
        """Bytes that ``numel`` values take."""
        if self.name in INTEGERS:
            return numel * int(_dtype(self.name).itemsize)
        return (numel + 7) // 8


def exact_form(node: fx.Node, placeholder: fx.Node, received: Received = NOTHING) -> tuple[ExactForm, str] | None:
    """The form of a value of forward, which backward knows as ``placeholder``, and in words why it fits; if one does."""
    dtype = node.meta["val"].dtype
    if dtype is torch.bool:
        return ExactForm(BITS), "bool"
    if is_floating(node):
        constants = tuple(sorted(constants_of(node, received)))
        if len(constants) == 2:
            return ExactForm("either", constants), "one of two constants"
        return (ExactForm(SIGNS), "backward needs its sign") if only_sign_is_read(placeholder) else None
    if dtype in (torch.int64, torch.int32, torch.int16):
        bounds = integer_range(node, received)
        fits = (n for n, (low, high) in INTEGERS.items() if bounds and low <= bounds[0] and bounds[1] <= high)
        name = next(fits, "")
        if bounds and name and _dtype(name).itemsize < dtype.itemsize:
            return ExactForm(name), f"between {bounds[0]} and {bounds[1]}"
    return None


def only_sign_is_read(placeholder: fx.Node) -> bool:
    """Whether backward asks of the value only if it is at most zero: ``threshold_backward``, ``le``. Sizes may be asked too."""
    todo, read = [placeholder], False
    while todo:
        node = todo.pop()
        for user in node.users:
            if view_source(user) is node:
                todo.append(user)
            elif _reads_sign(user, node):
                read = True
            elif not _reads_size(user, node):
                return False
    return read


def _reads_sign(user: fx.Node, node: fx.Node) -> bool:
    if user.target is aten.threshold_backward.default:
        return bool(user.args[0] is not node and user.args[2] == 0)
    return bool(user.target is aten.le.Scalar and user.args[1] == 0)


def _reads_size(user: fx.Node, node: fx.Node) -> bool:
    """A max-pool's backward takes its input for its shape; the indices say the rest."""
    return user.target is aten.max_pool2d_with_indices_backward.default and node not in (user.args[0], user.args[7])


Fakes = dict[str, Any]
"""What operators make of fake values, by call and layout: a model has many values of few layouts."""


def insert_store(node: fx.Node, after: fx.Node, form: ExactForm, order: Sequence[int], fakes: Fakes) -> fx.Node:
    """Puts the nodes that store ``node`` behind ``after``; returns the stored value.

    ``order``: the dimensions from the slowest to the fastest in memory.
    """
    emit = _Emitter(node, after, fakes)
    if form.name in INTEGERS:
        return emit(prims.convert_element_type.default, node, _dtype(form.name), name=f"{node.name}_{form.name}")
    bools = node
    if form.name == SIGNS:
        bools = emit(aten.le.Scalar, node, 0)
    elif form.constants:
        bools = emit(aten.eq.Scalar, node, form.constants[1])
    return emit(torch.ops.fxpipe.pack_bools.default, emit.permuted(bools, order), name=f"{node.name}_{BITS}")


def insert_restore(
    stored: fx.Node,
    before: fx.Node,
    form: ExactForm,
    like: fx.Node,
    sizes: Sequence[Any],
    order: Sequence[int],
    fakes: Fakes,
) -> fx.Node:
    """Puts the nodes that restore ``stored`` in front of ``before``; returns the value of forward's node ``like`` again.

    ``sizes``: of its dimensions, as the graph of ``stored`` knows them. ``order``: as it was stored with.
    """
    emit, dtype = _Emitter(like, before, fakes, before=True), like.meta["val"].dtype
    name = f"restore_{like.name}"
    if form.name in INTEGERS:
        return emit(prims.convert_element_type.default, stored, dtype, name=name)
    bools = emit(torch.ops.fxpipe.unpack_bools.default, stored, [sizes[dim] for dim in order])
    bools = emit.permuted(bools, sorted(range(len(order)), key=order.__getitem__))
    if form.name == SIGNS:
        return emit(prims.convert_element_type.default, emit(aten.logical_not.default, bools), dtype, name=name)
    if form.constants:
        device = like.meta["val"].device
        low, high = (emit(aten.full.default, [], value, dtype=dtype, device=device) for value in form.constants)
        return emit(aten.where.self, bools, high, low, name=name)
    return bools


class _Emitter:
    """Puts calls that serve a node one after the other into the graph of ``at``, each with its fake value."""

    def __init__(self, served: fx.Node, at: fx.Node, fakes: Fakes, *, before: bool = False) -> None:
        self.served, self.graph, self.at, self.fakes, self.before = served, at.graph, at, fakes, before
        self.mode = getattr(served.meta["val"], "fake_mode", nullcontext())

    def __call__(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.at) if self.before else self.graph.inserting_after(self.at):
            node = self.graph.call_function(target, args, kwargs, name=name)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        key = str((target, fx.map_arg((args, kwargs), _layout)))
        if key not in self.fakes:
            with self.mode:
                self.fakes[key] = target(*values[0], **values[1])
        describe(node, self.served, self.fakes[key])
        self.at = self.at if self.before else node
        return node

    def permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """The node with its dimensions in this order."""
        return node if list(order) == sorted(order) else self(aten.permute.default, node, list(order))


def _layout(node: fx.Node) -> str:
    val = node.meta["val"]
    return f"{val.shape} {val.stride()} {val.dtype} {val.device}" if isinstance(val, torch.Tensor) else str(val)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
