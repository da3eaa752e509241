"""Where a program may be cut, and what crosses each cut: the program side of ``cut_search``.

Positions count the program's call_function nodes in order; boundary b stands before node b. A cut is illegal where it
would part

- a value that cannot be sent (a tuple, a size) from its reader: getitem stays with its tuple;
- a storage that the program makes from a node that writes it in place, or that reads it by strides;
- the readers and writers of a buffer, parameter or input that is written in place;
- the loss from the last stage, or two nodes between which gradients are switched off.

What may be recomputed where it is read, in place of being sent, is ``fxpipe.recompute``'s to say.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import sympy
import torch
import torch.fx as fx
import torch.nn as nn

from fxpipe.chain import Chain, Shared, ticks
from fxpipe.errors import PartitionError, VerifyError
from fxpipe.in_place import written_storages
from fxpipe.ir.cost import CostTable, NodeCost, Size
from fxpipe.ir.program import Program
from fxpipe.probe import element_bytes, tensors_of, total
from fxpipe.recompute import Closures, recomputed
from fxpipe.storages import Storage, Walk, attribute_of, walk

_GRAD_SWITCH = torch._C._set_grad_enabled
_READS_STRIDES = {torch.ops.aten.as_strided.default}


@dataclass(frozen=True)
class CutRules:
    """One program with its costs, as far as cuts go.

    ``costs`` and ``bytes`` (of the value) are by position. ``last_use`` is the position of a value's last reader, the
    program's output standing after all nodes. ``closures`` are the nodes that are recomputed, with what each needs.
    """

    program: Program
    bandwidth_bytes_per_second: float
    nodes: tuple[fx.Node, ...]
    position: Mapping[fx.Node, int]
    costs: tuple[NodeCost, ...]
    bytes: tuple[int, ...]
    last_use: tuple[int, ...]
    walk: Walk
    written: Mapping[fx.Node, list[Storage]]
    closures: Closures

    def crosses(self, i: int, b: int) -> bool:
        """Whether the value of node ``i`` is sent over boundary ``b``."""
        return i < b <= self.last_use[i] and self.nodes[i] not in self.closures

    def chain(self) -> Chain:
        """The program as the numbers that ``cut_search`` works on."""
        activations, gradients = self._traffic()
        again = [node in self.closures for node in self.nodes]
        both = list(zip(self.costs, again, strict=True))
        return Chain(
            ticks=tuple((0 if r else ticks(float(c.forward_seconds))) + ticks(float(c.backward_seconds)) for c, r in both),
            saved_bytes=tuple(0 if r else _whole(c.saved_bytes) for c, r in both),
            shared=(*self._shared_values(), *self._shared_tensors()),
            legal=self._legal(),
            link_ticks=tuple(
                ticks((x + g) / self.bandwidth_bytes_per_second) for x, g in zip(activations, gradients, strict=True)
            ),
            activation_bytes=activations,
            gradient_bytes=gradients,
        )

    def _traffic(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes over each boundary: values forward, each once, and the gradients of the differentiable ones back.

        A value that is only returned after the boundary, not computed with, has no gradient.
        """
        n = len(self.nodes)
        forward, back = [0] * (n + 2), [0] * (n + 2)
        for i, node in enumerate(self.nodes):
            if node not in self.closures:
                forward[i + 1] += self.bytes[i]
                forward[self.last_use[i] + 1] -= self.bytes[i]
                if any(v.requires_grad or v.storage.requires_grad for v in self.walk.values[node]):
                    back[i + 1] += self.bytes[i]
                    back[max((self.position[u] for u in node.users if u.op != "output"), default=i) + 1] -= self.bytes[i]
        activations, gradients = list(accumulate(forward))[: n + 1], list(accumulate(back))[: n + 1]
        return (0, *activations[1:n], 0), (0, *gradients[1:n], 0)

    def touched_at(self) -> dict[fx.Node, set[int]]:
        """For each recomputed node its own position, and that of every node for which it is computed again."""
        found: dict[fx.Node, set[int]] = {node: {self.position[node]} for node in self.closures}
        for reader in (*self.nodes, self.program.graph.output_node()):
            for source in reader.all_input_nodes:
                for needed in self.closures.get(source, ()):
                    found[needed].add(min(self._place(reader), len(self.nodes) - 1))
        return found

    def _shared_values(self) -> list[Shared]:
        found = []
        for node, places in self.touched_at().items():
            cost = self.costs[self.position[node]]
            again = ticks(float(cost.forward_seconds))
            found.append(Shared(tuple(sorted(places)), again, _whole(cost.saved_bytes)))
        return found

    def _shared_tensors(self) -> list[Shared]:
        """Each parameter, with room for its gradient, and each buffer, at all its readers."""
        places, again = defaultdict(set), self.touched_at()
        tensors: dict[int, torch.Tensor] = {}
        for node in self.program.graph.find_nodes(op="get_attr"):
            tensor = attribute_of(self.program.graph_module, node)
            if isinstance(tensor, torch.Tensor):
                tensors[id(tensor)] = tensor
                for user in node.users:
                    places[id(tensor)] |= again.get(user, {min(self._place(user), len(self.nodes) - 1)})
        return [
            Shared(tuple(sorted(at)), state_bytes=tensors[key].nbytes * (2 if tensors[key].requires_grad else 1))
            for key, at in places.items()
        ]

    def _place(self, reader: fx.Node) -> int:
        return len(self.nodes) if reader.op == "output" else self.position[reader]

    def _legal(self) -> tuple[int, ...]:
        blocked = [0] * (len(self.nodes) + 2)
        for first, last in (*self._unsendable(), *self._parted_storages(), *self._after_loss(), *self._without_grad()):
            blocked[first + 1] += 1
            blocked[last + 1] -= 1
        parts = list(accumulate(blocked))
        return tuple(b for b in range(1, len(self.nodes)) if not parts[b])

    def _unsendable(self) -> Iterable[tuple[int, int]]:
        for i, node in enumerate(self.nodes):
            if node not in self.closures and not isinstance(node.meta["val"], torch.Tensor):
                yield i, self.last_use[i]

    def _parted_storages(self) -> Iterable[tuple[int, int]]:
        """From a storage's making to the last node that writes it; all uses of one that came with the program."""
        fixed: dict[int, list[int]] = defaultdict(list)
        for node, storages in self.written.items():
            for storage in storages:
                fixed[id(storage)].append(self.position[node])
        for call in self.walk.calls:
            if call.node.target in _READS_STRIDES:
                fixed[id(call.arguments[0].storage)].append(self.position[call.node])
        uses = self._uses(set(fixed))
        for storage in self.walk.storages:
            if id(storage) in fixed:
                made_here = storage.owner in self.position
                yield (
                    (self.position[storage.owner], max(fixed[id(storage)]))
                    if made_here
                    else (min(uses[id(storage)]), max(uses[id(storage)]))
                )

    def _uses(self, wanted: set[int]) -> dict[int, list[int]]:
        uses: dict[int, list[int]] = defaultdict(list)
        for reader in (*self.nodes, self.program.graph.output_node()):
            for source in reader.all_input_nodes:
                for value in self.walk.values[source]:
                    if id(value.storage) in wanted:
                        uses[id(value.storage)].append(self._place(reader))
        return uses

    def _after_loss(self) -> Iterable[tuple[int, int]]:
        index = self.program.signature.loss_index
        outputs = self.program.graph.output_node().args[0]
        if index is not None and isinstance(outputs, tuple | list) and outputs[index] in self.position:
            yield self.position[outputs[index]], len(self.nodes)

    def _without_grad(self) -> Iterable[tuple[int, int]]:
        switches = [i for i, node in enumerate(self.nodes) if node.target is _GRAD_SWITCH]
        for i, after in zip(switches, [*switches[1:], len(self.nodes)], strict=True):
            if not self.nodes[i].args[0]:
                yield i, after


def cut_rules(program: Program, costs: CostTable, bandwidth_bytes_per_second: float) -> CutRules:
    """Works the rules out for links of this bandwidth between neighbouring stages.

    Raises VerifyError where ``costs`` has no row for a node or the graph cannot be walked, PartitionError for a program that
    computes nothing or a cost that is not a number.
    """
    nodes = tuple(program.graph.find_nodes(op="call_function"))
    if not nodes:
        raise PartitionError("the program computes nothing, so there is nothing to cut")
    position = {node: i for i, node in enumerate(nodes)}
    sizes = program.signature.sizes
    rows = {node: _row(node, costs, sizes) for node in nodes}
    sent = {node: _number(node.name, total(map(element_bytes, tensors_of(node.meta["val"]))), sizes) for node in nodes}
    found = walk(program.graph_module)
    written = written_storages(found, program.graph_module)
    closures = recomputed(
        program.graph_module,
        found,
        written,
        lambda node: float(rows[node].forward_seconds),
        lambda node: sent[node] / bandwidth_bytes_per_second,
    )
    last_use = [max((position.get(u, len(nodes)) for u in node.users), default=i) for i, node in enumerate(nodes)]
    return CutRules(
        program=program,
        bandwidth_bytes_per_second=bandwidth_bytes_per_second,
        nodes=nodes,
        position=position,
        costs=tuple(rows.values()),
        bytes=tuple(sent.values()),
        last_use=tuple(last_use),
        walk=found,
        written=written,
        closures=closures,
    )


def _row(node: fx.Node, costs: CostTable, sizes: Mapping[str, int]) -> NodeCost:
    if node.target is _GRAD_SWITCH:
        return NodeCost(node.name, "set_grad_enabled", *[0] * 9)
    if node.name not in costs:
        raise VerifyError(f"the cost table has no row for node {node.name} ({node.target}); run annotate-costs again")
    row = costs[node.name]
    return row.at(sizes) if any(isinstance(x, sympy.Expr) for x in vars(row).values()) else row


def _number(name: str, value: Size | Time, sizes: Mapping[str, int]) -> float:
    bound = value.subs(dict(sizes)) if isinstance(value, sympy.Expr) else value
    if isinstance(bound, sympy.Expr) and not bound.is_number:
        raise PartitionError(f"the cost of node {name} is {bound}; give the sizes of its symbols to compare cuts")
    return float(bound) if ... else int(bound)
