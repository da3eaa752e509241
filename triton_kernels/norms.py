"""The operator ``fxpipe::norm_and_compress``: a norm, and its input, its output or both stored, as one node.

Importing this module registers it. What it is, on every device: sum, norm and ``fxpipe::bfp_compress`` in torch's operators
(``by_definition``). CUDA and HIP tensors go to one Triton kernel (``norm_kernels``): the sum is equal bit for bit, the planes
are those of the sum and of the output as it writes them, bit for bit too, and the output is within a rounding of the other: its
sums over a row are taken in another order.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch.library has no types)

from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import has_one_outlier, why_not_fused
from .format import BFPFormat

_LIBRARY = torch.library.Library("fxpipe", "FRAGMENT")
_LIBRARY.define(
    "norm_and_compress(Tensor[] inputs, str format, Tensor? weight, Tensor? bias, Tensor? mask, float kept, str norm,"
    " float eps, str stored) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
NORMS = ("layer", "rms")
MOST_BYTES = 16384
"""Of a row, filled up to a power of two, in the kernel: eight warps hold that many."""
STORED = ("input", "output", "both")


def why_no_norm_kernel(fmt: BFPFormat, dtype: torch.dtype, width: int) -> str:
    """What of rows of ``width`` values of that dtype, stored in ``fmt``, the kernel does not know."""
    padded = 1 << max(width - 1, 0).bit_length()
    known = width % max(fmt.block, 32) == 0 and 0 < padded * dtype.itemsize <= MOST_BYTES
    if fmt.outliers and not has_one_outlier(fmt):
        return "outliers (but for one that is simply the largest value)"
    return "" if known else f"rows of {width} values"


def by_definition(
    inputs: Sequence[Tensor],
    format: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    kept: float,
    norm: str,
    eps: float,
    stored: str,
) -> list[Tensor]:
    """The norm over the last dimension of ``inputs[0]`` [..., width], or of its sum with ``inputs[1]``, a residual.

    Values: float32, bfloat16 or float16, contiguous. ``norm``: ``layer`` or ``rms`` (Zhang and Sennrich 2019); ``weight`` and
    ``bias`` [width]. ``mask``: bools of the same shape; of ``inputs[0]`` times the mask times ``kept`` the sum is taken, as
    dropout has it. ``stored``: the norm's ``input``, its ``output`` or ``both``, in ``format``.

    Returns, in this order: with a residual the sum; the norm's output; for ``layer`` the mean; the reciprocal deviation
    (both float32 [..., 1]); with a mask its bits, as ``fxpipe::pack_bools`` makes them;
    planes of the input; planes of the output.

    Raises:
        ValueError: ``norm`` or ``stored`` is another, or there is a mask and no residual.
    """
    _check(inputs, mask, norm, stored)
    x = inputs[0] if mask is None else inputs[0] * mask * kept
    found = [inputs[1] + x] if len(inputs) > 1 else []
    x = (found or [x])[0]
    y, *statistics = _normalised(x, norm, eps)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    bits = [] if mask is None else [torch.ops.fxpipe.pack_bools(mask)]
    order = list(range(x.dim()))
    values = {"input": [x], "output": [y], "both": [x, y]}[stored]
    planes = [plane for value in values for plane in torch.ops.fxpipe.bfp_compress(value, format, order)]
    return [*found, y, *statistics, *bits, *planes]


def on_gpu(
    inputs: Sequence[Tensor],
    format: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    kept: float,
    norm: str,
    eps: float,
    stored: str,
) -> list[Tensor]:
    """The same in one pass over memory; by definition where the kernel does not know it."""
    from . import norm_launch

    _check(inputs, mask, norm, stored)
    fmt, shape = BFPFormat.parse(format), inputs[0].shape
    if why_not_fused(fmt) or why_no_norm_kernel(fmt, inputs[0].dtype, int(shape[-1])):
        return by_definition(inputs, format, weight, bias, mask, kept, norm, eps, stored)
    there = {
        "residual": len(inputs) > 1,
        "mask": mask is not None,
        "weight": weight is not None,
        "bias": bias is not None,
    }
    which = norm_launch.Norm(norm, eps, int(shape[-1]), tuple(name for name in there if there[name]), kept)
    made = norm_launch.norm_and_compress([x.contiguous() for x in inputs], weight, bias, mask, which, fmt, stored)
    n_values, n_statistics = 1 + there["residual"], 1 + (norm == "layer")
    values, rest = made[:n_values], made[n_values:]
    statistics = [s.view(*shape[:-1], 1) for s in rest[:n_statistics]]
    return [*(value.view(shape) for value in values), *statistics, *rest[n_statistics:]]


def _normalised(x: Tensor, norm: str, eps: float) -> list[Tensor]:
    x = x.float()
    if norm == "rms":
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return [x * rstd, rstd]
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return [(x - mean) * rstd, mean, rstd]


def _check(inputs: Sequence[Tensor], mask: Tensor | None, norm: str, stored: str) -> None:
    for name, found, known in (("norm", norm, NORMS), ("stored", stored, STORED)):
        if found not in known:
            raise ValueError(f"fxpipe::norm_and_compress: unknown {name} {found!r}; known: {', '.join(known)}")
    if mask is not None and (len(inputs) < 2 or inputs[0].dtype == torch.float32):
        raise ValueError(
            "fxpipe::norm_and_compress: a mask is for 16-bit values that a residual is added to; found "
            f"{len(inputs) - 1} residuals and values of {inputs[0].dtype}"
        )


_LIBRARY.impl("norm_and_compress", by_definition, "CPU")
_LIBRARY.impl("norm_and_compress", on_gpu, "CUDA")
torch.library.register_fake("fxpipe::norm_and_compress", by_definition, lib=_LIBRARY)
