"""Program: one FX graph, what its inputs and outputs mean, the facts known about it, and how it came to be."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch.fx as fx
from torch.utils._pytree import TreeSpec

from fxpipe.errors import VerifyError

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Signature:
    """The calling convention of a program.

    ``inputs`` are the names of the placeholders, one for each tensor leaf of (args, kwargs, target) in ``in_spec``; ``paths``
    say where each stands in the call (``input_ids``, ``batch['mask']``, ``target``). ``constants`` are the leaves that are not
    tensors, as (position among all leaves, value). ``n_outputs`` counts the flat outputs of ``out_spec``;
    ``loss_index`` is the position among them of the scalar to differentiate, or ``None`` in a program without a loss.
    ``sizes`` gives the example's value of every dynamic dimension, by the name of its symbol.
    """

    inputs: tuple[str, ...]
    paths: tuple[str, ...]
    constants: tuple[tuple[int, Any], ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    n_outputs: int
    loss_index: int | None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.paths):
            raise VerifyError(f"signature has {len(self.inputs)} inputs but {len(self.paths)} paths")
        if self.loss_index is not None and not 0 <= self.loss_index < self.n_outputs:
            raise VerifyError(f"loss index {self.loss_index} is outside the {self.n_outputs} outputs")


@dataclass(frozen=True)
class PassRecord:
    """One line of a program's history: which pass, how long, how many nodes it left."""

    text: str
    seconds: float
    n_nodes: int


@dataclass(frozen=True)
class Program:
    """A graph with plain positional placeholders (tensor leaves in order) and a flat tuple of outputs.

    Parameters and buffers are ``get_attr`` nodes whose targets are the qualified names in the model, and the module's
    attributes are the model's own tensors. Facts are frozen records kept by their class: ``program.fact(CostTable)``.
    """

    graph_module: fx.GraphModule
    signature: Signature
    facts: Mapping[type, Any] = field(default_factory=lambda: MappingProxyType({}))
    log: tuple[PassRecord, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def fact(self, kind: type[Fact]) -> Fact:
        """The fact of this class; raises VerifyError naming those that are known when it is absent."""
        if kind not in self.facts:
            known = ", ".join(sorted(k.__name__ for k in self.facts)) or "none"
            raise VerifyError(
                f"the program has no {kind.__name__}; known facts: {known}; run the pass that provides it first"
            )
        return self.facts[kind]  # type: ignore[no-any-return]

    def with_facts(self, *facts: object) -> "Program":
        """The same graph with these facts added or replaced."""
        return replace(self, facts=MappingProxyType({**self.facts, **{type(f): f for f in facts}}))

    def with_graph(self, graph_module: fx.GraphModule, preserves: Iterable[type] = ()) -> "Program":
        """Another graph; every fact that is not in ``preserves`` is dropped."""
        kept = set(preserves)
        return replace(
            self,
            graph_module=graph_module,
            facts=MappingProxyType({k: v for k, v in self.facts.items() if k in kept}),
        )
