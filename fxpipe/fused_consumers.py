"""On GPUs a stored value is decoded inside the loops that read it, where all that read it are loops of Inductor's."""

from collections.abc import Iterator

import torch
import torch.fx as fx

from fxpipe.triton_kernels.format import BFPFormat
from fxpipe.triton_kernels.open_decoding import why_not_open
from fxpipe.value_facts import view_source


def decodes_in_loops(decompress: fx.Node) -> bool:
    """Whether Inductor will fuse the operators of ``open_decoding`` into everything that reads the decoded value.

    Not where a matrix product, a convolution or anything else from a library reads it, or the graph returns it: the value
    must be in memory then, and the kernel of ``fxpipe::bfp_decompress`` writes it faster. Nor in float16: loops would see
    more bits than it has, as Inductor leaves out conversions between them.
    """
    value: torch.Tensor = decompress.meta["val"]
    if value.dtype == torch.float16 or why_not_open(BFPFormat.parse(str(decompress.args[1]))):
        return False
    readers = list(_readers(decompress))
    return bool(readers) and all(map(_is_loop, readers))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _readers(user) if view_source(user) is node else (user,)


def _is_loop(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags
