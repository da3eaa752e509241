"""Polynomials that stand in for comparisons with thresholds: right at every n of the grid, in the arithmetic of a device."""

import numpy as np
import pytest
from kernels.ptx_opcodes import fused

from fxpipe.triton_kernels import BFPFormat, codebooks
from fxpipe.triton_kernels.codebook_polynomials import Thresholds, polynomial
from fxpipe.triton_kernels.codec import codec
from fxpipe.triton_kernels.format import BLOCKS

ROUND = np.float32(1.5 * 2**23)
SIGNED = [f"bfp{width}b{{}}:gauss{scale}" for width in (3, 4) for scale in ("", "+e6m2")]
OTHERS = [f"bfp{width}b{{}}:gauss+unsigned" for width in (2, 3)] + ["bfp2b{}:gauss+se5m2", "bfp3b{}:gauss+se5m2"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("text", SIGNED + OTHERS)
def test_every_n_of_the_grid_goes_to_the_nearest_level(text, block):
    fmt = BFPFormat.parse(text.format(block))
    c = codec(fmt, "bfloat16", packs=True)
    n = np.arange(fmt.unsigned, len(fmt.level_grid)) + fmt.level_grid[0]
    found = np.clip(rounded(c.origin, c.polynomial, n) + fmt.unsigned, fmt.unsigned, fmt.n_levels - 1)
    expected = codebooks.codes_of_grid(fmt.levels, fmt.level_grid)[fmt.unsigned :]
    assert found.tolist() == [max(code, int(fmt.unsigned)) for code in expected]


def rounded(origin: int, coefficients: tuple[float, ...], n) -> np.ndarray:
    u = ((n - origin) / 128).astype(np.float32)
    value = np.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        value = fused(value, u, np.float32(coefficient))
    return (fused(value, u, np.float32(coefficients[0]) + ROUND) - ROUND).astype(int)


def test_thresholds_like_no_polynomial_of_few_degrees_have_none():
    assert polynomial(Thresholds((3, 4, 5, 100, 101, 102, 250), 0, 256)) == (0, ())


def test_the_room_for_rounding_is_kept():
    thresholds = Thresholds((63, 127, 191), 0, 256)
    origin, coefficients = polynomial(thresholds)
    assert thresholds.serve(origin, np.array(coefficients))
    assert not thresholds.serve(origin + 1, np.array(coefficients))
