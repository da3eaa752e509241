"""The Triton kernels compile for each target, within their budgets, without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "kernel_report.py"
N_FUSED = 2 * (4 * 3 + 2) + 3 * 3
"""Dtypes; activations, of which nothing, the input or the output is stored; sums; norms with nothing, one or two stored."""
SOME = [
    "bfp4b32+unsigned", "bfp7b8", "bfp8b128", "bfp2b32+sr", "bfp8b32+sr", "bfp3b16:gauss+e5m3", "bfp4b16+unsigned+e6m2",
    "bfp5b128:gauss",
]  # fmt: skip


def report(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", "--check", *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ran.stdout, ran.stderr
    reports = json.loads(ran.stdout)
    assert (ran.returncode == 0) == all(not made["shortfalls"] for made in reports)
    return reports


def shortfalls(reports: list[dict[str, Any]]) -> list[object]:
    return [
        (made["target"], made["kind"], made["format"], made["dtype"], why)
        for made in reports
        for why in made["shortfalls"]
    ]


def formats(names: list[str]) -> list[str]:
    return [argument for name in names for argument in ("--format", name)]


def test_sm_90_every_width_block_dtype_and_option():
    reports = report("--target", "sm_90")
    assert len(reports) == 114 + N_FUSED
    assert shortfalls(reports) == []
    assert all(made["barriers"] == 0 and made["bytes_accessed"] >= made["bytes_per_value"] for made in reports)
    assert all(made["spills"] == 0 and made["shared_bytes"] == 0 for made in reports)
    of = {(made["kind"], made["format"], made["dtype"]): SimpleNamespace(**made) for made in reports}
    fused = [key for key in of if key[1].startswith("bfp4b32, ")]
    assert len(fused) == N_FUSED - 2 * 5 - 3  # but for those that store nothing
    for activation, stored, dtype in fused:  # one pass moves less than two, and does no more
        alone, then = of[activation, "", dtype], of["compress", "bfp4b32", dtype]
        n = 2 if stored.endswith("both") else 1
        assert of[activation, stored, dtype].bytes_per_value < alone.bytes_per_value + n * then.bytes_per_value
        assert of[activation, stored, dtype].instructions < 1.02 * (alone.instructions + n * then.instructions)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_other_targets(target):
    reports = report("--target", target, *formats(SOME))
    assert len(reports) == 2 * len(SOME)
    assert shortfalls(reports) == []
    most = {"sm_80": 40, "sm_100": 40, "gfx942": 64}[target]
    assert all(0 < made["registers"] <= most for made in reports)


def test_gfx942_compiles_norms():
    """And the others, in ``make kernel-report``."""
    reports = report("--target", "gfx942", "--norms")
    assert len(reports) == 3 * 3
    assert shortfalls(reports) == []


def test_the_path_for_a_last_tile_that_is_not_full():
    reports = report("--target", "sm_90", "--numel", "1000001", *formats(["bfp3b16", "bfp8b32"]))
    assert shortfalls(reports) == []
    assert all(made["registers"] <= 64 for made in reports)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_other_targets_compile_outliers_and_a_search_without_shared_memory(target):
    reports = report("--target", target, *formats(["bfp4b16+o1", "bfp3b64+o3", "bfp3b32:gauss+unsigned+e5m3+search"]))
    assert shortfalls(reports) == []
