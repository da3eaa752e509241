"""The judgement: what to do with each value that forward saves for backward. Nothing is edited here."""

from collections.abc import Callable, Collection

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from fxpipe.graph_module import returned, set_returned
from fxpipe.ir.compression import SavePoint
from fxpipe.printing import module_path
from fxpipe.saves.backward_facts import BackwardFacts, backward_facts
from fxpipe.saves.exact_forms import exact_form
from fxpipe.saves.format_rules import FormatRules, Names
from fxpipe.saves.value_facts import (
    NOTHING,
    Received,
    hint,
    holds_infinities,
    is_floating,
    is_log_softmax,
    is_non_negative,
    is_softmax,
    is_statistic,
    memory_order,
    original_of,
    storage_of,
    view_source,
)
from fxpipe.triton_kernels.format import DTYPES, BFPFormat

MIN_BYTES = 4096
"""Values smaller than this stay as they are: the node would cost more than the memory is worth."""


def choose_save_points(
    forward: fx.Graph,
    backward: fx.Graph,
    n_outputs: int,
    rules: FormatRules,
    *,
    stage_index: int = 0,
    received: Received = NOTHING,
    min_bytes: int = MIN_BYTES,
    n_lasting: int | None = None,
    parameters: Collection[fx.Node] = (),
    exact_forms: bool = True,
) -> tuple[SavePoint, ...]:
    """Decides for every tensor after the first ``n_outputs`` outputs of ``forward``, each storage once.

    Parameters and inputs take no memory of their own and are not listed, except the ``received`` placeholders: values
    of another stage, each with that stage's node, from which facts about it are known. ``rules`` tell the format of each; none
    keeps it. With ``exact_forms`` a value that has one is packed without loss, and a copy of one of the ``parameters``, which
    are placeholders, computed again.
    The first ``n_lasting`` outputs (``None``: all) stay alive with whoever took them, so that compressing them saves nothing;
    what goes to the next stage does not.
    Values that share a storage must have been brought together first (``share_storages``).
    """
    outputs = returned(forward)
    lasting = {storage_of(n) for n in outputs[: n_outputs if n_lasting is None else n_lasting]}
    pairs = saved_pairs(forward, backward, n_outputs)
    uses = backward_facts(backward, (placeholder for _, placeholder in pairs))
    points = []
    for node, placeholder in pairs:
        if _is_static(storage_of(node), received):
            continue
        format = rules.of(_names(node, received))
        if format is not None and exact_forms and not _refusal_of_place(node, lasting, min_bytes):
            exact = _exact_point(node, placeholder, stage_index, received, parameters)
            if exact is not None:
                points.append(exact)
                continue
        refusal = "copy of a parameter or input" if _is_static(original_of(node), received) else ""
        refusal = (
            refusal or _refusal(node, lasting, received, min_bytes) or _refusal_of_uses(node, placeholder.name, uses)
        )
        if not refusal and format is None:
            refusal = "no format asked"
        points.append(_point(node, stage_index, None if refusal else format, refusal))
    return tuple(points)


def names_of_saved(forward: fx.Graph, backward: fx.Graph, n_outputs: int, received: Received = NOTHING) -> list[Names]:
    """What the saved values are called that take memory of their own."""
    saved = (node for node, _ in saved_pairs(forward, backward, n_outputs))
    return [_names(node, received) for node in saved if not _is_static(storage_of(node), received)]


def _names(node: fx.Node, received: Received) -> Names:
    origin = storage_of(node)
    origin = storage_of(received.get(origin, origin))
    return Names(node.name, _operator(origin), module_path(origin))


def _exact_point(
    node: fx.Node, placeholder: fx.Node, stage_index: int, received: Received, parameters: Collection[fx.Node]
) -> SavePoint | None:
    if original_of(node) in parameters and _recomputable(node):
        return _save_point(node, stage_index, "recompute", "", 0, "copy of a parameter")
    found = exact_form(node, placeholder, received)
    if found is None:
        return None
    form, reason = found
    stored = form.stored_bytes(hint(node.meta["val"].numel()))
    return _save_point(node, stage_index, "pack", str(form), stored, reason) if stored < _stored_raw(node) else None


def _recomputable(node: fx.Node) -> bool:
    steps = _chain(node, original_of(node))
    return all(len(n.all_input_nodes) == 1 for n in steps) and "saved_tensor_with_no_vc_check" not in node.meta


def _is_static(source: fx.Node, received: Received) -> bool:
    return source.op in ("placeholder", "get_attr") and source not in received


def _refusal(node: fx.Node, lasting: set[fx.Node], received: Received, min_bytes: int) -> str:
    """Why the value must stay as it is, or nothing."""
    rules: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: not is_floating(node), "integer or bool"),
        (lambda: _dtype(node) not in DTYPES, "dtype without a format"),
        (lambda: is_statistic(node, received), "statistic"),
        (lambda: is_log_softmax(node), "log-softmax"),
        (lambda: holds_infinities(node, received), "may hold infinities"),
    )
    for applies, reason in rules:
        if applies():
            return reason
    return _refusal_of_place(node, lasting, min_bytes)


def _refusal_of_place(node: fx.Node, lasting: set[fx.Node], min_bytes: int) -> str:
    """Why nothing would be won, or nothing."""
    if storage_of(node) in lasting:
        return "also returned"
    return "small" if _raw_bytes(node) < min_bytes else ""


def _refusal_of_uses(node: fx.Node, name: str, uses: BackwardFacts) -> str:
    """Why backward, which knows the value as ``name``, needs it as it is, or nothing."""
    if name in uses.exponentiated:
        return "exponentiated in backward"
    if name in uses.compared or (name in uses.compared_with_zero and not is_non_negative(node)):
        return "compared in backward"
    return "divided by in backward" if name in uses.divided else ""


def _point(node: fx.Node, stage_index: int, format: BFPFormat | None, refusal: str) -> SavePoint:
    raw, reason = _stored_raw(node), refusal
    if format is not None and is_non_negative(node):
        format, reason = format.for_non_negative(), "non-negative"
    stored = format.stored_bytes(format.stored_numel(_sizes(node))) if format is not None else raw
    if stored >= raw:
        format, stored, reason = None, raw, reason or "no gain"
    decision = "compress" if format is not None else "keep"
    return _save_point(node, stage_index, decision, str(format or ""), stored, reason or "floating activation")


def _save_point(
    node: fx.Node, stage_index: int, decision: str, format: str, stored_bytes: int, reason: str
) -> SavePoint:
    return SavePoint(
        stage_index=stage_index,
        name=node.name,
        operator=_operator(node),
        dtype=_dtype(node),
        shape=tuple(d if isinstance(d, int) else str(d) for d in node.meta["val"].shape),
        raw_bytes=_stored_raw(node),
        stored_bytes=stored_bytes,
        decision=decision,
        format=format,
        reason=reason,
    )


def _stored_raw(node: fx.Node) -> int:
    """What the value keeps in memory as it is: a part of a storage keeps all of it."""
    return max(_raw_bytes(node), _raw_bytes(storage_of(node)))


def _sizes(node: fx.Node) -> list[int]:
    """In the order of its memory, in which it is stored."""
    val = node.meta["val"]
    return [hint(val.shape[dim]) for dim in memory_order(val)]


def _raw_bytes(node: fx.Node) -> int:
    val = node.meta["val"]
    return hint(val.numel()) * int(val.element_size())


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _operator(node: fx.Node) -> str:
    """The operator that computed the value, seen through views and tuples."""
    node = storage_of(node)
    while node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return str(node.target) if node.op == "call_function" else node.op


def save_relus(joint: fx.Graph) -> None:
    """Tells min-cut, which runs next, to save a ReLU's output rather than compute it again in backward.

    Its zeros are a mask, and survive compression; computed again from a compressed value they would be others.
    """
    for node in joint.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        _must_save(node)


def save_softmaxes(joint: fx.Graph) -> None:
    """Tells the partitioner to save each written-out softmax, ``exp(x - max) / sum``, where backward needs it.

    Else it may save the scores ``x``, which take as many bytes but must stay exact: backward would exponentiate them.
    A choice on the softmax alone (``where`` a whole row is masked) is saved in its place. Marks nodes of ``joint`` only.
    """
    for node in joint.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor):
        if is_softmax(node):
            users = list(node.users)
            _must_save(users[0] if [u.target for u in users] == [torch.ops.aten.where.self] else node)


def _must_save(node: fx.Node) -> None:
    """Unless the model says itself what to compute again, by way of ``torch.utils.checkpoint``."""
    node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def share_storages(forward: fx.Graph, backward: fx.Graph, n_outputs: int) -> None:
    """Saves one storage once: instead of several views of one node that node is saved, and backward redoes the views.

    Before::

        forward:  return out, t, view         # t = aten.t(mm), view = aten.view(mm, ...)
        backward: def backward(t, view, grad): ...

    After::

        forward:  return out, mm
        backward: def backward(mm, grad): t = aten.t(mm); view = aten.view(mm, ...); ...

    A lone view that shows only a part of a storage is left as it is: it alone is saved. Both graphs are edited in place.
    """
    groups: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for node, placeholder in saved_pairs(forward, backward, n_outputs):
        groups.setdefault(storage_of(node), []).append((node, placeholder))
    outputs = returned(forward)
    replaced: dict[fx.Node, fx.Node | None] = {}
    for source, members in groups.items():
        base = next((p for n, p in members if n is source), None)
        views = [(n, p) for n, p in members if n is not source and _replayable(n, source)]
        if not views or not _worth_sharing(source, base, [n for n, _ in views]):
            continue
        replaced |= {n: None for n, _ in views}
        if base is None:
            replaced[views[0][0]] = source
            with backward.inserting_before(views[0][1]):
                base = new_placeholder(backward, source.name)
            base.meta = dict(source.meta)
        for view, placeholder in views:
            replay(view, placeholder, source, base)
    kept = (replaced.get(n, n) for n in outputs[n_outputs:])
    set_returned(forward, [*outputs[:n_outputs], *(n for n in kept if n is not None)])
    for source in groups:
        _erase_dead_views(source)


def saved_pairs(forward: fx.Graph, backward: fx.Graph, n_outputs: int) -> list[tuple[fx.Node, fx.Node]]:
    """Each saved tensor of ``forward`` with the placeholder of ``backward`` that receives it.

    Tensors correspond by position, and what follows them in backward are gradients. Symbolic sizes have their own rule:
    forward returns them after the tensors, backward takes them before.
    """
    saved = [n for n in returned(forward)[n_outputs:] if is_tensor(n)]
    return list(zip(saved, filter(is_tensor, backward.find_nodes(op="placeholder")), strict=False))


def is_tensor(node: fx.Node) -> bool:
    """Not a symbolic size, a tuple, or an opaque object."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _worth_sharing(source: fx.Node, base: fx.Node | None, views: list[fx.Node]) -> bool:
    if source.op == "placeholder" or base is not None:
        return True
    whole = source.meta["val"]
    return isinstance(whole, torch.Tensor) and _raw_bytes(source) <= sum(_raw_bytes(v) for v in views)


def _erase_dead_views(source: fx.Node) -> None:
    for user in list(source.users):
        if view_source(user) is source:
            _erase_dead_views(user)
            if not user.users:
                user.graph.erase_node(user)


def _chain(view: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views and copies from just after ``source`` to ``view``."""
    chain = [view]
    while (step := view_source(chain[-1]) or chain[-1].all_input_nodes[0]) is not source:
        chain.append(step)
    return chain[::-1]


def _replayable(view: fx.Node, source: fx.Node) -> bool:
    """No step of the chain takes any value but the one before it (a symbolic size, say)."""
    return all(len(n.all_input_nodes) == 1 for n in _chain(view, source)) and isinstance(
        source.meta.get("val"), torch.Tensor
    )


def replay(view: fx.Node, placeholder: fx.Node, source: fx.Node, base: fx.Node) -> None:
    """Makes of ``base``, backward's ``source``, what ``view`` is of ``source`` in forward, in the place of ``placeholder``."""
    backward = placeholder.graph
    copies = {source: base}
    with backward.inserting_before(first_user(placeholder)):
        for step in _chain(view, source):
            copies[step] = backward.node_copy(step, copies.__getitem__)
            copies[step].meta = dict(step.meta)
    placeholder.replace_all_uses_with(copies[view])
    backward.erase_node(placeholder)


def new_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder whose argument in the generated code has the node's own name, which no other has."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def first_user(node: fx.Node) -> fx.Node:
    """The first node, in program order, that reads ``node``; the graph's output if none does."""
    return min(node.users, default=node.graph.output_node())
