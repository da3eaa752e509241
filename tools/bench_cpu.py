"""How fast CPU tensors are compressed and decompressed, against ``x.clone()`` of the same bytes.

    python tools/bench_cpu.py [--mebibytes 64] [--rounds 21] [--json] [--check]

A ratio above 1 is faster than clone. Each measurement is paired with a clone just before it; ratios are medians over
the pairs. malloc is kept warm (the program starts itself again with the settings below): a clone into fresh pages takes
several times as long and flatters everything beside it. Beside other work, figures for as many threads as there are
cores mean little. ``--check`` measures ``bfp4b32`` of float32 alone, and exits with 1 where it falls short of the
bounds, or there is no native path.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import Tensor

from fxpipe.triton_kernels import BFPFormat, cpu, native

WARM_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
FORMATS = ("bfp4b32", "bfp4b32+unsigned", "bfp8b32", "bfp2b32", "bfp3b16")
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2)
BOUNDS = {("compress", 1): 1.3, ("compress", 2): 1.7, ("decompress", 1): 1.6, ("decompress", 2): 1.6}
"""For bfp4b32 of float32 on the native path, by direction and threads."""


@dataclass(frozen=True)
class Measurement:
    """One direction of one format; ``gigabytes_per_second`` of the uncompressed side, ``ratio`` against clone."""

    path: str
    dtype: str
    format: str
    threads: int
    direction: str
    ratio: float
    gigabytes_per_second: float

    @property
    def bound(self) -> float | None:
        """What ``ratio`` must reach, if anything."""
        checked = (self.path, self.dtype, self.format) == ("native", "float32", "bfp4b32")
        return BOUNDS.get((self.direction, self.threads)) if checked else None


def main() -> int:
    """Measure, print, and say whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=64, help="size of the uncompressed tensor")
    parser.add_argument("--rounds", type=int, default=21, help="pairs that each median is taken over")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--check", action="store_true", help="measure what has bounds; exit with 1 below them")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in WARM_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM_MALLOC})
    measurements = measure_all(arguments.mebibytes << 20, arguments.rounds, arguments.check)
    if arguments.json:
        rows = [asdict(measurement) for measurement in measurements]
        print(json.dumps({"malloc": WARM_MALLOC, "path": native.describe(), "measurements": rows}, indent=1))
    else:
        print(f"{arguments.mebibytes} MiB, " + " ".join(f"{name}={value}" for name, value in WARM_MALLOC.items()))
        print(f"{native.describe()}\n\n{table(measurements)}")
    short = [m for m in measurements if m.bound is not None and m.ratio < m.bound]
    for m in short:
        print(f"{m.direction} of {m.format} with {m.threads} threads: {m.ratio:.2f} < {m.bound}", file=sys.stderr)
    return int(arguments.check and (bool(short) or not native.ready()))


def measure_all(n_bytes: int, rounds: int, only_bounded: bool) -> list[Measurement]:
    """Everything that the table shows."""
    found = []
    paths = ["native", "eager"][not native.ready() : 1 if only_bounded else 2]
    formats, dtypes = (FORMATS[:1], DTYPES[:1]) if only_bounded else (FORMATS, DTYPES)
    for dtype, threads in itertools.product(dtypes, THREADS):
        torch.set_num_threads(threads)
        x = torch.randn(n_bytes // dtype.itemsize).to(dtype)
        for path, name in itertools.product(paths, formats):
            with patch.object(native, "ready", return_value=path == "native"):
                for direction, run in directions(x, BFPFormat.parse(name)).items():
                    ratio, seconds = against_clone(x, run, rounds)
                    label = str(dtype).removeprefix("torch.")
                    found.append(Measurement(path, label, name, threads, direction, ratio, n_bytes / seconds / 1e9))
    return found


def directions(x: Tensor, fmt: BFPFormat) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    values = x.relu() if fmt.unsigned else x
    planes = cpu.compress(values, fmt)
    return {
        "compress": lambda: cpu.compress(values, fmt),
        "decompress": lambda: cpu.decompress(planes, fmt, x.numel(), x.dtype),
    }


def against_clone(x: Tensor, run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """How many times as fast as ``x.clone()``, and the seconds it takes: medians."""
    pairs = [(seconds(x.clone), seconds(run)) for _ in range(rounds + 2)][2:]
    return statistics.median(clone / own for clone, own in pairs), statistics.median(own for _, own in pairs)


def seconds(run: Callable[[], object]) -> float:
    """The time that one call takes; its result is freed afterwards."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def table(measurements: list[Measurement]) -> str:
    """Formats down; directions and threads across."""
    columns = [(direction, threads) for direction in ("compress", "decompress") for threads in THREADS]
    rows: dict[tuple[str, str, str], dict[tuple[str, int], str]] = {}
    for m in measurements:
        bound = "" if m.bound is None else f" (>= {m.bound})"
        cell = f"{m.ratio:.2f}x {m.gigabytes_per_second:.1f} GB/s{bound}"
        rows.setdefault((m.path, m.dtype, m.format), {})[m.direction, m.threads] = cell
    headers = ["path", "dtype", "format", *(f"{direction}, {threads} thr." for direction, threads in columns)]
    return tabulate([[*key, *(cells[column] for column in columns)] for key, cells in rows.items()], headers=headers)


if __name__ == "__main__":
    sys.exit(main())
