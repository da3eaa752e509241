"""How fast CPU tensors are compressed and decompressed, against ``x.clone()`` of the same bytes.

    python tools/bench_cpu.py [--mebibytes 64] [--rounds 21] [--json] [--check]

A ratio above 1 is faster than clone; stochastic rounding stands beside ``bfp4b32`` too, whose time it may exceed by a
tenth. Each measurement is paired with one of what it is held against, just before it; ratios are medians over the pairs.
malloc is kept warm (the program starts itself again with the settings below): a clone into fresh pages takes several times
as long and flatters everything beside it. Beside other work, figures for as many threads as there are cores mean little.
``--check`` measures what has bounds alone, and exits with 1 where it falls short of them, or there is no native path.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from tabulate import tabulate
from torch import Tensor

from fxpipe.triton_kernels import BFPFormat, cpu, jitted, native

WARM_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PLAIN = ("bfp4b32", "bfp4b32+unsigned", "bfp8b32", "bfp2b32", "bfp3b16")
FORMATS = (
    *PLAIN, "bfp4b32+e5m3", "bfp4b16+e5m3", "bfp4b32+hash", "bfp4b32+sr", "bfp4b32:gauss+e5m3", "bfp4b32:gauss+unsigned+e5m3",
    "bfp3b32:gauss+se5m2", "bfp4b32:gauss+e5m3+search", "bfp4b32+o1", "bfp4b32+dither",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2)
NEAREST, STOCHASTIC = "bfp4b32", ("bfp4b32+hash", "bfp4b32+sr")
BOOLS = "8 bools a byte"
WITHOUT_COMPILER = "numba" if jitted.ready(BFPFormat.parse(NEAREST)) else "eager"
BOUNDS = {
    ("native", "float32", NEAREST, "compress"): (1.3, 1.7),
    ("native", "float32", NEAREST, "decompress"): (1.6, 1.6),
    (WITHOUT_COMPILER, "float32", NEAREST, "compress"): (0.65, 0.8),
    **{("native", "float32", name, "against nearest"): (1 / 1.1, 1 / 1.1) for name in STOCHASTIC},
    **{("native", "bool", BOOLS, direction): (0.4, 0.4) for direction in ("compress", "decompress")},
}
"""What ratios must reach with 1 and with 2 threads, by path, dtype, format and direction."""
SEED = torch.tensor(1)


@dataclass(frozen=True)
class Measurement:
    """One direction of one format; ``gigabytes_per_second`` of the uncompressed side, ``ratio`` against clone (or nearest)."""

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
        bounds = BOUNDS.get((self.path, self.dtype, self.format, self.direction))
        return bounds[THREADS.index(self.threads)] if bounds else None


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
        load = " ".join(f"{average:.1f}" for average in os.getloadavg())
        print(
            f"{arguments.mebibytes} MiB, load {load}, "
            + " ".join(f"{name}={value}" for name, value in WARM_MALLOC.items())
        )
        print(f"{native.describe()}\n\n{table(measurements)}")
    short = [m for m in measurements if m.bound is not None and m.ratio < m.bound]
    for m in short:
        print(
            f"{m.path} {m.direction} of {m.format} with {m.threads} threads: {m.ratio:.2f} < {m.bound:.2f}",
            file=sys.stderr,
        )
    return int(arguments.check and (bool(short) or not native.ready()))


def measure_all(n_bytes: int, rounds: int, only_bounded: bool) -> list[Measurement]:
    """Everything that the table shows."""
    found = []
    paths = [path for path, there in (("native", native.ready()), ("numba", WITHOUT_COMPILER == "numba")) if there]
    known = jitted.ready
    for threads, path in itertools.product(THREADS, [*paths, "eager"]):
        torch.set_num_threads(threads)
        without = patch.object(jitted, "ready", side_effect=known if path == "numba" else lambda _: False)
        with patch.object(native, "ready", return_value=path == "native"), without:
            for dtype, name, runs in subjects(n_bytes, path, only_bounded):
                for direction, (base, run) in runs.items():
                    ratio, seconds = against(base, run, rounds)
                    found.append(Measurement(path, dtype, name, threads, direction, ratio, n_bytes / seconds / 1e9))
    return found


Runs = dict[str, tuple[Callable[[], object], Callable[[], object]]]
"""By direction: what is held against, and what is timed."""


def subjects(n_bytes: int, path: str, only_bounded: bool) -> Iterator[tuple[str, str, Runs]]:
    """Dtype, format and runs of all that is measured on a path."""
    for dtype in DTYPES[:1] if only_bounded else DTYPES:
        x = torch.randn(n_bytes // dtype.itemsize).to(dtype)
        for name in formats_of(path, only_bounded):
            yield str(dtype).removeprefix("torch."), name, directions(x, BFPFormat.parse(name))
    if path == "native":
        yield "bool", BOOLS, bools(torch.rand(n_bytes) < 0.5)


def formats_of(path: str, only_bounded: bool) -> tuple[str, ...]:
    """Without a kernel, formats that are not plain go by the definition, which is timed nowhere."""
    if only_bounded:
        return (NEAREST, *STOCHASTIC) if path == "native" else (NEAREST,)
    return {"native": FORMATS, "numba": (*PLAIN, "bfp4b32+e5m3")}.get(path, PLAIN)


def directions(x: Tensor, fmt: BFPFormat) -> Runs:
    """Of a format."""
    values = x.relu() if fmt.unsigned else x
    planes = cpu.compress(values, fmt, SEED)
    runs: Runs = {
        "compress": (values.clone, lambda: cpu.compress(values, fmt, SEED)),
        "decompress": (values.clone, lambda: cpu.decompress(planes, fmt, x.numel(), x.dtype, SEED)),
    }
    if str(fmt) in STOCHASTIC:
        runs["against nearest"] = (lambda: cpu.compress(values, BFPFormat.parse(NEAREST)), runs["compress"][1])
    return runs


def bools(x: Tensor) -> Runs:
    """Of booleans, eight a byte."""
    packed = native.pack_bools(x)
    assert packed is not None
    return {
        "compress": (x.clone, lambda: native.pack_bools(x)),
        "decompress": (x.clone, lambda: native.unpack_bools(packed, x.numel())),
    }


def against(base: Callable[[], object], run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """How many times as fast as ``base``, and the seconds it takes: medians."""
    pairs = [(seconds(base), seconds(run)) for _ in range(rounds + 2)][2:]
    return statistics.median(its / own for its, own in pairs), statistics.median(own for _, own in pairs)


def seconds(run: Callable[[], object]) -> float:
    """The time that one call takes; its result is freed afterwards."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def table(measurements: list[Measurement]) -> str:
    """Formats down; directions and threads across."""
    columns = [
        (direction, threads) for direction in ("compress", "decompress", "against nearest") for threads in THREADS
    ]
    rows: dict[tuple[str, str, str], dict[tuple[str, int], str]] = {}
    for m in measurements:
        bound = "" if m.bound is None else f" (>= {m.bound:.2g})"
        cell = f"{m.ratio:.2f}x {m.gigabytes_per_second:.1f} GB/s{bound}"
        rows.setdefault((m.path, m.dtype, m.format), {})[m.direction, m.threads] = cell
    headers = ["path", "dtype", "format", *(f"{direction}, {threads} thr." for direction, threads in columns)]
    return tabulate(
        [[*key, *(cells.get(column, "") for column in columns)] for key, cells in rows.items()], headers=headers
    )


if __name__ == "__main__":
    sys.exit(main())
