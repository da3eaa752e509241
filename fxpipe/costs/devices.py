"""Named devices as data, each with where its numbers come from, and a quick measurement of this machine's processor."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fxpipe.errors import OptionError, unknown
from fxpipe.ir.cost import Device

GIB = 2**30

_KNOWN = (
    Device(
        name="H100",
        flops_per_second={"float32": 67e12, "float64": 34e12, "bfloat16": 989e12, "float16": 989e12},
        memory_bytes_per_second=3.35e12,
        memory_bytes=80 * 10**9,
        launch_seconds=4e-6,
        source="NVIDIA H100 Tensor Core GPU datasheet, SXM5 80 GB: dense tensor cores for 16 bits, "
        "no tensor cores for 32 and 64; the launch time is an estimate",
    ),
    Device(
        name="A100",
        flops_per_second={"float32": 19.5e12, "float64": 9.7e12, "bfloat16": 312e12, "float16": 312e12},
        memory_bytes_per_second=2.039e12,
        memory_bytes=80 * 10**9,
        launch_seconds=4e-6,
        source="NVIDIA A100 Tensor Core GPU datasheet, SXM4 80 GB: dense tensor cores for 16 bits, "
        "no tensor cores for 32 and 64; the launch time is an estimate",
    ),
    Device(
        name="MI300X",
        flops_per_second={"float32": 163.4e12, "float64": 81.7e12, "bfloat16": 1307.4e12, "float16": 1307.4e12},
        memory_bytes_per_second=5.3e12,
        memory_bytes=192 * 10**9,
        launch_seconds=6e-6,
        source="AMD Instinct MI300X datasheet, OAM 192 GB: dense matrix cores for 16 bits, vector units for 32 and 64; "
        "the launch time is an estimate",
    ),
    Device(
        name="cpu",
        flops_per_second={"float32": 1e12, "float64": 0.5e12},
        memory_bytes_per_second=100e9,
        memory_bytes=64 * GIB,
        launch_seconds=5e-6,
        source="a generic server processor, in round numbers; no datasheet (measure_this_device gives this machine's)",
    ),
)
DEVICES = {d.name: d for d in _KNOWN}


def device(name: str) -> Device:
    """The device of this name; raises OptionError that lists the known ones for any other."""
    if name not in DEVICES:
        raise OptionError(unknown("device", name, DEVICES))
    return DEVICES[name]


def measure_this_device(seconds: float = 0.5) -> Device:
    """This machine's processor, its rates measured in about ``seconds``.

    Arithmetic: a product of two 512 x 512 float32 matrices; bandwidth: a copy of 64 MiB (read and written); launch: an
    addition of two numbers. Each is the median of its repeats. Uses torch's current number of threads; leaves the
    random state alone.
    """
    n, copied = 512, 64 * 2**20
    a, b = torch.ones(n, n), torch.ones(n, n)
    source, target = torch.zeros(copied // 4), torch.empty(copied // 4)
    x, y = torch.ones(()), torch.empty(())
    with torch.no_grad():
        product = _median_seconds(lambda: a @ b, seconds / 3)
        copy = _median_seconds(lambda: target.copy_(source), seconds / 3)
        launch = _median_seconds(lambda: torch.add(x, 1, out=y), seconds / 3)
    return Device(
        name=processor_name(),
        flops_per_second={"float32": 2 * n**3 / product},
        memory_bytes_per_second=2 * copied / copy,
        memory_bytes=_memory_bytes(),
        launch_seconds=launch,
        source=f"measured with {torch.get_num_threads()} threads: 512x512 float32 matmul, 64 MiB copy, scalar addition",
    )


def processor_name() -> str:
    """What this machine's processor calls itself, e.g. ``AMD EPYC 7B13``."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "cpu"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _median_seconds(action: Callable[[], object], budget_seconds: float, at_least: int = 3) -> float:
    """Median of the runs that fit into the budget, after one that is not counted."""
    action()
    end = time.perf_counter() + budget_seconds
    samples: list[float] = []
    while len(samples) < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
