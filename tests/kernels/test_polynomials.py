"""Curves that stand in for comparisons with thresholds: right at every n of the grid, in the arithmetic of a device."""

from dataclasses import replace

import numpy as np
import pytest
from kernels.ptx_opcodes import fused

from fxpipe.triton_kernels import BFPFormat, codebooks
from fxpipe.triton_kernels.codebook_polynomials import Thresholds, curve
from fxpipe.triton_kernels.codec import Codec, codec
from fxpipe.triton_kernels.format import BLOCKS

ROUND = np.float32(1.5 * 2**23)
SIGNED = [f"bfp{width}b{{}}:gauss{scale}" for width in (3, 4, 5) for scale in ("", "+e6m2")]
OTHERS = [f"bfp{width}b{{}}:gauss+unsigned{scale}" for width in (2, 3, 4) for scale in ("", "+e5m3")]
OTHERS += ["bfp2b{}:gauss+se5m2", "bfp3b{}:gauss+se5m2"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("text", SIGNED + OTHERS)
def test_every_n_of_the_grid_goes_to_the_nearest_level(text, block):
    fmt = BFPFormat.parse(text.format(block))
    c = codec(fmt, "bfloat16", packs=True)
    n = np.arange(fmt.unsigned, len(fmt.level_grid)) + fmt.level_grid[0]
    expected = codebooks.codes_of_grid(fmt.levels, fmt.level_grid)[fmt.unsigned :]
    assert (rounded(c, n) + fmt.unsigned).tolist() == [max(code, int(fmt.unsigned)) for code in expected]
    far = np.array([257, 1000, 1e6])
    assert (rounded(c, far) == fmt.n_levels - 1 - fmt.unsigned).all()
    if fmt.signed_levels:
        assert (rounded(c, -far) == 0).all()


def rounded(c: Codec, n) -> np.ndarray:
    u = ramp(ROUND + n.astype(np.float32), c.ramp)
    v = ramp(u, c.knee) if c.knee else u
    value = np.full_like(u, c.polynomial[-1])
    for coefficient in c.polynomial[-2::-1]:
        value = fused(value, v, np.float32(coefficient))
    return (fused(value, u, ROUND) - ROUND).astype(int)


def ramp(x: np.ndarray, numbers: tuple[float, ...]) -> np.ndarray:
    slope, offset = map(np.float32, numbers)
    assert [float(slope), float(offset)] == list(numbers)
    return np.clip(fused(x, slope, offset), np.float32(0), np.float32(1))


def test_few_instructions_are_enough_for_the_formats_of_the_report():
    for text, n_coefficients in [("bfp3b32:gauss", 2), ("bfp4b32:gauss", 3), ("bfp5b32:gauss", 3)]:
        assert len(codec(BFPFormat.parse(text), "bfloat16", packs=True).polynomial) == n_coefficients


def test_thresholds_like_no_curve_of_few_degrees_have_none():
    assert curve(Thresholds((3, 4, 5, 100, 101, 102, 250), 0, 256)) is None


def test_the_room_for_rounding_is_kept():
    thresholds = Thresholds((63, 127, 191), 0, 256)
    found = curve(thresholds)
    assert found is not None
    assert thresholds.serve(found)
    assert not thresholds.serve(replace_offset(found, -1))
    assert not replace(thresholds, values=(62, 127, 191)).serve(found)


def replace_offset(found, steps):
    return found._replace(first=found.first._replace(offset=found.first.offset + steps * found.first.slope))
