"""Tiles of a matrix, in the order in which they are stored, and back."""

import pytest
import torch
from hypothesis import given, strategies as st

from fxpipe.triton_kernels import BFPFormat, ops
from fxpipe.triton_kernels.tiling import from_stored, to_stored


def test_tiles_lie_one_after_another_each_row_by_row():
    x = torch.arange(1.0, 13.0).view(3, 4)  # 2 x 4 tiles: the second has a row of zeros
    fmt = BFPFormat.parse("bfp4b2x4")
    assert to_stored(x, fmt).tolist() == [*range(1, 13), 0, 0, 0, 0]
    columns = BFPFormat.parse("bfp4b8x1")
    assert to_stored(x, columns).view(4, 8).tolist() == [[c, c + 4, c + 8, 0, 0, 0, 0, 0] for c in range(1, 5)]


@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(["bfp4b8", "bfp4b8x1", "bfp4b1x8", "bfp4b4x8", "bfp4b2x64"]),
)
def test_back_and_forth(shape, text):
    fmt = BFPFormat.parse(text)
    x = torch.randn(shape)
    stored = to_stored(x, fmt)
    assert stored.shape == (fmt.stored_numel(shape),)
    assert torch.equal(from_stored(stored, fmt, shape), x)


@pytest.mark.parametrize("text", ["bfp8b32x1", "bfp8b4x8", "bfp8b1x16"])
def test_a_large_value_disturbs_its_tile_alone(text):
    fmt = BFPFormat.parse(text)
    x = torch.rand(64, 64) + 1
    x[17, 33] = 1e6
    y = ops.decompress(ops.compress(x, fmt), fmt, x.shape, x.dtype)
    hit = ((x - y).abs() > 0.02).nonzero()
    box = [range(17 // fmt.rows * fmt.rows, 17 // fmt.rows * fmt.rows + fmt.rows)]
    box.append(range(33 // fmt.columns * fmt.columns, 33 // fmt.columns * fmt.columns + fmt.columns))
    assert all(row in box[0] and column in box[1] for row, column in hit.tolist())
    assert len(hit) == fmt.block


def test_tiles_are_of_the_permuted_tensor():
    x = torch.randn(3, 40, 24)
    order = [0, 2, 1]
    planes = torch.ops.fxpipe.bfp_compress(x, "bfp4b8x4", order)
    dense = torch.ops.fxpipe.bfp_compress(x.permute(order).contiguous(), "bfp4b8x4", [0, 1, 2])
    assert all(map(torch.equal, planes, dense))
