"""Which storage each value of a graph lives in, who made it, and what each node does to it: one walk over fake tensors.

Equal calls are probed once, so the walk costs as much as the different layers of a model, not as many as it has.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxpipe.costs.probe import Probe, probe, storage_bytes, tensors_of
from fxpipe.errors import VerifyError
from fxpipe.ir.cost import Size


@dataclass
class Storage:
    """One allocation. ``owner`` is the node that it came with: a call made it, a get_attr or placeholder brought it
    in."""

    owner: fx.Node
    bytes: Size
    saved: bool = False  # autograd keeps it for backward
    mutated: bool = False  # some node writes it in place
    requires_grad: bool = False  # a differentiable value was written into it


@dataclass(frozen=True)
class Value:
    """One tensor of a node's value: its storage, and whether autograd follows it."""

    storage: Storage
    requires_grad: bool


@dataclass(frozen=True)
class Call:
    """One call_function node: its tensor arguments in order, what it does, and a key that equal calls share."""

    node: fx.Node
    arguments: tuple[Value, ...]
    probe: Probe
    key: Hashable
    grad_enabled: bool


@dataclass
class Walk:
    """The calls of a graph in program order, and the tensors of every node's value. ``storages`` is in order of
    making."""

    calls: list[Call] = field(default_factory=list)
    values: dict[fx.Node, list[Value]] = field(default_factory=dict)
    storages: list[Storage] = field(default_factory=list)


def walk(graph_module: fx.GraphModule) -> Walk:
    """Probes every call of a graph whose nodes carry ``meta["val"]``; changes neither the graph nor its symbols.

    Raises:
        VerifyError: a node has no ``meta["val"]``, is not of a kind that ``trace`` makes, or its operator fails on
        fakes.
    """
    with torch.set_grad_enabled(True):  # restores the caller's grad mode, whatever the graph sets
        return _Walker(graph_module).run()


def value_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """``meta["val"]``, or the submodule that a get_attr node names."""
    if node.op == "get_attr":
        attribute = attribute_of(graph_module, node)
        if isinstance(attribute, nn.Module):
            return attribute
    if "val" not in node.meta:
        raise VerifyError(f"node {node.name} ({node.target}) has no meta['val']; trace the model first (fxpipe.trace)")
    return node.meta["val"]


def attribute_of(graph_module: nn.Module, node: fx.Node) -> Any:
    """The parameter, buffer, constant or submodule that a get_attr node names."""
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


_PROBES: WeakKeyDictionary[FakeTensorMode, dict[Hashable, Probe]] = WeakKeyDictionary()
"""What was probed for one program, by any of the passes that walk over it."""


class _Walker:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.result = Walk()
        self.tokens: dict[fx.Node, Hashable] = {}
        self.brought: dict[int, Storage] = {}
        self.mode = _fake_mode(graph_module)
        self.probes = _PROBES.setdefault(self.mode, {})

    def run(self) -> Walk:
        for node in self.graph_module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._bring(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                raise VerifyError(
                    f"node {node.name} is a {node.op} of {node.target}; expected call_function nodes only"
                )
        return self.result

    def _bring(self, node: fx.Node) -> None:
        value = value_of(self.graph_module, node)
        real = attribute_of(self.graph_module, node) if node.op == "get_attr" else None
        values = []
        for tensor in tensors_of(value):
            at = tensor if real is None else real
            known = self.brought.setdefault(at.untyped_storage()._cdata, Storage(node, storage_bytes(tensor)))
            if known.owner is node:
                self.result.storages.append(known)
            values.append(Value(known, tensor.requires_grad))
        self.result.values[node] = values

    def _call(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            torch.set_grad_enabled(bool(node.args[0]))
            self.result.values[node] = []
            return
        arguments = tuple(self._arguments(node))
        key = self._key(node, arguments)
        if key not in self.probes:
            self.probes[key] = self._probe(node, [a.requires_grad for a in arguments])
        found = self.probes[key]
        self.result.calls.append(Call(node, arguments, found, key, torch.is_grad_enabled()))
        self._record(node, arguments, found)

    def _arguments(self, node: fx.Node) -> Iterator[Value]:
        for argument in argument_nodes(node):
            for value in self.result.values[argument]:
                yield Value(value.storage, value.requires_grad or value.storage.requires_grad)

    def _probe(self, node: fx.Node, requires_grad: list[bool]) -> Probe:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: value_of(self.graph_module, n))
        assert callable(node.target)  # call_function
        try:
            return probe(node.target, args, kwargs, requires_grad, self.mode)
        except Exception as e:  # anything that an operator may raise
            raise VerifyError(f"node {node.name}: {node.target} fails on fake tensors: {type(e).__name__}: {e}") from e

    def _record(self, node: fx.Node, arguments: tuple[Value, ...], found: Probe) -> None:
        values, fresh = [], {}
        for i, made in enumerate(found.makes):
            if made.alias is None:
                storage = fresh[i] = Storage(node, made.storage_bytes)
                self.result.storages.append(storage)
            else:
                storage = arguments[made.alias].storage
            values.append(Value(storage, made.requires_grad))
        for storage in (arguments[i].storage for i in found.mutated):
            storage.mutated = True
            storage.requires_grad |= any(v.storage is storage and v.requires_grad for v in values)
        for i in found.saved_arguments:
            arguments[i].storage.saved = True
        for i in found.saved_outputs:
            fresh[i].saved = True
        self.result.values[node] = values

    def _key(self, node: fx.Node, arguments: tuple[Value, ...]) -> Hashable:
        """Equal for calls that do the same: operator, shapes, strides, types, aliasing, what is differentiable."""
        storages = _numbered(id(a.storage) for a in arguments)
        same = storages, _numbered(argument_nodes(node)), tuple(a.requires_grad for a in arguments)
        return node.target, self._token(node.args), self._token(node.kwargs), same, torch.is_grad_enabled()

    def _token(self, argument: Any) -> Hashable:
        if isinstance(argument, fx.Node):
            if argument not in self.tokens:
                self.tokens[argument] = self._token(value_of(self.graph_module, argument))
            return self.tokens[argument]
        if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(argument.node.expr)
        parts = _parts(argument)
        return (type(argument), argument) if parts is None else (type(argument), *map(self._token, parts))


def _numbered(things: Iterable[Hashable]) -> tuple[int, ...]:
    """Which of the things are the same: ``a b a`` -> ``0 1 0``."""
    places: dict[Hashable, int] = {}
    return tuple(places.setdefault(thing, len(places)) for thing in things)


def _parts(argument: Any) -> Iterable[Any] | None:
    """What a value is made of, as far as its cost goes; None for a value without parts."""
    if isinstance(argument, torch.Tensor):
        return *argument.shape, *argument.stride(), argument.dtype, argument.device
    if isinstance(argument, slice):
        return argument.start, argument.stop, argument.step
    if isinstance(argument, dict):
        return [part for item in argument.items() for part in item]
    return argument if isinstance(argument, (tuple, list)) else None


def argument_nodes(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes among a node's arguments in order, repeated as often as they stand there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _fake_mode(graph_module: fx.GraphModule) -> FakeTensorMode:
    for node in graph_module.graph.nodes:
        for tensor in tensors_of(node.meta.get("val")):
            if isinstance(tensor, FakeTensor):
                return tensor.fake_mode
    return FakeTensorMode()
