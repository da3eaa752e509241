"""The paths for CPU tensors without a C compiler equal the reference bit for bit. ``test_native.py`` has the other one."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from kernels.inputs import every_class, same

from fxpipe.triton_kernels import BFPFormat, cpu, jitted, native, reference, torch_threads
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


with_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture(autouse=True, params=["eager", pytest.param("numba", marks=with_numba)])
def path(request, monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: False)
    if request.param == "eager":
        monkeypatch.setattr(jitted, "ready", lambda fmt: False)
    return request.param


def assert_equal(fmt: BFPFormat, x: torch.Tensor, decoded: torch.dtype) -> None:
    expected = reference.compress(x, fmt)
    assert all(map(same, cpu.compress(x, fmt), expected))
    assert same(
        cpu.decompress(expected, fmt, x.numel(), decoded), reference.decompress(expected, fmt, x.numel(), decoded)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_format_on_every_class(width, block, unsigned, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2048)
    assert_equal(BFPFormat(width, block, unsigned), every_class(1021, dtype), dtype)


@pytest.mark.parametrize("n", [0, 1, 127, 1023, 1024, 1025, 4096, 5000])
@pytest.mark.parametrize("fmt", ["bfp3b8", "bfp4b32", "bfp7b128+unsigned", "bfp8b16"])
def test_chunks_and_ragged_sizes(fmt, n, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    assert_equal(BFPFormat.parse(fmt), every_class(n // 14 + 1, torch.float32)[:n], torch.float32)


@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp8b32+unsigned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decoded", DTYPES, ids=str)
def test_a_dtype_other_than_the_compressed_one(fmt, dtype, decoded):
    assert_equal(BFPFormat.parse(fmt), every_class(200, dtype), decoded)


def test_the_real_chunk():
    x = torch.randn(2 * cpu.CHUNK + 33)
    assert_equal(BFPFormat.parse("bfp4b32"), x, torch.float32)


def test_the_inputs_are_left_alone():
    x = torch.randn(1000)
    planes = cpu.compress(x, BFPFormat.parse("bfp6b16"))
    before = [x.clone(), *(plane.clone() for plane in planes)]
    cpu.compress(x, BFPFormat.parse("bfp6b16"))
    cpu.decompress(planes, BFPFormat.parse("bfp6b16"), 1000, torch.float32)
    assert all(map(torch.equal, [x, *planes], before))


OTHERS = ["bfp{}b{}+twos", "bfp{}b{}+e5m3", "bfp{}b{}+unsigned+e6m2", "bfp{}b{}+twos+e6m2", "bfp{}b{}+unsigned+e5m3"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize(("width", "block"), [(2, 8), (3, 16), (4, 32), (5, 64), (6, 128), (7, 32), (8, 16)])
def test_signs_and_scales_of_other_kinds(width, block, text, dtype, path):
    fmt = BFPFormat.parse(text.format(width, block))
    assert jitted.ready(fmt) == (path == "numba")
    assert_equal(fmt, every_class(321, dtype), dtype)


@pytest.mark.parametrize("n", [jitted.SHARE, 2 * jitted.SHARE, 3 * jitted.SHARE + 1031, 5 * jitted.SHARE - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shares_of_several_threads(n, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = every_class(n // 13, dtype).repeat(2)[:n]
    for text in ("bfp3b32", "bfp4b128+e5m3"):
        assert_equal(BFPFormat.parse(text), x, dtype)


def test_threads_in_inference_mode(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fmt = BFPFormat(4, 32)
    x = torch.randn(3 * jitted.SHARE + 7)
    with torch.inference_mode():
        for dtype in DTYPES:
            assert_equal(fmt, x.to(dtype), dtype)


@pytest.mark.parametrize("openmp", [True, False])
def test_a_failure_in_a_thread_is_raised(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(torch_threads, "gomp_parallel", lambda: 0)
    done = []

    def run(start, end):
        if start == 20:
            raise ValueError("twenty")
        done.append((start, end))

    parts = [(start, start + 10) for start in range(0, 100, 10)]
    with pytest.raises(ValueError, match="twenty"):
        torch_threads.share_out(run, parts)
    assert set(done) <= set(parts)


@pytest.mark.parametrize(
    "text", ["bfp4b32+sr", "bfp4b32+o1", "bfp4b32:gauss", "bfp4b32+e5m3+search", "bfp4b32+e4", "bfp4b32+trunc"]
)
def test_other_formats_go_by_the_definition(text):
    fmt = BFPFormat.parse(text)
    assert not jitted.ready(fmt)
    x, seed = torch.randn(333), torch.tensor(7)
    assert all(map(same, cpu.compress(x, fmt, seed), reference.compress(x, fmt, seed)))


def test_no_numba_where_the_environment_asks_for_none():
    program = """
import fxpipe, sys
from fxpipe.triton_kernels import BFPFormat, jitted, ops
assert not jitted.ready(BFPFormat(4, 32))
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"FXPIPE_NUMBA": "0"})


@with_numba
def test_numba_is_not_imported_before_it_is_used():
    program = """
import fxpipe, sys
from fxpipe.triton_kernels import BFPFormat, jitted, ops
assert "numba" not in sys.modules
assert jitted.ready(BFPFormat(4, 32))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@with_numba
def test_loops_are_compiled_where_no_place_can_keep_them(monkeypatch):
    from fxpipe.triton_kernels import numba_loops

    def njit(function, cache=False, **settings):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr(numba_loops, "njit", njit)
    assert numba_loops._compiled(len) is len


def test_a_numba_that_cannot_be_imported(monkeypatch, caplog):
    def loops():
        raise ImportError("Numba needs NumPy 2.0 or less")

    monkeypatch.undo()
    monkeypatch.setattr(jitted, "find_spec", lambda name: name)
    monkeypatch.setattr(jitted, "_loops", loops)
    assert not jitted._is_there.__wrapped__()
    assert "numba cannot be imported: Numba needs NumPy 2.0 or less" in caplog.text
