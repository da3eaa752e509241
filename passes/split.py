"""split-stages: the program becomes a chain of stage modules, as the partition says."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._prims_common import is_contiguous_or_false

from fxpipe.costs.storages import Storage, Walk, attribute_of, walk
from fxpipe.cuts.cut_rules import flat_outputs
from fxpipe.errors import VerifyError
from fxpipe.graph_module import new_graph_module
from fxpipe.ir.cost import CostTable
from fxpipe.ir.partition import Partition, StagePlan
from fxpipe.ir.program import Program
from fxpipe.pass_base import Pass

aten = torch.ops.aten
_MAY_RETURN_ITS_INPUT = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.contiguous.default,
    aten.dropout.default,
}


@dataclass(frozen=True)
class SplitStages(Pass):
    """Moves each stage's nodes into a module of its own, ``stage_0``, ``stage_1``, ..., called one after another.

    A stage takes the values that it receives, then the program's inputs that it reads, and returns what it sends; the last
    returns the program's outputs. Parameters and buffers keep their qualified names and are the model's own tensors; one
    that is read under two names has the first in every stage. What a stage returns is contiguous and shares no memory
    with its arguments, its parameters or another result: it is copied where that is not sure. A value whose dimensions lie
    in memory in another order (a transpose, channels last) is sent in the order in which it lies and is turned back where
    it arrives, so that operators see the strides that they saw before. Recomputed nodes are copied into each stage under
    the same name. Values and gradients stay bitwise the same.

    Before::

        linear   = aten.linear(x, w0)
        t        = aten.transpose(linear, 0, 1)
        mul      = aten.mul(t, 2)
        add      = aten.add(mul, t)
        return (add,)

    After, cut before ``mul`` (``t`` is a transposed view, so it is turned and copied to be sent)::

        stage_0 = stage_0(x)           linear = aten.linear(x, w0)
        t       = stage_0[0]           t      = aten.transpose(linear, 0, 1)
                                       turn_t = aten.permute(t, (1, 0))
                                       copy_t = aten.clone(turn_t, memory_format=contiguous)
                                       return (copy_t,)
        stage_1 = stage_1(t)           back_t = aten.permute(t, (1, 0))
        add     = stage_1[0]           mul    = aten.mul(back_t, 2)
        return (add,)                  add    = aten.add(mul, back_t)
                                       return (add,)

    Raises VerifyError where the partition is of another program.
    """

    name: ClassVar[str] = "split-stages"
    requires: ClassVar[tuple[type, ...]] = (Partition,)

    def run(self, program: Program) -> Program:
        partition = program.fact(Partition)
        _check_fits(partition, program.graph)
        found = walk(program.graph_module)
        outer = fx.Graph()
        values: dict[str, Any] = {}  # by the name of the program's value: where the outer graph has it now
        for placeholder in program.graph.find_nodes(op="placeholder"):
            values[placeholder.name] = outer.node_copy(placeholder)
        modules: dict[str, fx.GraphModule] = {}
        results: tuple[Any, ...] = ()
        for plan in partition.stages:
            last = plan.index == partition.n_stages - 1
            name, arguments = f"stage_{plan.index}", [values[n] for n in (*plan.received, *plan.inputs)]
            modules[name] = _StageBuilder(program, found, plan, arguments).build(last)
            results = _call(outer, name, modules[name], flat_outputs(program.graph) if last else plan.sent, arguments)
            values.update(zip(plan.sent, results, strict=False))
        outer.output(results).meta = dict(program.graph.output_node().meta)
        split = new_graph_module(modules, outer, "SplitProgram")
        split.train(program.graph_module.training)
        return program.with_graph(split, preserves=(CostTable, Partition))


class _StageBuilder:
    """Builds the module of one stage; ``arguments`` are the outer graph's values for its placeholders."""

    def __init__(self, program: Program, found: Walk, plan: StagePlan, arguments: list[fx.Node]) -> None:
        self.program, self.found, self.plan = program, found, plan
        self.by_name = {node.name: node for node in program.graph.nodes}
        self.computed = [self.by_name[name] for name in (*plan.recomputed, *plan.nodes)]
        self.graph = fx.Graph()
        self.inside: dict[fx.Node, fx.Node] = {}  # the program's node -> this stage's
        self.returned: set[int] = set()  # storages
        for name, argument in zip((*plan.received, *plan.inputs), arguments, strict=True):
            placeholder = self.graph.placeholder(name)
            placeholder.meta = dict(argument.meta)
            self.inside[self.by_name[name]] = placeholder
        for value in (self.by_name[name] for name in plan.received):
            if (order := memory_order(value)) is not None:
                back = [order.index(d) for d in range(len(order))]
                self.inside[value] = self._permute(self.inside[value], back, f"back_{value.name}")

    def build(self, last: bool) -> fx.GraphModule:
        outputs = flat_outputs(self.program.graph) if last else [self.by_name[name] for name in self.plan.sent]
        self._read_tensors([*self.computed, *(value for value in outputs if isinstance(value, fx.Node))])
        for node in self.computed:
            self.inside[node] = self.graph.node_copy(node, self.inside.__getitem__)
        given: Any = tuple(self._give(value, last) if isinstance(value, fx.Node) else value for value in outputs)
        self.graph.output(given)
        module = new_graph_module(self.program.graph_module, self.graph, f"Stage{self.plan.index}")
        module.train(self.program.graph_module.training)
        return module

    def _read_tensors(self, readers: Iterable[fx.Node]) -> None:
        """A get_attr for each tensor and submodule that is read, a tensor by one name however many it has."""
        root, known = self.program.graph_module, {*self.plan.parameters, *self.plan.buffers}
        one_of = {
            id(attribute_of(root, n)): n for n in self.program.graph.find_nodes(op="get_attr") if n.target in known
        }
        for source in (s for reader in readers for s in (reader, *reader.all_input_nodes) if s.op == "get_attr"):
            if source not in self.inside:
                first = one_of.get(id(attribute_of(root, source)), source)
                if first not in self.inside:
                    self.inside[first] = self.graph.node_copy(first)
                self.inside[source] = self.inside[first]

    def _give(self, value: fx.Node, last: bool) -> fx.Node:
        """The value as this stage returns it: itself if it is sure to be contiguous and alone in its memory, else a copy."""
        node, storage = self.inside[value], self._storage(value)
        if is_contiguous_or_false(value.meta["val"]) and self._is_fresh(value) and id(storage) not in self.returned:
            self.returned.add(id(storage))
            return node
        order = None if last else memory_order(value)
        if order is not None:
            node = self._permute(node, order, f"turn_{value.name}")
        copied = self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        return self._named(copied, f"copy_{value.name}", node, _contiguous(node.meta["val"]))

    def _permute(self, node: fx.Node, order: list[int], name: str) -> fx.Node:
        turned = self.graph.call_function(aten.permute.default, (node, order))
        return self._named(turned, name, node, node.meta["val"].detach().permute(order))

    def _named(self, node: fx.Node, name: str, source: fx.Node, val: torch.Tensor) -> fx.Node:
        """Gives a new node its name and its shape, and the place in the model of the value that it serves."""
        node._rename(name)
        node.meta = {k: source.meta[k] for k in ("stack_trace", "nn_module_stack") if k in source.meta}
        node.meta["val"] = val
        return node

    def _is_fresh(self, value: fx.Node) -> bool:
        """Whether an operator of this stage made the value's memory and the value is all of it, not a view."""
        storage = self._storage(value)
        source: Any = value.args[0] if value.args else None
        while _returns_its_input(value) and self._storage(source) is storage:
            value, source = source, source.args[0] if source.args else None
        maker = source if value.target is operator.getitem else value
        return maker in self.inside and self.inside[maker].op == "call_function" and storage.owner is maker

    def _storage(self, value: fx.Node) -> Storage:
        return self.found.values[value][0].storage


def _contiguous(val: torch.Tensor) -> torch.Tensor:
    return val.detach().clone(memory_format=torch.contiguous_format)


def memory_order(value: fx.Node) -> list[int] | None:
    """The dimensions of a value from the outermost in memory, where that is not their own order and leaves no gaps."""
    val = value.meta["val"]
    strides = [s.node.hint if isinstance(s, torch.SymInt) else s for s in val.stride()]
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    dense = not is_contiguous_or_false(val) and is_contiguous_or_false(val.detach().permute(order))
    return order if dense else None


def _returns_its_input(node: fx.Node) -> bool:
    """Whether the operator may return its first argument itself, as in-place operators do."""
    if node.target in _MAY_RETURN_ITS_INPUT:
        return True
    schema = getattr(node.target, "_schema", None)
    written = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return written is not None and written.is_write


def _call(
    outer: fx.Graph, name: str, module: fx.GraphModule, values: Iterable[Any], arguments: list[fx.Node]
) -> tuple[Any, ...]:
    """Calls a stage in the outer graph; returns its results, each named after its value."""
    returned = flat_outputs(module.graph)
    call = outer.call_module(name, tuple(arguments))
    call.meta["val"] = tuple(r.meta["val"] if isinstance(r, fx.Node) else r for r in returned)
    results: list[Any] = []
    for i, (value, result) in enumerate(zip(values, returned, strict=True)):
        taken = result
        if isinstance(result, fx.Node):
            taken = outer.call_function(operator.getitem, (call, i), name=str(value))
            taken.meta = dict(result.meta)
        results.append(taken)
    return tuple(results)


def _check_fits(partition: Partition, graph: fx.Graph) -> None:
    planned = [name for stage in partition.stages for name in stage.nodes]
    calls = [node.name for node in graph.nodes if node.op == "call_function"]
    if sorted(planned) != sorted(calls):
        odd = min({*planned} ^ {*calls}, default="")
        raise VerifyError(
            f"the partition is of another program: node {odd!r} is in one only; run partition-stages again"
        )
