"""The compiled PTX of the Triton kernels equals the reference bit for bit, on devices that are not here."""

import pytest
import torch
from kernels import emulated
from kernels.inputs import any_codes, classes_in_turn, near_activation, norm_inputs, same, tops
from kernels.kernel_formats import FAMILY
from kernels.norm_oracle import EPS, check

from fxpipe.triton_kernels import BFPFormat, launch, norm_launch, reference
from fxpipe.triton_kernels.format import BLOCKS, WIDTHS

TARGETS = [80, 90, 100]
LIKE_OTHERS = (
    "bfp2b16+search", "bfp7b16+unsigned+search", "bfp5b64:gauss+e6m2+search", "bfp3b32:gauss+search",
    "bfp4b32:learned+unsigned+search", "bfp4b128:gauss+e5m3+search+o2",
)  # fmt: skip
"""Of the family: they take long to compile, and others have all that they have."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = 2 * launch.TILE + 2817  # a kernel for it has the path for full tiles and the path for the last

FORMATS = [(width, block, (width + i) % 2 == 0) for width in WIDTHS for i, block in enumerate(BLOCKS)]
OF_OTHERS = [
    (target, width, BLOCKS[(width + 2 * unsigned + target // 20) % len(BLOCKS)], unsigned)
    for target in (80, 100)
    for width in WIDTHS
    for unsigned in (False, True)
]


def assert_equal(
    target: int, fmt: BFPFormat, x: torch.Tensor, before: int = 0, fused: tuple[bool, ...] = (False, True)
) -> None:
    """Both kernels on x, as they stand and with products fused into sums; and decompress on codes of every kind."""
    numel, dtype = x.numel(), x.dtype
    size = before * launch.TILE + numel
    pack = emulated.compiled_for(target, "compress", fmt, dtype, size)
    unpack = emulated.compiled_for(target, "decompress", fmt, dtype, size)
    stored = reference.compress(x, fmt, emulated.SEED)
    codes = any_codes(stored, fmt, torch.Generator().manual_seed(numel))
    expected = reference.decompress(codes, fmt, numel, dtype, emulated.SEED)
    for fuse in fused:
        made = emulated.compress(pack, x, fmt, before, fuse)
        assert all(map(same, made, stored[: len(made)]))
        assert same(emulated.decompress(unpack, codes, fmt, numel, dtype, before, fuse), expected)


def a_dtype(width: int, block: int, unsigned: bool) -> torch.dtype:
    return DTYPES[(width + BLOCKS.index(block) + unsigned) % len(DTYPES)]


@pytest.mark.parametrize(("width", "block", "unsigned"), FORMATS)
def test_sm_90_every_width_and_block(width, block, unsigned):
    x = classes_in_turn(RAGGED, a_dtype(width, block, unsigned), seed=width)
    fused = (width + BLOCKS.index(block)) % 2 == 0
    assert_equal(90, BFPFormat(width, block, unsigned), x, fused=(fused,))


@pytest.mark.parametrize(("target", "width", "block", "unsigned"), OF_OTHERS)
def test_other_targets_every_width(target, width, block, unsigned):
    x = classes_in_turn(RAGGED, a_dtype(width, block, unsigned), seed=block)
    assert_equal(target, BFPFormat(width, block, unsigned), x, fused=(unsigned,))


@pytest.mark.parametrize(("place", "text"), [p for p in enumerate(FAMILY) if p[1] not in LIKE_OTHERS])
def test_the_family(place, text):
    """Each on one target and dtype, in turn, with and without a last tile that is not full."""
    dtype, target = DTYPES[(place + place // 3) % 3], TARGETS[(1, 0, 1, 2)[place % 4]]
    x = classes_in_turn(RAGGED if place // 2 % 2 else 3 * launch.TILE, dtype, seed=place)
    assert_equal(target, BFPFormat.parse(text), x, fused=(place % 2 == 0,))


def test_the_sample_has_every_block_and_dtype_on_each_target():
    for target in (80, 100):
        chosen = [of for other, *of in OF_OTHERS if other == target]
        assert {a_dtype(*of) for of in chosen} == set(DTYPES)
        assert {block for _, block, _ in chosen} == set(BLOCKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp8b32+unsigned"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_size_of_full_tiles(target, fmt, dtype):
    assert_equal(target, BFPFormat.parse(fmt), classes_in_turn(6 * launch.TILE, dtype))


@pytest.mark.parametrize("fmt", ["bfp4b32", "bfp7b8+unsigned"])
@pytest.mark.parametrize("numel", [1, 7, 9, 31, 33, 1025, 2043, 3078, 4095, 4097, 4129])
def test_any_size(fmt, numel):
    g = torch.Generator().manual_seed(numel)
    assert_equal(90, BFPFormat.parse(fmt), tops(numel, g).bfloat16())


@pytest.mark.parametrize("fmt", ["bfp3b64", "bfp8b128+unsigned"])
@pytest.mark.parametrize("numel", [4096, 5001])
def test_the_end_of_a_tensor_of_more_than_two_to_the_31_values(fmt, numel):
    before = 3 * 2**31 // launch.TILE
    assert_equal(90, BFPFormat.parse(fmt), classes_in_turn(numel, torch.float16), before=before)


@pytest.mark.parametrize("stored", ["input", "output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_relu_with_its_input_or_output_stored(target, dtype, stored):
    x, fmt = classes_in_turn(launch.TILE + 817, dtype), BFPFormat.parse("bfp4b32")
    y, *planes = emulated.produce_and_compress(target, "relu", stored, [x], fmt)
    assert same(y, torch.relu(x))
    assert all(map(same, planes, reference.compress(x if stored == "input" else y, fmt)))


@pytest.mark.parametrize(("activation", "stored"), [("silu", "input"), ("silu", "output"), ("gelu_tanh", "input")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_activations_store_what_they_read_or_wrote(activation, stored, dtype):
    """GELU with erf is left to the interpreter: libdevice's takes opcodes that flush denormals."""
    x, fmt = classes_in_turn(launch.TILE, dtype), BFPFormat.parse("bfp4b32")
    y, *planes = emulated.produce_and_compress(90, activation, stored, [x], fmt)
    assert all(map(same, planes, reference.compress(x if stored == "input" else y, fmt)))
    assert near_activation(y, x, activation)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_a_sum_that_is_stored(target, dtype, fuse):
    x, z = (classes_in_turn(launch.TILE + 817, dtype, seed) for seed in (1, 2))
    fmt = BFPFormat.parse("bfp4b32")
    y, *planes = emulated.produce_and_compress(target, "add", "output", [x, z], fmt, fuse)
    assert same(y, x + z)
    assert all(map(same, planes, reference.compress(y, fmt)))


W, R = ("weight", "bias"), ("residual",)
NORMS = [
    ("layer", 256, (*R, "mask", *W), "both", "bfp4b32", torch.bfloat16),
    ("layer", 768, (*R, *W), "input", "bfp4b32", torch.float16),
    ("layer", 128, W, "output", "bfp3b16:gauss+e5m3", torch.float32),
    ("rms", 4096, (*R, "weight"), "input", "bfp4b32", torch.bfloat16),
    ("rms", 768, (*R, "mask", "weight"), "both", "bfp8b64", torch.float16),
    ("layer", 2048, (), "both", "bfp5b128", torch.float32),
]


@pytest.mark.parametrize(("place", "given"), list(enumerate(NORMS)))
def test_a_norm_that_is_stored(place, given):
    norm, width, has, stored, text, dtype = given
    inputs = norm_inputs((7, width), dtype, has, seed=place)
    which = norm_launch.Norm(norm, EPS, width, has, inputs.get("kept", 1.0))
    fmt, target = BFPFormat.parse(text), (90, 90, 80, 90, 100, 90)[place]
    check(emulated.norm_and_compress(target, which, stored, inputs, fmt, place % 2 == 1), inputs, norm, text, stored)
