"""On GPUs, where Inductor follows, a norm and the storing of its input or output become one node, with the sum before it."""

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxpipe.graph_module import describe
from fxpipe.saves.in_memory import flat_alike, is_in_memory, is_plain_sum, is_written, lie_alike, readers
from fxpipe.saves.norm_patterns import FoundDropout, FoundNorm, found_dropout, found_norms
from fxpipe.saves.value_facts import storage_of
from fxpipe.triton_kernels.codec import DEVICES, why_not_fused
from fxpipe.triton_kernels.format import DTYPES, BFPFormat
from fxpipe.triton_kernels.norms import why_no_norm_kernel

aten = torch.ops.aten


def fuse_norms(forward: fx.Graph) -> None:
    """Fuses each layer norm and RMS norm whose input or output is stored, where that moves fewer bytes; edits in place.

    Outputs differ from torch's by a rounding, as Inductor's do: for graphs that Inductor compiles. What moves for each 16-bit
    value of a pre-norm block's residual stream in 4 bits, counted on the graphs that lowering makes of one. In
    ``torch.compile`` and wherever a norm is written out, backward computes its output again, and the sum alone is stored;
    in a plan a layer norm is one operator, and both are. Inductor computes sum and norm in one kernel, and what is stored is
    read once more:

        stored                    by Inductor and compress              in one kernel
        sum                       4 + 4 + 2.53 = 10.5                   4 + 4 + 0.53 = 8.5
        sum, output               4 + 4 + 2 * 2.53 = 13.1               4 + 4 + 2 * 0.53 = 9.1
        sum; dropout, its mask    4 + 5 + 2.53 + 5.1 = 16.7             1 (the mask) + 5 + 4 + 0.66 = 10.7
        both; dropout, its mask   4 + 5 + 2 * 2.53 + 5.1 = 19.2         1 + 5 + 4 + 1.19 = 11.2
        input, output, no sum     2 + 2 + 2 * 2.53 = 9.1                2 + 2 + 2 * 0.53 = 5.1

    5.1 is what packing a mask's bits takes in torch's operators: 1 for reading it, the rest for int64 words of 8. The mask is
    drawn as before, by what draws it; where it is written already, the dropped values are not. The mean and the reciprocal
    deviation are kept in float32 in either case, 8 bytes a row.

    Where the input comes from another loop of Inductor's, to read it again costs what storing one value saves.

    Before::

        add = aten.add(view, view_1)
        norm = aten.native_layer_norm(add, [256], w, b, 1e-05); y = norm[0]; mean = norm[1]; rstd = norm[2]
        compress_add = fxpipe.bfp_compress(add, 'bfp4b32', [0, 1, 2])
        add_code32 = compress_add[0]; add_exponent = compress_add[1]

    After::

        norm_y = fxpipe.norm_and_compress([view_1, view], 'bfp4b32', w, b, None, 1.0, 'layer', 1e-05, 'input')
        add = norm_y[0]; y = norm_y[1]; mean = norm_y[2]; rstd = norm_y[3]
        add_code32 = norm_y[4]; add_exponent = norm_y[5]
    """
    for norm in list(found_norms(forward)):
        if _fits(norm) and (stores := _stores(norm)):
            summed = _summed(norm)
            if len(stores) > (summed.residual is None and not is_in_memory(norm.x)):
                _fuse(norm, summed, stores)


@dataclass(frozen=True)
class _Summed:
    """What the norm's kernel reads: ``x``, or with a ``residual`` both, perhaps with a dropout of ``x``."""

    x: fx.Node
    residual: fx.Node | None = None
    dropout: FoundDropout | None = None


def _fits(norm: FoundNorm) -> bool:
    """On a GPU, without gaps, of one dtype, statistics in float32; and the output is written anyway."""
    x, y = norm.x.meta["val"], norm.y.meta["val"]
    parameters = [n for n in (norm.weight, norm.bias) if n is not None]
    statistics = [n.meta["val"] for n in (norm.mean, norm.rstd) if n is not None]
    return (
        x.device.type in DEVICES
        and str(x.dtype).removeprefix("torch.") in DTYPES
        and lie_alike(x, y)
        and x.is_contiguous()
        and isinstance(x.shape[-1], int)
        and all(n.op in ("placeholder", "get_attr") and n.meta["val"].dtype == x.dtype for n in parameters)
        and all(n.meta["val"].is_contiguous() for n in parameters)
        and all(s.dtype == torch.float32 and s.shape == (*x.shape[:-1], 1) for s in statistics)
        and is_written(norm.y)
    )


def _stores(norm: FoundNorm) -> dict[str, fx.Node]:
    """The nodes that store the norm's ``input`` and its ``output``, in one format that its kernel knows."""
    found = {"input": _stored(norm.x), "output": _stored(norm.y)}
    stores = {name: node for name, node in found.items() if node is not None and _has_kernel(node, norm)}
    if len({str(node.args[1]) for node in stores.values()}) > 1:
        del stores["output"]
    return stores


def _stored(node: fx.Node) -> fx.Node | None:
    for reader in readers(storage_of(node)):
        value = reader.args[0] if reader.target is torch.ops.fxpipe.bfp_compress.default else None
        if not isinstance(value, fx.Node) or not flat_alike(value.meta["val"], node.meta["val"]):
            continue
        if reader.args[2] == list(range(value.meta["val"].dim())):
            return reader
    return None


def _has_kernel(compress: fx.Node, norm: FoundNorm) -> bool:
    fmt, x = BFPFormat.parse(str(compress.args[1])), norm.x.meta["val"]
    return not (why_not_fused(fmt) or why_no_norm_kernel(fmt, x.dtype, x.shape[-1]))


def _summed(norm: FoundNorm) -> _Summed:
    if not is_plain_sum(norm.x):
        return _Summed(norm.x)
    pair = norm.x.all_input_nodes if len(norm.x.all_input_nodes) == 2 else norm.x.all_input_nodes * 2
    like = norm.x.meta["val"]
    if not all(lie_alike(n.meta["val"], like) for n in pair):
        return _Summed(norm.x)
    pair = [_uncopied(n) for n in pair]
    for x, residual in itertools.permutations(pair):
        dropout = found_dropout(x)
        if dropout and _pays(dropout, x, like) and _is_there(residual):
            return _Summed(dropout.x, residual, dropout)
    return _Summed(pair[1], pair[0]) if all(map(_is_there, pair)) else _Summed(norm.x)


def _uncopied(node: fx.Node) -> fx.Node:
    """What a copy copies that only the sum reads, as a dropout of nothing is."""
    source = node.args[0] if node.target is aten.clone.default and len(node.users) == 1 else None
    return source if isinstance(source, fx.Node) and lie_alike(source.meta["val"], node.meta["val"]) else node


def _is_there(node: fx.Node) -> bool:
    return is_in_memory(node) or is_written(node)


def _pays(dropout: FoundDropout, product: fx.Node, like: torch.Tensor) -> bool:
    """Only the sum reads the product, and the mask is written anyway. Of float32 the bits of the sum would not be eager's."""
    mask = dropout.mask.meta["val"]
    return (
        like.dtype != torch.float32
        and len(product.users) == 1
        and lie_alike(dropout.x.meta["val"], like)
        and mask.shape == like.shape
        and mask.is_contiguous()
        and is_written(dropout.mask)
        and _is_there(dropout.x)
    )


def _fuse(norm: FoundNorm, summed: _Summed, stores: dict[str, fx.Node]) -> None:
    at, dropout = norm.first if summed.residual is None else norm.x, summed.dropout
    inputs = [summed.x, *([summed.residual] if summed.residual else [])]
    mask, kept = (dropout.mask, dropout.kept) if dropout else (None, 1.0)
    format, stored = next(iter(stores.values())).args[1], "both" if len(stores) == 2 else next(iter(stores))
    arguments: tuple[Any, ...] = (inputs, format, norm.weight, norm.bias, mask, kept, norm.kind, norm.eps, stored)
    target = torch.ops.fxpipe.norm_and_compress.default
    with at.graph.inserting_before(at):
        fused = at.graph.call_function(target, arguments, name=f"norm_{norm.y.name}")
    describe(fused, norm.y, target(*fx.map_arg(arguments, lambda n: n.meta["val"])))
    packs: list[fx.Node | None] = (
        [n for n in mask.users if n.target is torch.ops.fxpipe.pack_bools.default] if mask else []
    )
    for pack in filter(None, packs):
        fused.append(pack)
    results: list[list[fx.Node | None]] = [[norm.x]] if summed.residual else []
    results += [[norm.y], *([[norm.mean]] if norm.kind == "layer" else []), [norm.rstd], *([packs] if mask else [])]
    results += [
        [plane] for name in sorted(stores) for plane in sorted(stores[name].users, key=operator.attrgetter("args"))
    ]
    steps = (*norm.steps, *(dropout.steps if dropout else ()))
    for index, nodes in enumerate(results):
        for node in filter(None, nodes):
            node.target, node.args, node.kwargs = operator.getitem, (fused, index), {}
    _erase_unread((*steps, *stores.values(), *itertools.chain.from_iterable(results)))


def _erase_unread(nodes: tuple[fx.Node | None, ...]) -> None:
    """The nodes that nothing reads any more, the last first."""
    for node in sorted({n for n in nodes if n is not None}, reverse=True):
        if not node.users:
            node.graph.erase_node(node)
