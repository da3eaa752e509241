"""choose-save-points decides what to do with each saved value; compress-save-points puts the nodes in."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.fx as fx

from fxpipe.errors import FormatError, OptionError, VerifyError
from fxpipe.graph_module import copy_graph_module, returned, set_returned
from fxpipe.ir.compression import CompressionPlan, SavePoint
from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.pass_base import Pass
from fxpipe.save_points import MIN_BYTES, choose_save_points, first_user, is_tensor, new_placeholder, saved_pairs
from fxpipe.triton_kernels import format as formats
from fxpipe.value_facts import hint, view_source

_COPIED_META = ("stack_trace", "nn_module_stack", "saved_tensor_with_no_vc_check")
"""The last is AOTAutograd's: it saves the tensors so marked apart from the others, in order of the output."""


def parse_format(text: str | None) -> formats.BFPFormat | None:
    """The format of this text, ``None`` for ``None``; raises FormatError listing what is legal."""
    try:
        return None if text is None else formats.BFPFormat.parse(text)
    except formats.FormatError as e:
        raise FormatError(str(e)) from e


@dataclass(frozen=True)
class ChooseSavePoints(Pass):
    """Decides for every save point of every stage: keep it, or compress it and in which format.

    ``format`` of ``none`` keeps everything; values under ``min_bytes`` are kept.
    """

    name: ClassVar[str] = "choose-save-points"
    requires: ClassVar[tuple[type, ...]] = (LoweredStages,)
    provides: ClassVar[tuple[type, ...]] = (CompressionPlan,)
    format: str | None = None
    min_bytes: int = MIN_BYTES

    def __post_init__(self) -> None:
        parse_format(self.format)
        if self.min_bytes < 0:
            raise OptionError(f"min_bytes is {self.min_bytes}; expected at least 0")

    def run(self, program: Program) -> Program:
        format = parse_format(self.format)
        points: list[SavePoint] = []
        received: dict[fx.Node, fx.Node] = {}
        sent: list[fx.Node] = []
        stages = program.fact(LoweredStages).stages
        for stage in stages:
            received |= _received(stage, sent)
            points += choose_save_points(
                stage.forward.graph_module.graph,
                stage.backward.graph_module.graph,
                _n_outputs(stage),
                format,
                stage_index=stage.index,
                received=received,
                min_bytes=self.min_bytes,
                n_lasting=None if stage is stages[-1] else _n_mutations(stage),
            )
            sent = _sent(stage)
        return program.with_facts(CompressionPlan(tuple(points)))


@dataclass(frozen=True)
class CompressSavePoints(Pass):
    """Puts a compress node after the last forward use and a decompress node before the first backward use of each chosen value.

    Changes gradients within the format's bound, and never a forward output.

    Before::

        forward:  relu = aten.relu(x); mm = aten.mm(relu, w); return mm, relu
        backward: def backward(relu, grad): t = aten.t(relu); mm_1 = aten.mm(t, grad)

    After::

        forward:  relu = aten.relu(x); mm = aten.mm(relu, w)
                  compress_relu = fxpipe.bfp_compress(relu, 'bfp4b32+unsigned', [0, 1])
                  return mm, relu_code32, relu_exponent
        backward: def backward(relu_code32, relu_exponent, grad):
                  decompress_relu = fxpipe.bfp_decompress([relu_code32, relu_exponent], 'bfp4b32+unsigned', ...)
                  t = aten.t(decompress_relu); mm_1 = aten.mm(t, grad)
    """

    name: ClassVar[str] = "compress-save-points"
    requires: ClassVar[tuple[type, ...]] = (LoweredStages, CompressionPlan)
    provides: ClassVar[tuple[type, ...]] = (LoweredStages,)
    exact: ClassVar[bool] = False

    def run(self, program: Program) -> Program:
        plan = program.fact(CompressionPlan)
        stages = (self._rewrite(s, plan.of_stage(s.index)) for s in program.fact(LoweredStages).stages)
        return program.with_facts(LoweredStages(tuple(stages)))

    def _rewrite(self, stage: StageGraphs, points: tuple[SavePoint, ...]) -> StageGraphs:
        forward, backward = (
            copy_graph_module(stage.forward.graph_module),
            copy_graph_module(stage.backward.graph_module),
        )
        n_outputs = _n_outputs(stage)
        compress_halves(forward, backward, n_outputs, points)
        saved = tuple(Binding("saved", n.name) for n in returned(forward.graph)[n_outputs:])
        tangents = tuple(b for b in stage.backward.inputs if b.kind != "saved")
        return replace(
            stage,
            forward=HalfGraph(forward, stage.forward.inputs, (*stage.forward.outputs[:n_outputs], *saved)),
            backward=HalfGraph(backward, (*saved, *tangents), stage.backward.outputs),
        )


def compress_halves(
    forward: fx.GraphModule, backward: fx.GraphModule, n_outputs: int, points: Iterable[SavePoint]
) -> None:
    """The rewrite: edits both graphs in place for every point whose decision is ``compress``.

    ``forward`` returns ``n_outputs`` outputs and then the saved values; ``backward`` takes the
    saved values in the same order first. Raises VerifyError where a point names a value that is not saved.
    """
    import fxpipe.triton_kernels.ops  # noqa: F401  (registers the operators)

    chosen = {p.name: p for p in points if p.decision == "compress"}
    pairs = saved_pairs(forward.graph, backward.graph, n_outputs)
    if missing := sorted(set(chosen) - {n.name for n, _ in pairs}):
        names = ", ".join(n.name for n, _ in pairs)
        raise VerifyError(f"the compression plan names {missing[0]!r}, which forward does not save; it saves {names}")
    outputs = returned(forward.graph)
    tensors: list[fx.Node] = []
    sizes = [n for n in outputs[n_outputs:] if not is_tensor(n)]
    fakes = _Fakes()
    for node, placeholder in pairs:
        if node.name not in chosen:
            tensors.append(node)
            continue
        format = formats.BFPFormat.parse(chosen[node.name].format)
        planes = _insert_compress(node, format, fakes)
        _insert_decompress(node, placeholder, planes, _save_sizes(node, sizes, backward.graph), format, fakes)
        tensors += planes
    set_returned(forward.graph, [*outputs[:n_outputs], *tensors, *sizes])
    forward.recompile()
    backward.recompile()


class _Fakes:
    """What the operators make of values, asked once for each layout: a model has many values of few."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[list[torch.Tensor], torch.Tensor]] = {}

    def of(self, val: torch.Tensor, format: formats.BFPFormat) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The planes that store ``val``, and what they are decompressed to."""
        key = str((val.shape, val.stride(), val.dtype, val.device)), str(format)
        if key not in self._known:
            order = memory_order(val)
            planes = torch.ops.fxpipe.bfp_compress.default(val, str(format), order)
            restored = torch.ops.fxpipe.bfp_decompress.default(planes, str(format), list(val.shape), order, val.dtype)
            self._known[key] = planes, restored
        return self._known[key]


def _insert_compress(node: fx.Node, format: formats.BFPFormat, fakes: _Fakes) -> list[fx.Node]:
    """The compress node after the last forward use of ``node`` or of a view of it, and one node for each plane."""
    graph, val = node.graph, node.meta["val"]
    arguments = (node, str(format), memory_order(val))
    with graph.inserting_after(_last_use(node)):
        whole = graph.call_function(torch.ops.fxpipe.bfp_compress.default, arguments, name=f"compress_{node.name}")
    _describe(whole, node, fakes.of(val, format)[0])
    planes = []
    at = whole
    for i, plane in enumerate(format.planes(1)):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (whole, i), name=f"{node.name}_{plane.name}")
        _describe(at, node, whole.meta["val"][i])
        planes.append(at)
    return planes


def _save_sizes(node: fx.Node, saved: list[fx.Node], backward: fx.Graph) -> list[int | fx.Node]:
    """The sizes of a value as backward knows them: a number, or the placeholder of a symbolic size.

    Where backward has none of that size, forward saves it: it joins ``saved``, which forward returns after its tensors,
    and ``backward`` takes it before its tensors, in the same order.
    """
    known = {p.meta["val"].node.expr: p for p in backward.find_nodes(op="placeholder") if _is_size(p)}
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt) and size.node.expr not in known:
            with node.graph.inserting_after(_last_use(node)):
                saved.append(node.graph.call_function(torch.ops.aten.sym_size.int, (node, dim)))
            _describe(saved[-1], node, size)
            known[size.node.expr] = _add_size(backward, saved[-1])
        sizes.append(known[size.node.expr] if isinstance(size, torch.SymInt) else size)
    return sizes


def _add_size(backward: fx.Graph, size: fx.Node) -> fx.Node:
    first_other = next(n for n in backward.nodes if not _is_size(n))
    with backward.inserting_before(first_other):
        placeholder = new_placeholder(backward, size.name)
    placeholder.meta = dict(size.meta)
    return placeholder


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _insert_decompress(
    node: fx.Node,
    placeholder: fx.Node,
    planes: Sequence[fx.Node],
    sizes: Sequence[int | fx.Node],
    format: formats.BFPFormat,
    fakes: _Fakes,
) -> None:
    graph, val = placeholder.graph, node.meta["val"]
    with graph.inserting_before(placeholder):
        stored = [new_placeholder(graph, p.name) for p in planes]
    for new, plane in zip(stored, planes, strict=True):
        _describe(new, node, plane.meta["val"])
    order = memory_order(val)
    arguments = (stored, str(format), list(sizes), order, val.dtype)
    with graph.inserting_before(first_user(placeholder)):
        value = graph.call_function(torch.ops.fxpipe.bfp_decompress.default, arguments, name=f"decompress_{node.name}")
    _describe(value, node, fakes.of(val, format)[1])
    placeholder.replace_all_uses_with(value)
    graph.erase_node(placeholder)


def _describe(new: fx.Node, served: fx.Node, val: object) -> None:
    new.meta = {k: served.meta[k] for k in _COPIED_META if k in served.meta}
    new.meta["val"] = val


def _last_use(node: fx.Node) -> fx.Node:
    """The last node before the output that reads ``node`` or a view of it; ``node`` itself if none does."""
    readers = (user for user in node.users if user.op != "output")
    return max((_last_use(r) if view_source(r) is node else r for r in readers), default=node)


def memory_order(val: torch.Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest in memory: the order in which values are compressed without a copy."""
    strides = [hint(s) for s in val.stride()]
    return sorted(range(val.dim()), key=lambda d: (-strides[d], d))


def _n_mutations(stage: StageGraphs) -> int:
    return sum(1 for b in stage.forward.outputs if b.kind == "mutation")


def _n_outputs(stage: StageGraphs) -> int:
    return sum(1 for b in stage.forward.outputs if b.kind != "saved")


def _received(stage: StageGraphs, sent: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Forward's placeholders of what the stage before ``sent``, each with its node there; dropping them frees memory."""
    placeholders = stage.forward.graph_module.graph.find_nodes(op="placeholder")
    inputs = [(n, int(b.name)) for n, b in zip(placeholders, stage.forward.inputs, strict=True) if b.kind == "input"]
    return {n: sent[i] for n, i in inputs if i < len(stage.received)}


def _sent(stage: StageGraphs) -> list[fx.Node]:
    outputs = returned(stage.forward.graph_module.graph)
    return [n for n, b in zip(outputs, stage.forward.outputs, strict=True) if b.kind == "output"]
