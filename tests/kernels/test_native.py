"""The compiled path for CPU tensors equals the reference bit for bit, and its absence costs speed alone."""

import logging
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernels.inputs import every_class, same
from kernels.test_family import TEXTS, formats

from fxpipe.triton_kernels import BFPFormat, cpu, native, reference
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS
from fxpipe.triton_kernels.native_format import native_format

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = [BFPFormat(width, block, unsigned) for width in WIDTHS for block in BLOCKS for unsigned in (False, True)]
FAMILY = [BFPFormat.parse(text) for text in TEXTS]  # every option, in blocks of 16
FAMILY += [replace(fmt, block=32) for fmt in FAMILY[::2] if fmt.block == 16 and fmt.outliers < 16]
FAMILY += [
    BFPFormat.parse(text)
    for text in (
        "bfp4b64:gauss+unsigned+e5m3", "bfp3b128:gauss+se5m2+search", "bfp2b64+sr", "bfp3b128+unsigned+hash", "bfp5b8:gauss",
        "bfp8b128+e6m2+search", "bfp8b8+unsigned+e4+sr+o7t2+dither-density", "bfp2b32+search", "bfp4b4x8:gauss+e5m3",
    )
]  # fmt: skip
FITTED_BEFORE = [fmt for fmt in FAMILY if fmt.codebook != "learned"]  # torch fits the others, and flushes too
CHUNK = 32 * 1024  # as in bfp.c
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)

compiled = pytest.mark.skipif(not native.ready(), reason=native.describe())


def assert_equal(fmt: BFPFormat, x: torch.Tensor, *decoded: torch.dtype) -> None:
    expected = reference.compress(x, fmt, SEED)
    found = native.compress(x, fmt, SEED)
    assert len(found) == len(expected)
    assert all(map(same, found, expected))
    for dtype in decoded:
        values = native.decompress(expected, fmt, x.numel(), dtype, SEED)
        assert same(values, reference.decompress(expected, fmt, x.numel(), dtype, SEED))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", PLAIN, ids=str)
def test_every_plain_format_on_every_class(fmt, dtype):
    assert_equal(fmt, every_class(1021, dtype), *DTYPES)


@compiled
@pytest.mark.parametrize("fmt", FAMILY, ids=str)
def test_the_family_on_every_class(fmt):
    for dtype in DTYPES:
        assert_equal(fmt, every_class(509, dtype), *DTYPES)


@compiled
@settings(deadline=None, max_examples=300, database=None)
@given(
    st.sampled_from(PLAIN) | formats(),
    st.sampled_from(DTYPES),
    st.integers(0, 5000),
    st.integers(0, 9),
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
)
def test_any_format_of_any_size_at_any_address(fmt, dtype, n, skipped, seed, decoded):
    x = every_class(502, dtype, seed)[skipped:]
    assert_equal(fmt, x[:n], decoded)


@compiled
@pytest.mark.parametrize("fmt", ["bfp3b16", "bfp4b32+e5m3", "bfp4b128+e5+sr+o1+dither", "bfp3b32:learned+se5m2"])
def test_any_seed_at_planes_at_odd_addresses(fmt):
    fmt, x = BFPFormat.parse(fmt), every_class(300, torch.float32)
    for seed in (torch.tensor(-1), torch.tensor(2**63 - 1), torch.tensor([0])):
        expected = reference.compress(x, fmt, seed)
        assert all(map(same, native.compress(x, fmt, seed), expected))
        moved = [torch.cat([plane[:1], plane])[1:] for plane in expected]
        values = native.decompress(moved, fmt, x.numel(), x.dtype, seed)
        assert same(values, reference.decompress(expected, fmt, x.numel(), x.dtype, seed))


@compiled
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 33])
@pytest.mark.parametrize("fmt", ["bfp3b16", "bfp4b32+e5+sr+o1+dither", "bfp3b64:gauss+unsigned+e5m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_work(n, fmt, dtype):
    assert_equal(BFPFormat.parse(fmt), every_class(n // 14 + 1, dtype)[:n], dtype)


@compiled
def test_torch_lends_its_threads():
    kernel, _ = native._kernel_or_reason()
    assert kernel.parallel != 0


@compiled
@pytest.mark.parametrize(
    "fmt", [*map(BFPFormat.parse, ("bfp8b32", "bfp8b32+unsigned", "bfp2b8")), *FITTED_BEFORE[::3]], ids=str
)
def test_flushing_denormals_changes_nothing(fmt):
    for dtype in DTYPES:
        x = every_class(300, dtype)
        expected = reference.compress(x, fmt, SEED)
        values = [reference.decompress(expected, fmt, x.numel(), decoded, SEED) for decoded in DTYPES]
        try:
            torch.set_flush_denormal(True)
            found = native.compress(x, fmt, SEED)
            decompressed = [native.decompress(expected, fmt, x.numel(), decoded, SEED) for decoded in DTYPES]
        finally:
            torch.set_flush_denormal(False)
        assert all(map(same, found, expected))
        assert all(map(same, decompressed, values))


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full([tensor.numel() + 128], 77, dtype=tensor.dtype)


def assert_guards_hold(around: list[torch.Tensor]) -> None:
    assert all((whole[:64] == 77).all() and (whole[-64:] == 77).all() for whole in around)


@compiled
@pytest.mark.parametrize("n", [1, 1000, 1025])
@pytest.mark.parametrize(
    "fmt",
    [*(f"bfp{width}b16" for width in WIDTHS), "bfp4b128+e5", "bfp5b8+e4+o2", "bfp3b32:gauss", "bfp4b64+sr+dither"],
)
def test_nothing_is_written_outside(fmt, n):
    fmt, x = BFPFormat.parse(fmt), torch.randn(n)
    expected = reference.compress(x, fmt, SEED)
    values = reference.decompress(expected, fmt, n, x.dtype, SEED)
    around = [guarded(plane) for plane in (*expected, x)]
    inside = [whole[64:-64] for whole in around]
    layout = native_format(fmt, "float32", fmt.levels)
    native._run(0, x, inside[:-1], layout, n, SEED)
    native._run(1, inside[-1], expected, layout, n, SEED)
    assert all(map(same, inside, (*expected, values)))
    assert_guards_hold(around)


@compiled
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1023, 1024, 1025, 70001])
def test_bools_eight_a_byte(n):
    x = torch.rand(n + 3, generator=torch.Generator().manual_seed(n))[3:] < 0.4
    packed = native.pack_bools(x)
    numbers = numpy.packbits(x.numpy(), bitorder="little")
    assert torch.equal(packed, torch.from_numpy(numbers))
    assert torch.equal(native.unpack_bools(packed, n), x)
    assert native.unpack_bools(packed, n).view(torch.uint8).sum() == x.sum()


@compiled
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n", [3, 1024, 3 * CHUNK + 5])
def test_bools_stay_inside(n):
    x = torch.rand(n) < 0.5
    packed = native.pack_bools(x)
    around = [guarded(packed), torch.full([n + 128], 77, dtype=torch.uint8)]
    inside = [whole[64:-64] for whole in around]
    assert native._run_bools(0, x, inside[0])
    assert native._run_bools(1, inside[1], packed)
    assert torch.equal(inside[0], packed)
    assert torch.equal(inside[1].bool(), x)
    assert_guards_hold(around)


def test_bools_without_a_kernel(monkeypatch):
    monkeypatch.setattr(native, "_kernel_or_reason", lambda: (None, "no reason"))
    assert native.pack_bools(torch.ones(9, dtype=torch.bool)) is None
    assert native.unpack_bools(torch.ones(2, dtype=torch.uint8), 9) is None


@compiled
@pytest.mark.parametrize("text", ["bfp4b32+sr", "bfp4b32+dither"])
def test_a_missing_seed_is_refused(text):
    fmt, x = BFPFormat.parse(text), torch.zeros(64)
    with pytest.raises(ValueError, match="needs a seed here"):
        native.decompress(native.compress(x, fmt), fmt, 64, torch.float32)


@compiled
def test_strided_values():
    x = torch.randn(3000)[::3]
    assert all(map(same, native.compress(x, BFPFormat(4, 32)), reference.compress(x.clone(), BFPFormat(4, 32))))


@compiled
def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match="'bfp4b32' holds values of dtype float32, bfloat16, float16, not float64"):
        native.compress(torch.zeros(3, dtype=torch.float64), BFPFormat(4, 32))
    planes = reference.compress(torch.zeros(3), BFPFormat(4, 32))
    with pytest.raises(TypeError, match="not int32"):
        native.decompress(planes, BFPFormat(4, 32), 3, torch.int32)


# Building, and doing without.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process of a user without a cache; returns the cache's folder. Compiles quickly, not well."""
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("FXPIPE_NATIVE", raising=False)
    native._kernel_or_reason.cache_clear()
    yield tmp_path / "cache" / "fxpipe"
    native._kernel_or_reason.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def assert_eager_and_right() -> None:
    x = torch.randn(1000)
    assert all(map(same, cpu.compress(x, BFPFormat(4, 32)), reference.compress(x, BFPFormat(4, 32))))
    assert native.describe().startswith("eager")


@compiled
def test_a_library_is_built_once(fresh, monkeypatch):
    assert native.ready()
    (library,) = fresh.iterdir()
    assert native.describe() == f"native ({library})"
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    native._kernel_or_reason.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    assert native.ready()


@compiled
def test_another_source_or_flag_is_another_library(fresh, monkeypatch, tmp_path):
    compiler = native._compiler()
    key = native._key(compiler)
    with monkeypatch.context() as patched:
        (tmp_path / "bfp_more.h").write_text("/* more */")
        patched.setattr(native, "HEADERS", (*native.HEADERS, tmp_path / "bfp_more.h"))
        assert native._key(compiler) != key
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert native._key(compiler) != key


@compiled
@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_cache_that_is_read_only(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o500)
    assert native.ready()
    assert f"fxpipe-{os.getuid()}" in native.describe()


@compiled
@pytest.mark.parametrize("cache", ["relative", "/dev/null/no/folder"])
def test_a_cache_that_cannot_be(fresh, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert native.ready()
    assert f"fxpipe-{os.getuid()}" in native.describe()


@compiled
def test_a_cache_that_others_may_write_is_not_trusted(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert native.ready()
    assert f"fxpipe-{os.getuid()}" in native.describe()
    assert not any(fresh.iterdir())


@compiled
def test_a_damaged_library_is_passed_over(fresh):
    fresh.mkdir(mode=0o700, parents=True)
    (fresh / f"bfp-{native._key(native._compiler())}.so").write_text("not a library")
    assert native.ready()
    assert f"fxpipe-{os.getuid()}" in native.describe()


@compiled
def test_a_compiler_that_does_not_know_this_cpu(fresh, monkeypatch):
    monkeypatch.setattr(native, "FLAGS_OF_THIS_CPU", ("-march=nonsense",))
    assert native.ready()
    assert_equal(BFPFormat(4, 32), every_class(100, torch.float32), torch.float32)


@compiled
def test_nowhere_to_keep_it(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native, "_directories", lambda: [Path("/dev/null/cache")])
    assert_eager_and_right()
    (record,) = caplog.records
    assert "no directory to keep the kernel in: /dev/null/cache: " in record.getMessage()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo version 1; case $1 in --version) exit 0;; esac; echo bad luck >&2; exit 3", "failed with 3: bad luck"),
        ("exit 1", "--version` failed with 1: no message"),
        ("case $1 in --version) exit 0;; esac; while [ $1 != -o ]; do shift; done; echo > $2", "invalid ELF|too short"),
    ],
)
def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path, caplog, text, reason):
    monkeypatch.setenv("CC", script(tmp_path / "bad-cc", text))
    assert_eager_and_right()
    assert_eager_and_right()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fxpipe", logging.WARNING)
    assert record.getMessage().startswith("CPU tensors are compressed by eager operators")
    assert re.search(reason, record.getMessage())


def test_opting_out(fresh, monkeypatch, caplog):
    monkeypatch.setenv("FXPIPE_NATIVE", "0")
    assert_eager_and_right()
    assert native.describe() == "eager (FXPIPE_NATIVE is 0)"
    assert not caplog.records


PROGRAM = """
import torch
from fxpipe.triton_kernels import BFPFormat, cpu, native, reference
native.FLAGS += ("-O0",)
x = torch.randn(1000)
assert all(map(torch.equal, cpu.compress(x, BFPFormat(4, 32)), reference.compress(x, BFPFormat(4, 32))))
print(native.describe())
"""


def processes(n: int, folder: Path, **environment: str) -> list[tuple[str, str]]:
    """What ``n`` processes at once print and log."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    command = [sys.executable, "-c", PROGRAM]
    running = [
        subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(n)
    ]
    return [process.communicate() for process in running]


def test_no_compiler(tmp_path):
    ((out, err),) = processes(1, tmp_path, PATH="", CC="", CXX="")
    reason = "no C compiler found; looked for $CC, $CXX, cc, gcc, clang, g++"
    assert out == f"eager ({reason})\n"
    assert err.count(reason) == 1


@compiled
def test_processes_build_at_once(tmp_path):
    results = processes(3, tmp_path)
    (library,) = (tmp_path / "fxpipe").iterdir()
    assert results == [(f"native ({library})\n", "")] * 3
