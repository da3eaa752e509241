"""The kernels of zero compression under Triton's interpreter: ``test_interpreted.py`` runs this file by itself."""

import pytest
import torch
from kernels.inputs import same
from kernels.interpreted import guarded, within

from fxpipe.triton_kernels import BFPFormat, packing, zero_coding, zero_reference
from fxpipe.triton_kernels.format import WIDTHS


def any_planes(fmt: BFPFormat, n_blocks: int, zeros: float) -> list[torch.Tensor]:
    """Planes with any codes, such a share of them zero."""
    g = torch.Generator().manual_seed(n_blocks)
    codes = torch.randint(1, 1 << fmt.width, (n_blocks * fmt.block,), generator=g)
    codes *= torch.rand(codes.shape, generator=g) >= zeros
    exponents = torch.randint(0, 256, (n_blocks,), generator=g, dtype=torch.uint8)
    return [*packing.pack(codes, fmt.width, fmt.group_planes), exponents]


@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("n_blocks", [1, 1023])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernels_equal_the_definition(width, n_blocks, zeros):
    fmt = BFPFormat(width, 8)
    planes = any_planes(fmt, n_blocks, zeros)
    expected = zero_reference.compress(planes, fmt)
    found = zero_coding.run_compress(planes, fmt, n_blocks)
    assert all(map(same, found.tensors(), expected.tensors()))
    assert all(map(same, zero_coding.run_decompress(expected, fmt), planes))
    assert all(map(same, zero_coding.run_decompress(expected.shrunk(), fmt), planes))


def test_empty():
    fmt = BFPFormat.parse("bfp7b32")
    planes = any_planes(fmt, 0, 0.5)
    found = zero_coding.run_compress(planes, fmt, 0)
    assert all(map(same, found.tensors(), zero_reference.compress(planes, fmt).tensors()))
    assert all(map(same, zero_coding.run_decompress(found, fmt), planes))


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
def test_nothing_beside_the_tensors_is_read_or_written(width):
    fmt, guard, n_groups = BFPFormat(width, 8), 64, 519
    planes = any_planes(fmt, n_groups, 0.3)
    expected = zero_reference.compress(planes, fmt)
    codes = [within(plane, guard, 85) for plane in planes[:-1]]
    payload = within(torch.zeros_like(expected.payload), guard, 85)
    mask = within(torch.zeros_like(expected.mask), guard, 85)
    words = within(torch.zeros(2, dtype=torch.int64), guard, 85)
    arguments, constants = zero_coding._arguments(codes, fmt), zero_coding._constants(fmt)
    zero_coding.mask_kernel[(2,)](*arguments, mask, words, n_groups, **constants)
    zero_coding.payload_kernel[(2,)](*arguments, expected.start, payload, n_groups, **constants)
    assert same(mask, expected.mask)
    assert same(payload, expected.payload)
    used = within(expected.shrunk().payload, guard, -1)
    restored = [within(torch.zeros_like(plane), guard, 85) for plane in codes]
    arguments = zero_coding._arguments(restored, fmt)
    zero_coding.restore_kernel[(2,)](mask, expected.start, used, *arguments, n_groups, **constants)
    assert all(map(same, restored, planes))
    assert all(guarded(tensor, guard, 85) for tensor in (mask, words, payload, *restored))
