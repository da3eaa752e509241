"""The forward and backward graph of a stage, and what each of their inputs and outputs means."""

from dataclasses import dataclass, field

import torch
import torch.fx as fx

from fxpipe.errors import VerifyError, unknown

KINDS = ("parameter", "buffer", "input", "output", "mutation", "saved", "gradient", "none")


@dataclass(frozen=True)
class Binding:
    """What one placeholder or output stands for; text ``kind name``, parse the inverse of str.

    ``parameter W``, ``buffer B``: the model's tensor of that qualified name. ``input I``: placeholder I of the stage module.
    ``output K``: output K of the stage module, or as a backward input its gradient. ``mutation B``: the new value of buffer B.
    ``saved V``: value V, kept from forward to backward. ``gradient T``: the gradient of parameter or input T.
    ``none``: no value (the gradient of what needs none).
    """

    kind: str
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise VerifyError(unknown("kind of binding", self.kind, KINDS))

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".rstrip()

    @staticmethod
    def parse(text: str) -> "Binding":
        """The inverse of ``str``; raises VerifyError for an unknown kind."""
        return Binding(*text.split(" ", 1))


@dataclass(frozen=True)
class HalfGraph:
    """One graph with plain placeholders and a flat tuple of outputs, each with its meaning."""

    graph_module: fx.GraphModule
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]

    def __post_init__(self) -> None:
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        returned = self.graph_module.graph.output_node().args[0]
        if len(placeholders) != len(self.inputs):
            raise VerifyError(f"graph has {len(placeholders)} placeholders but {len(self.inputs)} bindings")
        if not isinstance(returned, tuple | list) or len(returned) != len(self.outputs):
            raise VerifyError(f"graph returns {returned} but has {len(self.outputs)} output bindings")


@dataclass(frozen=True)
class StageGraphs:
    """Stage ``index`` lowered. Forward returns mutations, outputs, saved values in this order; backward takes what forward
    saved, in the same order, then the gradients of those outputs that need one.

    ``received`` inputs come first among the stage module's placeholders, then the program's own inputs.
    ``output_needs_grad`` and ``input_needs_grad`` say which outputs and received inputs carry a gradient.
    """

    index: int
    forward: HalfGraph
    backward: HalfGraph
    received: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_needs_grad: tuple[bool, ...]
    received_needs_grad: tuple[bool, ...]
    example_outputs: tuple[torch.Tensor, ...] = field(repr=False)  # fake tensors: shapes and dtypes of the outputs

    def __post_init__(self) -> None:
        kept = [str(b) for b in self.forward.outputs if b.kind == "saved"]
        taken = [str(b) for b in self.backward.inputs if b.kind == "saved"]
        if kept != taken:
            raise VerifyError(f"stage {self.index}: forward saves {kept} but backward takes {taken}")
        needed = [f"output {i}" for i, n in enumerate(self.output_needs_grad) if n]
        given = [str(b) for b in self.backward.inputs if b.kind == "output"]
        if needed != given:
            raise VerifyError(f"stage {self.index}: gradients of {needed} come in but backward takes those of {given}")

    @property
    def returned_grads(self) -> tuple[bool, ...]:
        """Of each received value, whether backward computes its gradient: not where the loss does not depend on it."""
        computed = {b.name for b in self.backward.outputs if b.kind == "gradient"}
        return tuple(f"input {i}" in computed for i in range(len(self.received)))


@dataclass(frozen=True)
class LoweredStages:
    """The fact that lowering provides: the graphs of every stage, in order."""

    stages: tuple[StageGraphs, ...]
