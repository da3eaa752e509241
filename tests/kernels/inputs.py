"""Values that formats are tried on: each class as a function of (n, generator), float32 [n]."""

import torch
from torch import Tensor


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


CLASSES = [
    normal, heavy_tail, log_uniform, one_magnitude_a_block, raw_bits, denormal, zeros, ties, huge, not_finite,
]  # fmt: skip


def every_class(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """All classes one after another, ``n`` values of each, in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([make(n, g) for make in CLASSES]).to(dtype)


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
