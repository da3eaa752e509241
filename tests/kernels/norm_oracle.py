"""What ``fxpipe::norm_and_compress`` must return: the norm in float64, sums, bits and planes bit for bit."""

from collections.abc import Sequence
from typing import Any

import torch
from kernels.inputs import same
from torch import Tensor

from fxpipe.triton_kernels import BFPFormat, ops, reference  # noqa: F401  (``ops`` registers ``pack_bools``)

EPS = 1e-5


def check(made: Sequence[Tensor], inputs: dict[str, Any], norm: str, text: str, stored: str) -> None:
    """Sum, mask and planes to the bit, the norm within a bound of float64."""
    fmt, made = BFPFormat.parse(text), [m.flatten() for m in made]
    x = inputs["x"] if "mask" not in inputs else inputs["x"] * inputs["mask"] * inputs["kept"]
    if "residual" in inputs:
        x = inputs["residual"] + x
        assert same(made.pop(0), x.flatten())
    y, *statistics = (made.pop(0) for _ in range(3 if norm == "layer" else 2))
    y, statistics = y.view(x.shape), [s.view(*x.shape[:-1], 1) for s in statistics]
    assert near_norm(y, statistics, x, inputs.get("weight"), inputs.get("bias"), norm, EPS)
    if "mask" in inputs:
        assert same(made.pop(0), torch.ops.fxpipe.pack_bools(inputs["mask"]))
    values = {"input": [x], "output": [y], "both": [x, y]}[stored]
    expected = [plane for value in values for plane in reference.compress(value.flatten(), fmt)]
    assert len(made) == len(expected)
    assert all(map(same, made, expected))


def near_norm(
    y: Tensor,
    statistics: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> bool:
    """Output and float32 statistics within roundings of the norm in float64.

    A sum of float32 over a row errs by at most so many units in the last place of the sum of magnitudes as it has halvings:
    with 13 and the few operations after it, 32 units (2^-19) relative to the largest magnitude of the row, and a rounding of y.
    """
    wide = x.double()
    mean = wide.mean(-1, keepdim=True) if norm == "layer" else torch.zeros(())
    rstd = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    scale = 1.0 if weight is None else weight.double()
    shift = 0.0 if bias is None else bias.double()
    exact = (wide - mean) * rstd * scale + shift
    unit, largest = 2.0**-19, wide.abs().amax(-1, keepdim=True)
    bound = unit * (largest * rstd * abs(scale) + abs(shift)) + 0.51 * torch.finfo(y.dtype).eps * exact.abs()
    bound = bound + torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    near = ((y.double() - exact).abs() <= bound).all() and ((statistics[-1] - rstd).abs() <= 16 * unit * rstd).all()
    if norm == "layer":
        near = near and ((statistics[0] - mean).abs() <= unit * largest).all()
    return bool(near) and all(s.dtype == torch.float32 for s in statistics)
