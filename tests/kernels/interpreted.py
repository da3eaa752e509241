"""The Triton kernels on CPU tensors, under Triton's interpreter: ``test_interpreted.py`` runs this file by itself.

The interpreter must be asked for before triton is first imported, and would then serve everything in the process.
"""

import numpy as np
import pytest
import torch
import triton
from kernels.inputs import any_codes, every_class, same
from kernels.kernel_formats import FAMILY
from kernels.ptx_opcodes import fused
from triton.runtime import interpreter

from fxpipe.triton_kernels import BFPFormat, kernel_arguments, launch, ops, reference
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [  # numpy's, where a block holds a NaN or an infinity, or a value is too large for the dtype asked for
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning"),
]
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


@pytest.fixture(autouse=True)
def multiply_and_add_rounds_once(monkeypatch):
    """The interpreter's ``tl.fma`` rounds twice, unlike any device's."""

    def create_fma(_, x, y, z):
        return interpreter.TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


def assert_equal(fmt: BFPFormat, x: torch.Tensor, decoded: torch.dtype, tile: int) -> None:
    expected = reference.compress(x, fmt, SEED)
    assert all(map(same, launch.compress(x, fmt, SEED, tile), expected))
    for planes in (expected, any_codes(expected, fmt, torch.Generator().manual_seed(fmt.width))):
        assert same(
            launch.decompress(planes, fmt, x.numel(), decoded, SEED, tile),
            reference.decompress(planes, fmt, x.numel(), decoded, SEED),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_full_tiles_of_every_width_on_every_class(width, unsigned, dtype):
    block = BLOCKS[(width + unsigned) % len(BLOCKS)]
    assert_equal(BFPFormat(width, block, unsigned), every_class(1171, dtype)[:16384], dtype, tile=16384)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", [4, 7])
def test_a_tile_in_part_of_every_block_on_every_class(width, block, dtype):
    unsigned = block > 16
    assert_equal(BFPFormat(width, block, unsigned), every_class(931, dtype), dtype, tile=16384)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FAMILY)
def test_the_family_on_every_class(text, dtype):
    assert_equal(BFPFormat.parse(text), every_class(1171, dtype)[:16384], dtype, tile=16384)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["bfp4b16+unsigned+o1", "bfp4b8+unsigned+o2t1"])
def test_an_infinity_in_a_block_that_has_nothing_above_zero(text, dtype):
    x = -torch.arange(64, dtype=torch.float32)
    x[torch.tensor([0, 17, 40])] = -torch.inf
    assert_equal(BFPFormat.parse(text), x.to(dtype), dtype, tile=128)


@pytest.mark.parametrize("tile", [1024, 4096])
def test_random_bytes_are_the_same_at_any_size_of_tile(tile):
    assert_equal(BFPFormat.parse("bfp4b16+sr"), every_class(300, torch.bfloat16), torch.bfloat16, tile)


@pytest.mark.parametrize("n", [1, 9, 4095, 4097, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tile_that_runs_on_a_device_at_ragged_sizes(dtype, n):
    assert_equal(BFPFormat.parse("bfp5b64"), every_class(n // 14 + 1, dtype, seed=n)[:n], dtype, launch.TILE)


@pytest.mark.parametrize("decoded", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp8b32+unsigned"])
def test_a_dtype_other_than_the_compressed_one(fmt, decoded):
    x = every_class(200, torch.float32)
    fmt = BFPFormat.parse(fmt)
    expected = reference.compress(x, fmt)
    y = launch.decompress(expected, fmt, x.numel(), decoded)
    assert same(y, reference.decompress(expected, fmt, x.numel(), decoded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["bfp2b16", "bfp3b8+unsigned", "bfp5b32", "bfp6b128", "bfp7b8", "bfp8b16"])
@pytest.mark.parametrize("n", [31, 4099])
def test_nothing_beside_the_tensors_is_read_or_written(fmt, dtype, n):
    fmt, guard = BFPFormat.parse(fmt), 64
    x = within(torch.randn(n).to(dtype), guard, torch.nan)  # reading beyond would make a block NaN
    expected = reference.compress(x, fmt)
    planes = [within(torch.zeros_like(plane), guard, 85) for plane in expected]
    grid = (triton.cdiv(n, launch.TILE),)
    constants = launch._constants(fmt, reference.dtype_name(dtype, fmt), n, launch.TILE, packs=False)
    launch.compress_kernel[grid](x, *kernel_arguments.plane_arguments(planes, fmt, x), SEED, n, **constants)
    assert all(map(same, planes, expected))
    assert all(guarded(plane, guard, 85) for plane in planes)

    y = within(torch.zeros(n, dtype=dtype), guard, 85.0)
    launch.decompress_kernel[grid](
        *kernel_arguments.plane_arguments(planes, fmt, x), y, SEED, n, launch.PLACE_BITS, **constants
    )
    assert same(y, reference.decompress(expected, fmt, n, dtype))
    assert guarded(y, guard, 85.0)


def within(x: torch.Tensor, guard: int, filling: float) -> torch.Tensor:
    """``x`` in the middle of a larger buffer."""
    buffer = x.new_full((x.numel() + 2 * guard,), filling)
    buffer[guard:-guard] = x
    return buffer[guard:-guard]


def guarded(x: torch.Tensor, guard: int, filling: float) -> bool:
    buffer = x.as_strided((x.numel() + 2 * guard,), (1,), 0)
    return bool((buffer[:guard] == filling).all() and (buffer[-guard:] == filling).all())


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_that_starts_anywhere_in_its_storage(dtype, offset):
    x = torch.randn(300).to(dtype)[offset:]
    fmt = BFPFormat.parse("bfp4b32")
    assert all(map(same, launch.compress(x, fmt), reference.compress(x, fmt)))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize(
    "fmt",
    ["bfp4b32", "bfp4b4x8+e5m3", "bfp3b16+e5+sr", "bfp4b16+o3", "bfp3b16:learned+e5m3+search", "bfp4b16+e4+dither"],
)
def test_what_the_operators_do_for_a_device(fmt, order):
    x = torch.randn(3, 5, 40).to(torch.bfloat16)
    planes = ops.compress_on_gpu(x, fmt, order, SEED)
    assert all(map(same, planes, torch.ops.fxpipe.bfp_compress(x, fmt, order, SEED)))
    arguments = (planes, fmt, list(x.shape), order, x.dtype, SEED)
    y, expected = ops.decompress_on_gpu(*arguments), torch.ops.fxpipe.bfp_decompress(*arguments)
    assert same(y, expected)
    assert y.stride() == expected.stride()


def test_empty():
    fmt = BFPFormat.parse("bfp7b32")
    planes = launch.compress(torch.empty(0), fmt)
    assert [plane.numel() for plane in planes] == [0, 0, 0, 0]
    assert launch.decompress(planes, fmt, 0, torch.float32).shape == (0,)
