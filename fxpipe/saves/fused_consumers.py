"""On GPUs a stored value is decoded inside the loops that read it, where that moves fewer bytes for certain."""

from collections.abc import Iterator

import torch
import torch.fx as fx

from fxpipe.saves.value_facts import view_source
from fxpipe.triton_kernels.format import BFPFormat
from fxpipe.triton_kernels.open_decoding import why_not_open


def decodes_in_loops(decompress: fx.Node) -> bool:
    """Whether Inductor will fuse the operators of ``open_decoding`` into everything that reads the decoded value.

    Where value by value is computed from it until something is in memory anyway, because a matrix product, a convolution
    or the like reads it, or the graph returns it: an activation's backward, or its recomputation. Otherwise the kernel of
    ``fxpipe::bfp_decompress`` writes the value: where it is itself read like that; where sums are taken of what is computed
    from it, as in a norm's backward, since Inductor then puts a product of some thirty operators into memory, in float32,
    rather than compute it twice; and in float16, of which loops would see more bits than it has, as Inductor leaves out
    conversions between them.

    Not on CPUs: there the C kernel and then a loop take as long as one loop for both, or less, for an activation's backward.
    """
    value: torch.Tensor = decompress.meta["val"]
    if value.dtype == torch.float16 or why_not_open(BFPFormat.parse(str(decompress.args[1]))):
        return False
    readers = set(_readers(decompress))
    return bool(readers) and all(map(_is_pointwise, readers)) and not any(map(_is_summed, _only_in_loops(readers)))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _readers(user) if view_source(user) is node else (user,)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_summed(node: fx.Node) -> bool:
    return not all(map(_is_pointwise, _readers(node)))


def _only_in_loops(nodes: set[fx.Node]) -> Iterator[fx.Node]:
    """These pointwise nodes and those computed from them value by value, as far as none has to be in memory."""
    waiting, seen = list(nodes), set(nodes)
    while waiting:
        node = waiting.pop()
        readers = set(_readers(node))
        if all(map(_is_loop, readers)):
            yield node
            more = {r for r in readers if _is_pointwise(r)} - seen
            seen |= more
            waiting += more


def _is_loop(node: fx.Node) -> bool:
    return _is_pointwise(node) or torch.Tag.reduction in getattr(node.target, "tags", ())
