"""One stage at work: runs its forward and backward graph for a microbatch and keeps what is saved in between."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpipe.costs.simulate import Event
from fxpipe.errors import RuntimeFailure
from fxpipe.graph_module import set_own_values
from fxpipe.ir.action import Action, ComputationType as Type
from fxpipe.ir.stage_graphs import Binding, HalfGraph, StageGraphs

BoxedCall = Callable[[list[Tensor | None]], Sequence[Tensor | None]]
Compiler = Callable[[HalfGraph], BoxedCall]


def interpreted(half: HalfGraph) -> BoxedCall:
    """The graph's own generated Python code, one ATen call after another."""
    module = half.graph_module

    def call(values: list[Tensor | None]) -> Sequence[Tensor | None]:
        result: Sequence[Tensor | None] = module(*values)
        values.clear()
        return result

    return call


def inductor(half: HalfGraph) -> BoxedCall:
    """The graph compiled by Inductor; results differ from eager by rounding.

    Inductor gets the computed outputs only; inputs that are returned and absent outputs are put back around it.
    """
    from torch._inductor import standalone_compile

    from fxpipe.inline_kernels import with_inlined_kernels

    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(half.graph_module.graph, mapping)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    placeholders = half.graph_module.graph.find_nodes(op="placeholder")
    returned: Any = half.graph_module.graph.output_node().args[0]
    computed = list(dict.fromkeys(n for n in returned if n is not None and n.op != "placeholder"))
    graph.output(tuple(mapping[n] for n in computed))
    set_own_values(graph)
    values = [mapping[n].meta["val"] for n in placeholders]
    examples = [v.detach() if isinstance(v, Tensor) else v for v in values]  # backward is a graph of its own
    options = {"config_patches": with_inlined_kernels()}
    whole = fx.GraphModule(half.graph_module, graph)
    compiled = standalone_compile(whole, examples, dynamic_shapes="from_graph", options=options)
    from_input = {n: i for i, n in enumerate(placeholders)}
    from_result = {n: i for i, n in enumerate(computed)}

    def call(values: list[Tensor | None]) -> Sequence[Tensor | None]:
        kept = [values[from_input[n]] if n in from_input else None for n in returned]
        results: Sequence[Tensor] = compiled(*values)
        values.clear()
        return [results[from_result[n]] if n in from_result else k for n, k in zip(returned, kept, strict=True)]

    return call


COMPILERS: dict[str, Compiler] = {"none": interpreted, "inductor": inductor}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by qualified name, a shared one under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class StageRunner:
    """Runs one stage on the model's own parameters and buffers.

    Gradients are added to ``parameter.grad``, except those of ``separate`` parameters, which are summed in ``separate_grads``
    until their owner collects them.
    """

    def __init__(
        self,
        graphs: StageGraphs,
        model: nn.Module,
        constants: Mapping[str, Tensor],
        compiler: str | Compiler = "none",
        separate: frozenset[str] = frozenset(),
    ) -> None:
        self.graphs = graphs
        self.separate = separate
        self.separate_grads: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {**constants, **named_tensors(model)}
        build = COMPILERS[compiler] if isinstance(compiler, str) else compiler
        self._forward, self._backward = build(graphs.forward), build(graphs.backward)
        self._saved: dict[int, list[Tensor | None]] = {}
        self.events: list[Event] = []
        """When each forward and backward ran, in this process's clock; whoever reads them clears them."""
        self.saved_bytes = 0
        """What one microbatch holds between forward and backward, each storage once, without the model and the inputs."""
        self.peak_saved_bytes = 0

    @torch.no_grad()
    def forward(self, microbatch: int, received: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the forward graph; returns the stage's outputs, contiguous.

        ``received`` are the values from the stage before, ``inputs`` the program's inputs of this microbatch by name.
        """
        with self._recorded(Type.F, microbatch):
            own_inputs = [inputs[name] for name in self.graphs.inputs]
            placed = [*received, *own_inputs]
            values = [
                placed[int(b.name)] if b.kind == "input" else self._tensors[b.name] for b in self.graphs.forward.inputs
            ]
            del placed
            outputs: list[Tensor] = []
            saved: list[Tensor | None] = []
            for binding, value in zip(
                self.graphs.forward.outputs, self._forward([v.detach() for v in values]), strict=True
            ):
                if binding.kind == "mutation" and value is not None:
                    self._tensors[binding.name].copy_(value)
                elif binding.kind == "output" and value is not None:
                    outputs.append(value.contiguous())  # as traced; a compiled graph may choose otherwise
                else:
                    saved.append(value)
            self._saved[microbatch] = saved
            self._count(saved, own_inputs)
        return tuple(outputs)

    @torch.no_grad()
    def backward(self, microbatch: int, output_grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Runs the backward graph; adds the parameters' gradients and returns those of the received values.

        ``output_grads``: one for each output, ``None`` where the loss does not depend on it.
        """
        with self._recorded(Type.B, microbatch):
            values = self._take_saved(microbatch)
            values += [
                self._output_grad(int(b.name), output_grads) for b in self.graphs.backward.inputs if b.kind == "output"
            ]
            received: list[Tensor | None] = [None] * len(self.graphs.received)
            seen: set[int] = set()
            for binding, value in zip(self.graphs.backward.outputs, self._backward(values), strict=True):
                if binding.kind == "none" or value is None:
                    continue
                kind, _, index = binding.name.partition(" ")
                if kind == "input" and index:
                    if int(index) < len(received):
                        received[int(index)] = value.contiguous()  # as the stage before sent it
                else:
                    self._accumulate(binding, value, seen)
        return tuple(received)

    def _output_grad(self, index: int, output_grads: Sequence[Tensor | None]) -> Tensor:
        grad = output_grads[index]
        if grad is not None:
            return grad
        example = self.graphs.example_outputs[index]
        return torch.zeros([int(d) for d in example.shape], dtype=example.dtype, device=example.device)

    @contextlib.contextmanager
    def _recorded(self, kind: Type, microbatch: int) -> Iterator[None]:
        """Keeps the times, and says where an error happened."""
        action = Action(self.graphs.index, kind, microbatch)
        start = time.perf_counter()
        try:
            yield
        except Exception as e:
            e.add_note(
                f"fxpipe: in {action}, {'forward' if kind is Type.F else 'backward'} of microbatch {microbatch} on stage "
                f"{self.graphs.index}"
            )
            raise
        self.events.append(Event(action, self.graphs.index, start, time.perf_counter()))

    def _count(self, saved: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
        if not self.saved_bytes:
            own = {t.untyped_storage().data_ptr() for t in (*self._tensors.values(), *inputs)}
            storages = (v.untyped_storage() for v in saved if v is not None)
            sizes = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in own}
            self.saved_bytes = sum(sizes.values())
        self.peak_saved_bytes = max(self.peak_saved_bytes, len(self._saved) * self.saved_bytes)

    def _take_saved(self, microbatch: int) -> list[Tensor | None]:
        if microbatch not in self._saved:
            raise RuntimeFailure(
                f"stage {self.graphs.index}: backward of microbatch {microbatch} before its forward; "
                f"forwards in flight: {sorted(self._saved) or 'none'}"
            )
        return self._saved.pop(microbatch)

    def _accumulate(self, binding: Binding, grad: Tensor, seen: set[int]) -> None:
        """As autograd does: takes the first gradient over if nothing else holds it, adds the later ones in place."""
        parameter = self._tensors[binding.name]
        total = self.separate_grads.get(binding.name) if binding.name in self.separate else parameter.grad
        if total is not None:
            total.add_(grad)
            return
        storage = grad.untyped_storage().data_ptr()
        if storage in seen or grad.stride() != parameter.stride() or grad.untyped_storage().nbytes() != grad.nbytes:
            grad = torch.empty_like(parameter).copy_(grad)
        seen.add(storage)
        if binding.name in self.separate:
            self.separate_grads[binding.name] = grad
        else:
            parameter.grad = grad
