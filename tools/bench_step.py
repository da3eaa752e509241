"""The time of a compiled training step whose saves are compressed, beside that of the same step with plain Inductor.

    python tools/bench_step.py [--model mlp ...] [--format bfp4b32] [--rounds 31] [--cold] [--json] [--check]

A step is forward, backward and SGD of the whole model through ``torch.compile``. Both steps run in this process, in turn, the
first of each pair by chance; a ratio is the median over the pairs. malloc is kept warm (the program starts itself again with
``WARM_MALLOC``): else each step's memory comes as fresh pages, and compression, which takes fewer, looks better than it is;
``--cold`` shows that. The models are those of the bounds in issue 3: they are small, so that each call costs what it costs.
``--check`` exits with 1 where a ratio exceeds its bound.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxpipe.ir.compression import CompressionPlan

WARM_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
MOST = {"transformer block": 1.03, "mlp": 1.03, "cnn, channels last": 1.03, "cnn, nchw": 1.05}
"""The most that a step may take, of a plain one."""

Model = tuple[nn.Module, Tensor]

_PLANS: list[CompressionPlan] = []


@dataclass(frozen=True)
class Figure:
    """Times of a step, medians; ``ratio`` the median over pairs, ``low`` and ``high`` its quartiles."""

    model: str
    plain_seconds: float
    compressed_seconds: float
    ratio: float
    low: float
    high: float
    saved_ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= MOST[self.model]


class Block(nn.Module):
    """A transformer's block, normalised first."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.first(x)).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.second(x))


def transformer_block() -> Model:
    return Block(384, 6), torch.randn(8, 256, 384)


def mlp() -> Model:
    widths = (512, 1024, 1024, 512)
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1]), torch.randn(2048, 512)


def cnn(memory_format: torch.memory_format) -> Model:
    layers: list[nn.Module] = []
    for before, channels in ((3, 32), (32, 64), (64, 128)):
        layers += nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return model.to(memory_format=memory_format), torch.randn(32, 3, 32, 32).to(memory_format=memory_format)


MODELS: dict[str, Callable[[], Model]] = {
    "transformer block": transformer_block,
    "mlp": mlp,
    "cnn, channels last": lambda: cnn(torch.channels_last),
    "cnn, nchw": lambda: cnn(torch.contiguous_format),
}


def trainer(name: str, **setting: Any) -> Callable[[], None]:
    """One step of a model of its own, compiled with ``setting``."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    compiled = torch.compile(model, **setting)

    def step() -> None:
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()

    return step


def measure(name: str, format: str, rounds: int) -> Figure:
    """Both steps in turn."""
    steps = [
        trainer(name, backend="inductor"),
        trainer(name, backend="fxpipe", options={"format": format, "on_plan": _PLANS.append}),
    ]
    for step in steps * 5:
        step()
    pairs = [_pair(steps) for _ in range(rounds)]
    plain, compressed = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, ratio, high = statistics.quantiles((b / a for a, b in pairs), n=4)
    saved_ratio = _PLANS[-1].raw_bytes / _PLANS[-1].stored_bytes
    return Figure(name, plain, compressed, ratio, low, high, saved_ratio)


def _pair(steps: list[Callable[[], None]]) -> tuple[float, float]:
    times = [0.0, 0.0]
    for index in random.sample((0, 1), 2):
        start = time.perf_counter()
        steps[index]()
        times[index] = time.perf_counter() - start
    return times[0], times[1]


def _row(figure: Figure) -> list[Any]:
    bound = MOST[figure.model]
    times = (f"{figure.plain_seconds * 1e3:.1f} ms", f"{figure.compressed_seconds * 1e3:.1f} ms")
    spread = f"{figure.low:.3f} to {figure.high:.3f}"
    return [
        figure.model,
        *times,
        f"{figure.ratio:.3f}",
        spread,
        bound,
        "ok" if figure.passed else "MISSED",
        f"{figure.saved_ratio:.2f}x",
    ]


def main() -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; all without it")
    parser.add_argument("--format", default="bfp4b32")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cold", action="store_true", help="leave malloc as it is")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is exceeded")
    chosen = parser.parse_args()
    if not chosen.cold and any(os.environ.get(name) != value for name, value in WARM_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM_MALLOC})
    found = [measure(name, chosen.format, chosen.rounds) for name in chosen.model or MODELS]
    if chosen.json:
        print(json.dumps([{**asdict(f), "bound": MOST[f.model], "passed": f.passed} for f in found], indent=2))
    else:
        print(f"{chosen.format}, {torch.get_num_threads()} threads, {'cold' if chosen.cold else 'warm'} malloc")
        headers = ["model", "plain", "compressed", "ratio", "quartiles", "at most", "", "saved bytes"]
        print(tabulate(map(_row, found), headers, disable_numparse=True))
    return int(chosen.check and not all(f.passed for f in found))


if __name__ == "__main__":
    sys.exit(main())
