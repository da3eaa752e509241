"""model + example inputs -> Program: one FX graph of ATen operators, every node with its shape."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
import torch.utils._pytree as pytree

from fxpipe.errors import OptionError, TraceError
from fxpipe.graph_module import returned
from fxpipe.ir.program import Program, Signature

LossFn = Callable[[Any, Any], torch.Tensor]
DynamicDims = Mapping[str, Sequence[int]]


class _Call(nn.Module):
    """What is exported: ``forward(args, kwargs, target)``, the loss first among the outputs when there is a loss function."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.train(model.training)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        output = self.model(*args, **kwargs)
        return output if self.loss_fn is None else {"loss": self.loss_fn(output, target), "output": output}


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    target: Any = None,
    dynamic: DynamicDims | None = None,
) -> Program:
    """Captures ``model(*args, **kwargs)``, and ``loss_fn(output, target)`` after it if given, as one Program.

    The graph has one placeholder for each tensor leaf of the call; leaves that are not tensors are constants of the program.
    The model's mode (train or eval) is captured as it stands. ``dynamic`` maps the path of an input (``"input_ids"``,
    ``"0"`` for the first positional one, ``"target"``) to the dimensions that stay symbolic: ``{"input_ids": [0, 1]}``.

    The loss is the output of ``loss_fn``; else the output named ``loss``; else the first output if it is a floating scalar.

    Raises:
        TraceError: the model cannot be captured; names the place in the model and says what to do.
        OptionError: a ``target`` without a ``loss_fn``.
    """
    if target is not None and loss_fn is None:
        raise OptionError(
            "a target is given but no loss_fn to take it; give loss_fn(output, target), or leave target out"
        )
    call: tuple[Any, ...] = (args, dict(kwargs or {}), target)
    leaves, in_spec = pytree.tree_flatten(call)
    keyed: list[tuple[Any, Any]] = pytree.tree_flatten_with_path(call)[0]
    paths = [input_path(key) for key, _ in keyed]
    shapes = _dynamic_shapes(call, paths, dynamic)
    examples = call if shapes is None else pytree.tree_map(_unmarked, call)
    try:
        exported = torch.export.export(_Call(model, loss_fn), examples, dynamic_shapes=shapes)
    except Exception as e:  # anything that the model's own code or torch.export may raise
        raise TraceError(_explain(model, e)) from e
    graph_module = _strip(exported.module(check_guards=False), leaves).train(model.training)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None  # export always records it
    outputs = returned(graph_module.graph)
    signature = Signature(
        inputs=tuple(n.name for n in graph_module.graph.find_nodes(op="placeholder")),
        paths=tuple(p for p, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, torch.Tensor)),
        constants=tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)),
        in_spec=in_spec,
        out_spec=out_spec,
        n_outputs=len(outputs),
        loss_index=_loss_index(out_spec, outputs),
        sizes=_example_sizes(graph_module, [x for x in leaves if isinstance(x, torch.Tensor)]),
    )
    return Program(graph_module, signature)


def input_path(key: tuple[Any, ...]) -> str:
    """``input_ids``, ``0``, ``0['mask']``, ``target`` from the key path within (args, kwargs, target)."""
    top, rest = key[0].idx, key[1:]
    if top == 2:
        return "target" + pytree.keystr(rest)
    first = rest[0].idx if top == 0 else rest[0].key
    return str(first) + pytree.keystr(rest[1:])


def _dynamic_shapes(call: Any, paths: list[str], dynamic: DynamicDims | None) -> Any:
    if not dynamic:
        return None
    sizes = {p: x.dim() for p, x in zip(paths, pytree.tree_leaves(call), strict=True) if isinstance(x, torch.Tensor)}
    for path, asked in dynamic.items():
        if path not in sizes:
            known = ", ".join(sizes)
            raise TraceError(f"dynamic names the input {path!r}, which is no tensor of the call; those are: {known}")
        if wrong := [d for d in asked if d not in range(sizes[path])]:
            raise TraceError(
                f"dynamic names dimension {wrong[0]} of input {path!r}, which has {sizes[path]} dimensions, from 0"
            )
    dims = iter(paths)

    def shape(leaf: Any) -> Any:
        asked = dynamic.get(next(dims))
        if asked is None or not isinstance(leaf, torch.Tensor):
            return None
        return dict.fromkeys(asked, torch.export.Dim.DYNAMIC)

    return pytree.tree_map(shape, call)


def _unmarked(leaf: Any) -> Any:
    """The same tensor as another object: torch.export marks its dynamic dimensions on the object, for good if it fails."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf


def _strip(module: fx.GraphModule, leaves: list[Any]) -> fx.GraphModule:
    """Plain placeholders for the tensor leaves, a flat output, and the model's own names (without the wrapper's ``model.``)."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            node.replace_all_uses_with(leaf)
            graph.erase_node(node)
    attributes: dict[str, Any] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = _get(module, node.target)
        node.target = node.target.removeprefix("model.")
        node._rename(node.name.removeprefix("model_"))
        attributes[node.target] = value
    for node in graph.nodes:
        if node.op == "placeholder":
            node._rename(node.name.removeprefix("kwargs_"))
            node.target = node.name
        if node.op == "output":
            node.args = (tuple(pytree.tree_leaves(node.args[0])),)
        _strip_stack(node)
    result = fx.GraphModule(attributes, graph, "Program")
    result.recompile()
    return result


def _get(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _strip_stack(node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            k: (path.removeprefix("model").removeprefix("."), kind)
            for k, (path, kind) in stack.items()
            if path.startswith("model")
        }


def _loss_index(out_spec: pytree.TreeSpec, outputs: Sequence[Any]) -> int | None:
    marked = pytree.tree_unflatten(list(range(len(outputs))), out_spec)
    if isinstance(marked, Mapping) and isinstance(marked.get("loss"), int):
        return int(marked["loss"])
    named = getattr(marked, "loss", None)
    if isinstance(named, int):
        return named
    first = outputs[0].meta["val"] if outputs and isinstance(outputs[0], fx.Node) else None
    return 0 if isinstance(first, torch.Tensor) and first.ndim == 0 and first.is_floating_point() else None


def _example_sizes(module: fx.GraphModule, tensors: list[torch.Tensor]) -> dict[str, int]:
    """The example's value of every symbol that names a dimension of an input."""
    sizes: dict[str, int] = {}
    for node, tensor in zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True):
        for dim, size in zip(node.meta["val"].shape, tensor.shape, strict=True):
            if isinstance(dim, torch.SymInt) and dim.node.expr.is_symbol:
                sizes[str(dim.node.expr)] = int(size)
    return sizes


def _explain(model: nn.Module, error: Exception) -> str:
    """What failed, where in the model, and what to do."""
    names = {id(m): n or type(model).__name__ for n, m in model.named_modules()}
    module, place = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        here = frame.f_locals.get("self")
        if id(here) in names and isinstance(here, nn.Module):
            module = f"{names[id(here)]} ({type(here).__name__})"
        code = frame.f_code
        if not code.co_filename.startswith((torch.__path__[0], __file__, "<")):
            place = f"{code.co_filename}:{line}, in {code.co_name}"
    where = f"in module {module}" if module else f"in {type(model).__name__}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return (
        f"cannot capture {type(model).__name__} as one graph: {type(error).__name__}: {reason}\n"
        f"  where: {where}{' at ' + place if place else ''}\n"
        f"  what to do: {_advice(error)}"
    )


def _advice(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "DataDependent" in text or "data-dependent" in text or "GuardOnDataDependent" in text:
        return (
            "the model branches or sizes a tensor on a value inside a tensor; write it with torch.where or torch.cond, "
            "or keep that part outside"
        )
    if isinstance(error, TypeError) and "argument" in text:
        return "the example inputs do not fit the model's forward; check their names, number and order"
    if "Constraints violated" in text:
        return "the model fixes the size of a dimension that dynamic asks to keep symbolic; leave that dimension out"
    if "shape" in text or "size" in text:
        return "run the model once on the same example inputs; if that fails too, their shapes do not fit"
    return "make the model pass torch.export.export(model, args, kwargs) with the same inputs; see the cause above"
