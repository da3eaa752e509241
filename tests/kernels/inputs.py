"""Values that formats are tried on: each class as a function of (n, generator), float32 [n]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxpipe.triton_kernels import BFPFormat, packing
from fxpipe.triton_kernels.format import OUTLIER_BIAS
from fxpipe.triton_kernels.fused import ACTIVATIONS


def normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g)


def heavy_tail(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g) / torch.rand(n, generator=g).clamp_min(1e-3) ** 2


def log_uniform(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g).sign() * torch.exp2(torch.rand(n, generator=g) * 266 - 140)


def one_magnitude_a_block(n: int, g: torch.Generator) -> Tensor:
    """Runs of 128 values of one magnitude, from far below the least shared exponent to the greatest."""
    scale = torch.exp2(torch.linspace(-140, 126, n // 128 + 1)).repeat_interleave(128)[:n]
    return torch.randn(n, generator=g).clamp(-1.9, 1.9) * scale


def raw_bits(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,), generator=g).to(torch.int32).view(torch.float32)


def denormal(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 2**23, (n,), generator=g).to(torch.int32).view(torch.float32)


def zeros(n: int, g: torch.Generator) -> Tensor:
    return torch.zeros(n) * torch.randn(n, generator=g)  # of both signs


def ties(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(-1024, 1025, (n,), generator=g) / 8.0


def huge(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g).sign() * (2.0 - torch.rand(n, generator=g)) * 2.0**127 * (1 - 2**-24)


def not_finite(n: int, g: torch.Generator) -> Tensor:
    """One value in 200 is a NaN or an infinity, of either sign."""
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    chosen = special[torch.randint(0, 4, (n,), generator=g)]
    return torch.where(torch.rand(n, generator=g) < 0.005, chosen, torch.randn(n, generator=g))


def log_uniform_half(n: int, g: torch.Generator) -> Tensor:
    """The same over what float16 holds."""
    return torch.randn(n, generator=g).sign() * torch.exp2(torch.rand(n, generator=g) * 40.9 - 25)


def tops(n: int, g: torch.Generator) -> Tensor:
    """Magnitudes at the upper end of one power of two, which rounding may take beyond the greatest code.

    Of every other 128, all are below the power of two in bfloat16 as well.
    """
    below = torch.randint(0, 2**31, (n,), generator=g) % (7 + 16 * (torch.arange(n) // 128 % 2)) + 1
    return torch.randn(n, generator=g).sign() * (2 - torch.exp2(-below.float()))


def spikes(n: int, g: torch.Generator) -> Tensor:
    """One value in 100 is 64 times as large as the others."""
    return torch.randn(n, generator=g).sign() * torch.where(torch.rand(n, generator=g) < 0.01, 80.0, 1.25)


def halfway(n: int) -> Tensor:
    """Runs of 16 with every other value halfway between two whole numbers, besides ones with odd bits; the largest is 255."""
    values = torch.full((n,), 129 / 128)
    place = torch.arange(n // 2)
    values[1::2] = (place + place // 8) % 128 + 0.5  # each of them in each place
    values[::16] = 255.0
    return values


def least_exponents(n: int, g: torch.Generator) -> Tensor:
    """Runs of 128 values of one magnitude near those of the least shared exponents, 24 and 103 + W."""
    exponents = torch.tensor([*range(-106, -100), *range(-24, -14)])
    chosen = exponents[torch.randint(0, len(exponents), (n // 128 + 1,), generator=g)]
    return torch.randn(n, generator=g).clamp(-1.9, 1.9) * torch.exp2(chosen.float()).repeat_interleave(128)[:n]


CLASSES = [
    normal, heavy_tail, log_uniform, one_magnitude_a_block, raw_bits, denormal, zeros, ties, huge, not_finite,
    log_uniform_half, tops, spikes,
    least_exponents,
]  # fmt: skip


def every_class(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """All classes one after another, ``n`` values of each, in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([make(n, g) for make in CLASSES]).to(dtype)


def classes_in_turn(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``n`` values: 128 of each class, and again, in a random order of classes that is another each time."""
    g = torch.Generator().manual_seed(seed)
    turns = n // (128 * len(CLASSES)) + 1
    rows = torch.stack([make(128 * turns, g).view(turns, 128) for make in CLASSES], dim=1)
    order = torch.stack([torch.randperm(len(CLASSES), generator=g) for _ in range(turns)])
    return rows[torch.arange(turns).unsqueeze(1), order].flatten()[:n].to(dtype)


def any_codes(planes: Sequence[Tensor], fmt: BFPFormat, g: torch.Generator) -> list[Tensor]:
    """Planes like ``planes`` with any codes, under any scales that occur.

    Of the scales one in eight is among the greatest two, and one in eight near the least values of float16, if e8.
    """
    n_codes, scale = len(fmt.group_planes), fmt.scale_kind
    bits = [torch.randint(0, 256, (p.numel() * p.itemsize,), generator=g, dtype=torch.uint8) for p in planes[:n_codes]]
    n_blocks = 8 * bits[0].numel() // (8 * fmt.group_planes[0].n_bytes) * 8 // fmt.block
    any_of = torch.randint(0, scale.nan + 1, (n_blocks,), generator=g)
    chosen = torch.randint(0, 8, any_of.shape, generator=g)
    near = 98 + any_of % 16 if scale.name == "e8" else any_of
    scales = torch.where(chosen == 0, scale.nan - any_of % 2, torch.where(chosen == 1, near, any_of))
    scales = torch.where((scales == 0) & fmt.zero_scale, 0, scales.clamp_min(scale.least))
    if scale.signed:
        scales += 128 * (chosen % 2)
    codes = [b.view(plane.dtype) for b, plane in zip(bits, planes[:n_codes], strict=True)]
    own = [planes[-1]] if fmt.codebook == "learned" else []  # levels
    behind = len(planes) - len(own)
    nan = (scales & scale.nan == scale.nan).unsqueeze(1)
    exponents = ((scales & scale.nan) + scale.base >> scale.mantissa_bits).unsqueeze(1)
    entries = list(planes[behind - (fmt.outliers > 0) : behind])  # no outliers in blocks that are NaN, and finite ones
    for place, entry in enumerate(entry.view(-1, fmt.outliers) for entry in entries):
        beyond = exponents + (entry.int() >> 12 & 15) > 254 + OUTLIER_BIAS
        entries[place] = entry.masked_fill(nan | beyond, 0).flatten()
    return [*codes, *packing.pack_scales(scales, fmt), *entries, *own]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but that all NaNs are alike."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        a.masked_fill(nan, 0).view(bits), b.masked_fill(nan, 0).view(bits)
    )


def near_activation(y: Tensor, x: Tensor, activation: str) -> bool:
    """Some roundings of float32, then one of the dtype, from the activation in float64; NaN for NaN."""
    exact = ACTIVATIONS[activation](x.double())
    bound = torch.finfo(x.dtype).eps * exact.abs() * 0.51 + 2e-6 * x.double().abs() + 1e-7
    finite = exact.isfinite() & (exact.abs() < torch.finfo(x.dtype).max)
    near = ((y.double() - exact).abs() <= bound)[finite].all()
    return bool(near) and torch.equal(y.isnan() & ~x.isinf(), x.isnan())  # at infinity torch itself varies


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, has: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """``x``, and what ``has`` names; a mask with ``kept``. Rows of several sizes, half of them far from 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g)

    size = torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=g).float())
    found: dict[str, Any] = {
        "x": ((normal(*shape) + (torch.arange(shape[0]) % 2 * 8.0).view(-1, *[1] * (len(shape) - 1))) * size)
    }
    found |= {"residual": normal(*shape) * size, "weight": normal(shape[-1]), "bias": normal(shape[-1])}
    found = {name: value.to(dtype) for name, value in found.items() if name in ("x", *has)}
    return found | ({"mask": torch.rand(shape, generator=g) > 0.25, "kept": 1 / 0.75} if "mask" in has else {})
