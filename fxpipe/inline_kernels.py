"""The last step before Inductor, on GPUs: operators of fxpipe become calls of their Triton kernels, which Inductor inlines.

Where only loops of Inductor's read a decoded value, it becomes plain operators instead, which Inductor fuses into those
loops (``fused_consumers``).

Inductor's own post-grad pass, so that every pass before it, ours and Inductor's, sees one node for one stored value. Formats
without a kernel, and all values on other devices, stay the operators that they are.
"""

import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fxpipe.graph_module import describe, returned
from fxpipe.saves import fused_consumers, value_facts
from fxpipe.triton_kernels import fused, norms, ops
from fxpipe.triton_kernels.codec import DEVICES
from fxpipe.triton_kernels.format import BFPFormat

aten = torch.ops.aten

Function = Callable[..., Any]
KERNELS: dict[Any, Function] = {
    torch.ops.fxpipe.bfp_compress.default: ops.compress_on_gpu,
    torch.ops.fxpipe.bfp_decompress.default: ops.decompress_on_gpu,
    torch.ops.fxpipe.produce_and_compress.default: fused.on_gpu,
    torch.ops.fxpipe.norm_and_compress.default: norms.on_gpu,
}


def with_inlined_kernels() -> dict[str, Any]:
    """Inductor's option that runs ``InlineKernels``, after the passes that its user has put there."""
    return {"post_grad_custom_post_pass": [*get_custom_graph_passes(inductor_config.post_grad_custom_post_pass), _PASS]}


class InlineKernels(CustomGraphPass):
    """Puts the Triton call, traced from the code that launches it, in the place of each operator that has a kernel.

    Or the operators of ``open_decoding``. Changes no value.

    Before::

        compress_relu = fxpipe.bfp_compress(relu, 'bfp4b32', [0, 1])
        relu_code32 = compress_relu[0]; relu_exponent = compress_relu[1]

    After::

        view = aten.view(relu, [4096]); empty = aten.empty([512]); empty_1 = aten.empty([128])
        stored = triton_kernel_wrapper_functional(kernel_idx=0, ..., kwargs={'x_ptr': view, 'code32_ptr': empty, ...})
        relu_code32 = stored['code32_ptr']; relu_exponent = stored['scale_ptr']
    """

    def __call__(self, graph: fx.Graph) -> None:
        traced: dict[tuple[str, Function], fx.Graph] = {}
        for node in [n for target in KERNELS for n in graph.find_nodes(op="call_function", target=target)]:
            if (function := _function(node)) is not None:
                key = _layout(node), function
                traced[key] = traced.get(key) or _trace(node, function)
                _inline(node, traced[key])

    def uuid(self) -> bytes:
        """What the result depends on besides the graph: the sources that decide, and those of the kernels."""
        return _hash_of_sources()


_PASS = InlineKernels()


@cache
def _hash_of_sources() -> bytes:
    deciding = (__file__, fused_consumers.__file__, value_facts.__file__)
    return get_hash_for_files((*deciding, *sorted(map(str, Path(ops.__file__).parent.glob("*.py")))))


def _function(node: fx.Node) -> Function | None:
    """What is traced in the place of the node; nothing leaves it one node."""
    if not all(v.device.type in DEVICES for v in _tensors_read(node)):
        return None
    if node.target is torch.ops.fxpipe.bfp_decompress.default and fused_consumers.decodes_in_loops(node):
        return ops.decompress_in_operators
    return KERNELS[node.target] if _has_kernel(node) else None


def _tensors_read(node: fx.Node) -> list[torch.Tensor]:
    values = (n.meta["val"] for n in node.all_input_nodes)
    return [value for value in values if isinstance(value, torch.Tensor)]


def _has_kernel(node: fx.Node) -> bool:
    """In a format with a kernel that needs no number of the values themselves; not concatenated too.

    A part of a whole may start where no kernel can.
    """
    fmt = BFPFormat.parse(str(node.args[1]))
    if node.target is torch.ops.fxpipe.bfp_compress.default and fmt.codebook == "learned":
        return False
    return not any(map(_concatenated, node.all_input_nodes))


def _concatenated(node: fx.Node) -> bool:
    return any(user.target is aten.cat.default for user in node.users)


def _layout(node: fx.Node) -> str:
    """Equal for nodes that are traced alike."""

    def text(argument: fx.Node) -> str:
        val = argument.meta["val"]
        if not isinstance(val, torch.Tensor):
            return str(val)
        return f"{val.dtype} {val.shape} {val.stride()} {val.storage_offset()} {val.device}"

    return str((node.target, fx.map_arg((node.args, node.kwargs), text)))


def _trace(node: fx.Node, function: Function) -> fx.Graph:
    """The graph of ``function`` in the place of the node; its placeholders are ``node.all_input_nodes``, without repeats."""
    inputs = node.all_input_nodes

    def run(*values: Any) -> list[Any]:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return pytree.tree_leaves(function(*args, **kwargs))

    with _fake_mode(node):
        made = make_fx(functionalize(run), select_decomp_table())(*(n.meta["val"] for n in inputs))
    made.graph.eliminate_dead_code()
    return made.graph


def _inline(node: fx.Node, traced: fx.Graph) -> None:
    """Copies ``traced`` in front of the node, with values of its own, and puts its results in the node's place."""
    copies = dict(zip(traced.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with _fake_mode(node), node.graph.inserting_before(node):
        for step in traced.nodes:
            if step.op == "call_function":
                args, kwargs = fx.map_arg((step.args, step.kwargs), copies.__getitem__)
                name = f"{node.name}_{step.name}"
                copies[step] = node.graph.call_function(step.target, args, kwargs, name=name)
                args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
                describe(copies[step], node, step.target(*args, **kwargs))
    results: Any = [copies[r] for r in returned(traced)]
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _fake_mode(node: fx.Node) -> FakeTensorMode:
    mode: FakeTensorMode = pytree.tree_leaves(node.meta["val"])[0].fake_mode
    return mode
