"""choose-save-points decides what to do with each saved value; compress-save-points puts the nodes in."""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxpipe.errors import OptionError, VerifyError
from fxpipe.graph_module import copy_graph_module, describe, returned, set_returned
from fxpipe.ir.compression import CompressionPlan, SavePoint
from fxpipe.ir.program import Program
from fxpipe.ir.stage_graphs import Binding, HalfGraph, LoweredStages, StageGraphs
from fxpipe.pass_base import Pass
from fxpipe.saves.exact_forms import ExactForm, Fakes, insert_restore, insert_store
from fxpipe.saves.format_rules import FormatRules, Names
from fxpipe.saves.fused_norms import fuse_norms
from fxpipe.saves.fused_producers import fuse_producers
from fxpipe.saves.save_points import (
    MIN_BYTES,
    choose_save_points,
    first_user,
    is_tensor,
    names_of_saved,
    new_placeholder,
    replay,
    saved_pairs,
)
from fxpipe.saves.value_facts import memory_order, original_of, view_source
from fxpipe.triton_kernels import format as formats


@dataclass(frozen=True)
class ChooseSavePoints(Pass):
    """Decides for every save point of every stage: keep it, compress it in which format, pack it without loss, or recompute it.

    ``format``: of all values, or for each pattern of names (``format_rules``); ``none`` keeps. Values under ``min_bytes`` are
    kept. ``exact_forms``: whether bools, integers of a known range, masks and the like are packed without loss, and copies of
    parameters computed again.

    Raises:
        OptionError: an option cannot be, or a pattern of ``format`` matches no saved value of any stage.
    """

    name: ClassVar[str] = "choose-save-points"
    requires: ClassVar[tuple[type, ...]] = (LoweredStages,)
    provides: ClassVar[tuple[type, ...]] = (CompressionPlan,)
    rewrites: ClassVar[bool] = False
    format: str | None = None
    min_bytes: int = MIN_BYTES
    exact_forms: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", FormatRules.parse(self.format).text)
        if self.min_bytes < 0:
            raise OptionError(f"min_bytes is {self.min_bytes}; expected at least 0")

    def run(self, program: Program) -> Program:
        rules = FormatRules.parse(self.format)
        names: list[Names] = []
        points: list[SavePoint] = []
        received: dict[fx.Node, fx.Node] = {}
        sent: list[fx.Node] = []
        stages = program.fact(LoweredStages).stages
        for stage in stages:
            received |= _received(stage, sent)
            graphs = stage.forward.graph_module.graph, stage.backward.graph_module.graph, _n_outputs(stage)
            points += choose_save_points(
                *graphs,
                rules,
                stage_index=stage.index,
                received=received,
                min_bytes=self.min_bytes,
                n_lasting=None if stage is stages[-1] else _n_mutations(stage),
                parameters=_parameters(stage),
                exact_forms=self.exact_forms,
            )
            names += names_of_saved(*graphs, received)
            sent = _sent(stage)
        if problem := rules.unmatched(names):
            raise OptionError(problem)
        return program.with_facts(CompressionPlan(tuple(points)))


@dataclass(frozen=True)
class CompressSavePoints(Pass):
    """Puts a compress node after the last forward use and a decompress node before the first backward use of each chosen value.

    Changes gradients within the format's bound, and never a forward output; but where ``exact_forward`` is off, for stages that
    Inductor compiles, SiLU, GELU and norms may be fused on a GPU and differ by a rounding, as they do there
    (``fuse_producers``, ``fuse_norms``).

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
    exact_forward: bool = True

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
        compress_halves(forward, backward, n_outputs, points, exact_forward=self.exact_forward)
        saved = tuple(Binding("saved", n.name) for n in returned(forward.graph)[n_outputs:])
        tangents = tuple(b for b in stage.backward.inputs if b.kind != "saved")
        return replace(
            stage,
            forward=HalfGraph(forward, stage.forward.inputs, (*stage.forward.outputs[:n_outputs], *saved)),
            backward=HalfGraph(backward, (*saved, *tangents), stage.backward.outputs),
        )


def compress_halves(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    n_outputs: int,
    points: Iterable[SavePoint],
    channels_last: Collection[fx.Node] = (),
    *,
    exact_forward: bool = True,
) -> None:
    """The rewrite: edits both graphs in place for every point whose decision is not ``keep``; then ``fuse_norms``,
    unless ``exact_forward``, and ``fuse_producers``, which gets that.

    ``forward`` returns ``n_outputs`` outputs and then the saved values; ``backward`` takes the
    saved values in the same order first. The values of ``channels_last`` will have their memory in that order, whatever
    their strides say, and are stored in it. Raises VerifyError where a point names a value that is not saved.
    """
    import fxpipe.triton_kernels.ops  # noqa: F401  (registers the operators)

    chosen = {p.name: p for p in points if p.decision != "keep"}
    pairs = saved_pairs(forward.graph, backward.graph, n_outputs)
    if missing := sorted(set(chosen) - {n.name for n, _ in pairs}):
        names = ", ".join(n.name for n, _ in pairs)
        raise VerifyError(f"the compression plan names {missing[0]!r}, which forward does not save; it saves {names}")
    outputs = returned(forward.graph)
    sizes = [n for n in outputs[n_outputs:] if not is_tensor(n)]
    rewrite = _Rewrite(backward.graph, sizes, dict(pairs), channels_last)
    tensors = [
        t
        for index, (node, placeholder) in enumerate(pairs)
        for t in (rewrite.save(node, placeholder, chosen[node.name], index) if node.name in chosen else [node])
    ]
    set_returned(forward.graph, [*outputs[:n_outputs], *tensors, *sizes])
    if not exact_forward:
        fuse_norms(forward.graph)
    fuse_producers(forward.graph, exact=exact_forward)
    forward.recompile()
    backward.recompile()


class _Rewrite:
    """What forward saves instead of each value, and backward makes of it; ``sizes``: the symbolic ones that forward saves."""

    def __init__(
        self,
        backward: fx.Graph,
        sizes: list[fx.Node],
        known: dict[fx.Node, fx.Node],
        channels_last: Collection[fx.Node],
    ) -> None:
        self.backward, self.sizes, self.known, self.channels_last = backward, sizes, known, channels_last
        self.fakes = _Fakes()
        self.exact_fakes: Fakes = {}

    def save(self, node: fx.Node, placeholder: fx.Node, point: SavePoint, index: int) -> list[fx.Node]:
        """Puts the nodes in for one point, the ``index``-th; returns what forward is to save."""
        if point.decision == "recompute":
            return self._recompute(node, placeholder)
        sizes = _save_sizes(node, self.sizes, self.backward)
        if point.decision == "pack":
            return self._pack(node, placeholder, ExactForm.parse(point.format), sizes)
        format = formats.BFPFormat.parse(point.format)
        order = memory_order(node.meta["val"]) if format.rows else self._order(node)
        planes = _insert_compress(node, format, order, self.fakes, index)
        _insert_decompress(node, placeholder, planes, sizes, format, order, self.fakes, index)
        return planes

    def _order(self, node: fx.Node) -> list[int]:
        return [0, 2, 3, 1] if node in self.channels_last else memory_order(node.meta["val"])

    def _pack(self, node: fx.Node, placeholder: fx.Node, form: ExactForm, sizes: list[int | fx.Node]) -> list[fx.Node]:
        order = self._order(node)
        stored = insert_store(node, _last_use(node), form, order, self.exact_fakes)
        taken = _placeholders_before(placeholder, [stored])[0]
        value = insert_restore(taken, first_user(placeholder), form, node, sizes, order, self.exact_fakes)
        placeholder.replace_all_uses_with(value)
        self.backward.erase_node(placeholder)
        return [stored]

    def _recompute(self, node: fx.Node, placeholder: fx.Node) -> list[fx.Node]:
        """Saves the parameter, unless it is saved already, and copies it in backward again."""
        source = original_of(node)
        new = [] if source in self.known else [source]
        if new:
            self.known[source] = _placeholders_before(placeholder, new)[0]
        replay(node, placeholder, source, self.known[source])
        return new


def _placeholders_before(placeholder: fx.Node, saved: Sequence[fx.Node]) -> list[fx.Node]:
    """One new placeholder of backward for each node that forward saves instead, in the place of the old one."""
    with placeholder.graph.inserting_before(placeholder):
        new = [new_placeholder(placeholder.graph, n.name) for n in saved]
    for taken, node in zip(new, saved, strict=True):
        describe(taken, node, node.meta["val"])
    return new


class _Fakes:
    """What the operators make of values, asked once for each layout: a model has many values of few."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[list[torch.Tensor], torch.Tensor]] = {}

    def of(
        self, val: torch.Tensor, format: formats.BFPFormat, order: list[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The planes that store ``val`` in that order, and what they are decompressed to."""
        key = str((val.shape, val.stride(), order, val.dtype, val.device)), str(format)
        if key not in self._known:
            seed = val.new_empty(1, dtype=torch.int64)
            planes = torch.ops.fxpipe.bfp_compress.default(val, str(format), order, seed)
            restored = torch.ops.fxpipe.bfp_decompress.default(
                planes, str(format), list(val.shape), order, val.dtype, seed
            )
            self._known[key] = planes, restored
        return self._known[key]


def _insert_compress(
    node: fx.Node, format: formats.BFPFormat, order: list[int], fakes: _Fakes, index: int
) -> list[fx.Node]:
    """The compress node after the last forward use of ``node`` or of a view of it, and one node for each plane."""
    graph, val = node.graph, node.meta["val"]
    at = _last_use(node)
    seed: tuple[fx.Node, ...] = ()
    if format.compress_needs_seed:
        at = _insert_seed(node, at, index)
        seed = (at,)
    arguments: tuple[Any, ...] = (node, str(format), order, *seed)
    with graph.inserting_after(at):
        whole = graph.call_function(torch.ops.fxpipe.bfp_compress.default, arguments, name=f"compress_{node.name}")
    describe(whole, node, fakes.of(val, format, order)[0])
    planes = []
    at = whole
    for i, plane in enumerate(format.planes(1)):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (whole, i), name=f"{node.name}_{plane.name}")
        describe(at, node, whole.meta["val"][i])
        planes.append(at)
    return planes


def _insert_seed(value: fx.Node, after: fx.Node, index: int) -> fx.Node:
    """A seed for one save point: of the value's own bits (``seed_of``), so that it changes from step to step.

    A step that is repeated on the same values has the same seeds, under every compiler and from every cache and plan file, and
    no generator is touched.
    """
    with value.graph.inserting_after(after):
        seed = value.graph.call_function(torch.ops.fxpipe.seed_of.default, (value, index), name=f"seed_{value.name}")
    describe(seed, value, torch.ops.fxpipe.seed_of.default(value.meta["val"], index))
    return seed


def _save_sizes(node: fx.Node, saved: list[fx.Node], backward: fx.Graph) -> list[int | fx.Node]:
    """The sizes of a value as backward knows them: a number, or the placeholder of a symbolic size.

    Where backward has none of that size, forward saves it: it joins ``saved``, which forward returns after its tensors,
    and ``backward`` takes it before its tensors, in the same order.
    """
    shape = node.meta["val"].shape
    if not any(isinstance(size, torch.SymInt) for size in shape):
        return list(shape)
    known = {p.meta["val"].node.expr: p for p in backward.find_nodes(op="placeholder") if _is_size(p)}
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(shape):
        if isinstance(size, torch.SymInt) and size.node.expr not in known:
            with node.graph.inserting_after(_last_use(node)):
                saved.append(node.graph.call_function(torch.ops.aten.sym_size.int, (node, dim)))
            describe(saved[-1], node, size)
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
    order: list[int],
    fakes: _Fakes,
    index: int,
) -> None:
    graph, val = placeholder.graph, node.meta["val"]
    stored = _placeholders_before(placeholder, planes)
    before = first_user(placeholder)
    seed: tuple[fx.Node, ...] = ()
    if format.decompress_needs_seed:
        seed = (_insert_seed(stored[0], before.prev, index),)
    arguments: tuple[Any, ...] = (stored, str(format), list(sizes), order, val.dtype, *seed)
    with graph.inserting_before(before):
        value = graph.call_function(torch.ops.fxpipe.bfp_decompress.default, arguments, name=f"decompress_{node.name}")
    describe(value, node, fakes.of(val, format, order)[1])
    placeholder.replace_all_uses_with(value)
    graph.erase_node(placeholder)


def _last_use(node: fx.Node) -> fx.Node:
    """The last node before the output that reads ``node`` or a view of it; ``node`` itself if none does."""
    readers = (user for user in node.users if user.op != "output")
    return max((_last_use(r) if view_source(r) is node else r for r in readers), default=node)


def _n_mutations(stage: StageGraphs) -> int:
    return sum(1 for b in stage.forward.outputs if b.kind == "mutation")


def _n_outputs(stage: StageGraphs) -> int:
    return sum(1 for b in stage.forward.outputs if b.kind != "saved")


def _parameters(stage: StageGraphs) -> list[fx.Node]:
    placeholders = stage.forward.graph_module.graph.find_nodes(op="placeholder")
    return [n for n, b in zip(placeholders, stage.forward.inputs, strict=True) if b.kind == "parameter"]


def _received(stage: StageGraphs, sent: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Forward's placeholders of what the stage before ``sent``, each with its node there; dropping them frees memory."""
    placeholders = stage.forward.graph_module.graph.find_nodes(op="placeholder")
    inputs = [(n, int(b.name)) for n, b in zip(placeholders, stage.forward.inputs, strict=True) if b.kind == "input"]
    return {n: sent[i] for n, i in inputs if i < len(stage.received)}


def _sent(stage: StageGraphs) -> list[fx.Node]:
    outputs = returned(stage.forward.graph_module.graph)
    return [n for n, b in zip(outputs, stage.forward.outputs, strict=True) if b.kind == "output"]
