"""Bools as bits, against numpy's ``packbits``; seeds of values."""

import numpy as np
import pytest
import torch

from fxpipe.triton_kernels import ops

pack, unpack, seed_of = (getattr(torch.ops.fxpipe, name).default for name in ("pack_bools", "unpack_bools", "seed_of"))


def bools(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (64,), (3, 5, 7), (0, 4), (), (1000,)])
def test_bits_are_numpys(shape):
    x = bools(*shape)
    packed = pack(x)
    assert packed.numpy().tolist() == np.packbits(x.numpy().reshape(-1), bitorder="little").tolist()
    assert torch.equal(unpack(packed, list(shape)), x)


LAYOUTS = [bools(80)[3:], bools(80)[3:19], bools(16, 8).t(), bools(16, 8)[::2, ::3], bools(1, 8).expand(3, 8)]


@pytest.mark.parametrize("x", LAYOUTS)
def test_any_strides_and_offset(x):
    assert torch.equal(unpack(pack(x), list(x.shape)), x)
    assert unpack(pack(x), list(x.shape)).is_contiguous()


def test_operators_are_well_behaved():
    torch.library.opcheck(pack, (bools(5, 7),))
    torch.library.opcheck(unpack, (pack(bools(5, 7)), [5, 7]))
    torch.library.opcheck(seed_of, (torch.randn(5, 7), 1))


def test_what_does_not_fit():
    with pytest.raises(TypeError, match=r"pack_bools takes torch.bool; found torch.float32 \[2\]"):
        pack(torch.zeros(2))
    with pytest.raises(TypeError, match=r"unpack_bools takes torch.uint8; found torch.bool \[8\]"):
        unpack(bools(8), [8])
    with pytest.raises(ValueError, match=r"9 values, shape \[3, 3\], take the shape \[2\], not \[1\]"):
        unpack(pack(bools(8)), [3, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.uint8])
def test_seeds_change_with_the_values_and_the_point(dtype):
    x = (torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    state = torch.random.get_rng_state()
    seeds = {seed_of(x, index).item() for index in range(64)}
    seeds |= {seed_of(x + x[0, 0] + 1, 0).item(), seed_of(x[:, :50], 0).item(), seed_of(x.flip(0), 0).item()}
    assert len(seeds) == 67
    assert len({s & 0xFFFFFFFF for s in seeds}) == len({s >> 32 for s in seeds}) == 67
    assert torch.equal(seed_of(x, 3), seed_of(x.t().contiguous().t(), 3))  # whatever the layout
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seed_of(x[:0], 3).shape == (1,)


def test_the_operators_come_with_the_others():
    assert ops.exact.SEED_SAMPLE == 1024
