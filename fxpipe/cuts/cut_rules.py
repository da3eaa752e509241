"""Where a program may be cut, and what crosses each cut: the program side of ``cut_search``.

Positions count the program's call_function nodes in order; boundary b stands before node b. A cut is illegal where it
would part

- a value that cannot be sent (a tuple, a size) from its reader: getitem stays with its tuple;
- a storage that the program makes from a node that writes it in place, or that reads it by strides;
- the readers and writers of a buffer, parameter or input that is written in place;
- the loss from the last stage, or two nodes between which gradients are switched off;
- what has one stage hint (``fxpipe.cuts.stage_hints``).

What may be recomputed where it is read, in place of being sent, is ``fxpipe.cuts.recompute``'s to say.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import sympy
import torch
import torch.fx as fx

from fxpipe.costs.probe import element_bytes, tensors_of, total
from fxpipe.costs.storages import Storage, Walk, attribute_of, walk
from fxpipe.cuts.chain import TICKS_PER_SECOND, Chain, Shared
from fxpipe.cuts.in_place import written_storages
from fxpipe.cuts.recompute import Closures, recomputed
from fxpipe.cuts.stage_hints import hints_of, spans
from fxpipe.errors import PartitionError, VerifyError
from fxpipe.ir.cost import CostTable, Size, Time
from fxpipe.ir.program import Program

_GRAD_SWITCH = torch._C._set_grad_enabled
_READS_STRIDES = {torch.ops.aten.as_strided.default}
Span = tuple[int, int]  # positions (first, last): no cut after first and up to last


@dataclass(frozen=True)
class Work:
    """One node in numbers: times in ticks, what it saves for backward, and the size of its value."""

    forward_ticks: int
    backward_ticks: int
    saved_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class CutRules:
    """One program with its costs, as far as cuts go; sequences are by position.

    ``last_use`` is the position of a value's last reader, the program's output standing after all nodes. ``closures`` are the
    nodes that are recomputed where they are read, with all that each needs, itself included.
    """

    program: Program
    bandwidth_bytes_per_second: float
    nodes: tuple[fx.Node, ...]
    work: tuple[Work, ...]
    position: Mapping[fx.Node, int]
    last_use: tuple[int, ...]
    walk: Walk
    written: Mapping[fx.Node, list[Storage]]
    closures: Closures
    hints: Mapping[str, Span]

    def chain(self) -> Chain:
        """The program as the numbers that ``cut_search`` works on."""
        forward, back = self._traffic()
        touched = self._touched_at()
        own = [
            Work(0, w.backward_ticks, 0, 0) if n in touched else w for n, w in zip(self.nodes, self.work, strict=True)
        ]
        per_second = self.bandwidth_bytes_per_second
        return Chain(
            ticks=tuple(w.forward_ticks + w.backward_ticks for w in own),
            saved_bytes=tuple(w.saved_bytes for w in own),
            shared=(*self._shared_values(touched), *self._shared_tensors(touched)),
            legal=self._legal(),
            link_ticks=tuple(_ticks((x + g) / per_second) for x, g in zip(forward, back, strict=True)),
            activation_bytes=forward,
            gradient_bytes=back,
            apart=tuple((before[1], after[0]) for before, after in pairwise(self.hints.values())),
            alone=tuple(map(self.position.__getitem__, self.updates())),
        )

    def _traffic(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes over each boundary: values forward, each once, and the gradients of the differentiable ones back.

        A value that is only returned after the boundary, not computed with, has no gradient.
        """
        forward, back = [], []
        for i, node in enumerate(self.nodes):
            if node not in self.closures:
                size = self.work[i].output_bytes
                forward.append((i, self.last_use[i], size))
                if any(v.requires_grad or v.storage.requires_grad for v in self.walk.values[node]):
                    back.append((i, max((self.position[u] for u in node.users if u.op != "output"), default=i), size))
        return self._over_boundaries(forward), self._over_boundaries(back)

    def updates(self) -> list[fx.Node]:
        """The nodes that write a tensor of the model, as BatchNorm's statistics in training, in order."""
        return [n for n in self.nodes if any(storage.owner.op == "get_attr" for storage in self.written.get(n, ()))]

    def _over_boundaries(self, spans: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
        """For each boundary the sum of the weights of the spans (first, last, weight) that it parts; 0 at both ends."""
        n = len(self.nodes)
        change = [0] * (n + 2)
        for first, last, weight in spans:
            change[first + 1] += weight
            change[last + 1] -= weight
        return (*list(accumulate(change))[:n], 0)

    def _touched_at(self) -> dict[fx.Node, set[int]]:
        """For each recomputed node its own position, and that of every node for which it is computed again."""
        found: dict[fx.Node, set[int]] = {node: {self.position[node]} for node in self.closures}
        for reader, place in self._readers():
            for source in reader.all_input_nodes:
                for needed in self.closures.get(source, ()):
                    found[needed].add(min(place, len(self.nodes) - 1))
        return found

    def _shared_values(self, touched: Mapping[fx.Node, set[int]]) -> Iterator[Shared]:
        for node, places in touched.items():
            work = self.work[self.position[node]]
            yield Shared(tuple(sorted(places)), work.forward_ticks, work.saved_bytes)

    def _shared_tensors(self, touched: Mapping[fx.Node, set[int]]) -> Iterator[Shared]:
        """Each parameter, with room for its gradient, and each buffer, at all its readers."""
        places: dict[int, set[int]] = defaultdict(set)
        tensors: dict[int, torch.Tensor] = {}
        for reader, place in self._readers():
            for source in reader.all_input_nodes:
                tensor = attribute_of(self.program.graph_module, source) if source.op == "get_attr" else None
                if isinstance(tensor, torch.Tensor):
                    tensors[id(tensor)] = tensor
                    places[id(tensor)] |= touched.get(reader, {min(place, len(self.nodes) - 1)})
        for key, tensor in tensors.items():
            yield Shared(tuple(sorted(places[key])), state_bytes=tensor.nbytes * (2 if tensor.requires_grad else 1))

    def _readers(self) -> Iterator[tuple[fx.Node, int]]:
        """Every node in order, then the output, which stands after all nodes."""
        yield from self.position.items()
        yield self.program.graph.output_node(), len(self.nodes)

    def _legal(self) -> tuple[int, ...]:
        spans = (
            *self._unsendable(),
            *self._parted_storages(),
            *self._after_loss(),
            *self._without_grad(),
            *self.hints.values(),
        )
        parts = self._over_boundaries((first, last, 1) for first, last in spans)
        return tuple(b for b in range(1, len(self.nodes)) if not parts[b])

    def _unsendable(self) -> Iterator[Span]:
        for i, node in enumerate(self.nodes):
            if node not in self.closures and not isinstance(node.meta.get("val"), torch.Tensor):
                yield i, self.last_use[i]

    def _parted_storages(self) -> Iterator[Span]:
        """From a storage's making to the last node that writes it; all uses of one that came with the program."""
        fixed: dict[int, list[int]] = defaultdict(list)
        for node, storages in self.written.items():
            for storage in storages:
                fixed[id(storage)].append(self.position[node])
        for call in self.walk.calls:
            if call.node.target in _READS_STRIDES:
                fixed[id(call.arguments[0].storage)].append(self.position[call.node])
        uses = self._uses(fixed)
        for storage in self.walk.storages:
            key = id(storage)
            if storage.owner in self.position and key in fixed:
                yield self.position[storage.owner], max(fixed[key])
            elif key in fixed:
                yield min(uses[key]), max(uses[key])

    def _uses(self, wanted: Mapping[int, object]) -> dict[int, list[int]]:
        uses: dict[int, list[int]] = defaultdict(list)
        for reader, place in self._readers():
            for source in reader.all_input_nodes:
                for value in self.walk.values[source]:
                    if id(value.storage) in wanted:
                        uses[id(value.storage)].append(place)
        return uses

    def _after_loss(self) -> Iterator[Span]:
        index = self.program.signature.loss_index
        loss = None if index is None else flat_outputs(self.program.graph)[index]
        if isinstance(loss, fx.Node) and loss in self.position:
            yield self.position[loss], len(self.nodes)

    def _without_grad(self) -> Iterator[Span]:
        switches = [i for i, node in enumerate(self.nodes) if node.target is _GRAD_SWITCH]
        for i, after in zip(switches, [*switches[1:], len(self.nodes)], strict=False):
            if not self.nodes[i].args[0]:
                yield i, after


def cut_rules(
    program: Program, costs: CostTable, bandwidth_bytes_per_second: float, stage_hints: Mapping[str, str] | None = None
) -> CutRules:
    """Works the rules out for links of this bandwidth between neighbouring stages.

    Raises:
        OptionError: a stage hint names nothing.
        VerifyError: ``costs`` has no row for a node, or the graph cannot be walked.
        PartitionError: the program computes nothing, a cost is not a number at the example's sizes, or hints overlap.
    """
    nodes = tuple(n for n in program.graph.nodes if n.op == "call_function")
    if not nodes:
        raise PartitionError("the program computes nothing, so there is nothing to cut")
    work = {node: _work(node, costs, program.signature.sizes) for node in nodes}
    position = {node: i for i, node in enumerate(nodes)}
    found = walk(program.graph_module)
    written = written_storages(found, program.graph_module)

    def is_cheaper(value: fx.Node, takes: frozenset[fx.Node]) -> bool:
        link = _ticks(work[value].output_bytes / bandwidth_bytes_per_second)
        return sum(work[node].forward_ticks for node in takes) <= link

    return CutRules(
        program=program,
        bandwidth_bytes_per_second=bandwidth_bytes_per_second,
        nodes=nodes,
        work=tuple(work.values()),
        position=position,
        last_use=tuple(max((position.get(u, len(nodes)) for u in n.users), default=i) for n, i in position.items()),
        walk=found,
        written=written,
        closures=recomputed(program.graph_module, found, written, is_cheaper),
        hints=spans(hints_of(nodes, stage_hints or {})),
    )


def flat_outputs(graph: fx.Graph) -> tuple[object, ...]:
    """What the graph returns: nodes, and constants."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return tuple(outputs)


def _work(node: fx.Node, costs: CostTable, sizes: Mapping[str, int]) -> Work:
    if node.target is _GRAD_SWITCH:
        return Work(0, 0, 0, 0)
    if node.name not in costs:
        raise VerifyError(f"the cost table has no row for node {node.name} ({node.target}); run annotate-costs again")
    row = costs[node.name]
    size = total(map(element_bytes, tensors_of(node.meta.get("val"))))
    seconds = [_number(node.name, s, sizes) for s in (row.forward_seconds, row.backward_seconds)]
    return Work(*map(_ticks, seconds), *(int(_number(node.name, s, sizes)) for s in (row.saved_bytes, size)))


def _number(name: str, value: Size | Time, sizes: Mapping[str, int]) -> float:
    if not isinstance(value, sympy.Expr):
        return value
    bound = value.subs({s: sizes[str(s)] for s in value.free_symbols if str(s) in sizes})
    if not bound.is_number:
        raise PartitionError(f"node {name} costs {bound}, which is no number; the example gives {dict(sizes)}")
    return int(bound) if bound.is_integer else float(bound)


def _ticks(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)
