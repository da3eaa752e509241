"""Random bytes: known answers, evenness, and what rounding and decoding at random promise."""

import pytest
import torch

from fxpipe.triton_kernels import BFPFormat, cpu
from fxpipe.triton_kernels.reference import compress, decompress
from fxpipe.triton_kernels.rounding import hashed, philox


def words(seed: int, group: int) -> list[int]:
    return philox(torch.tensor(seed), group, 1, 0).to(torch.uint8).view(torch.int32).flatten().tolist()


def test_philox_gives_the_known_answers():
    """Of Philox2x32 with 7 rounds, from the test vectors of Random123 (kat_vectors)."""
    assert [word % 2**32 for word in words(0, 0)] == [0x257A3673, 0xCD26BE2A]


def test_bytes_depend_on_seed_group_and_purpose_alone():
    seed = torch.tensor(-(2**40) + 5)
    whole = philox(seed, 0, 100, 0)
    assert torch.equal(philox(seed, 60, 40, 0), whole[60:])
    for other in (philox(seed + 1, 0, 100, 0), philox(seed + 2**32, 0, 100, 0), philox(seed, 0, 100, 1)):
        assert (other == whole).double().mean() < 0.05


@pytest.mark.parametrize("make", [lambda n: philox(torch.tensor(1), 0, n // 8, 0), lambda n: hashed(torch.randn(n))])
def test_bytes_are_even(make):
    counts = make(1 << 18).flatten().bincount(minlength=256)
    assert counts.min() > 800  # 1024 on average, 7 standard deviations
    assert counts.max() < 1250


@pytest.mark.parametrize("text", ["bfp4b32+sr", "bfp3b32+e5m3+sr", "bfp4b32+unsigned+sr", "bfp2b16+twos+sr"])
def test_stochastic_rounding_has_no_bias(text):
    """Over many seeds the mean of every value comes back, the largest of a block included; 256 parts of a step remain."""
    fmt = BFPFormat.parse(text)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x = x.abs() + 0.5 * x.abs().max() if fmt.unsigned else x
    total = torch.zeros(64, dtype=torch.float64)
    n = 4000
    for seed in range(n):
        total += decompress(compress(x, fmt, torch.tensor(seed)), fmt, 64, torch.float32).double()
    step = x.abs().max() * 2 / 2**fmt.magnitude_bits * 2
    assert ((total / n - x).abs() < step * (5 / (4 * n) ** 0.5 + 1 / 256)).all()


def test_the_hash_rounds_equal_values_and_their_negatives_alike():
    x = torch.randn(8).repeat(4)
    x[8:16] *= -1
    y = decompress(compress(x, BFPFormat.parse("bfp3b32+hash")), BFPFormat.parse("bfp3b32+hash"), 32, torch.float32)
    assert torch.equal(y[:8], -y[8:16])
    assert torch.equal(y[:8], y[16:24])


@pytest.mark.parametrize("text", ["bfp4b32+dither", "bfp4b32:gauss+e5m3+dither", "bfp4b32+unsigned+dither"])
def test_dither_spreads_over_the_cell(text):
    """Decoded values fill their cell evenly: their mean is its middle, to which they decode without dither."""
    fmt = BFPFormat.parse(text)
    plain = BFPFormat.parse(text.replace("+dither", ""))
    x = (torch.arange(32.0) / 31).repeat(2000)
    planes = compress(x, fmt)
    y = decompress(planes, fmt, x.numel(), torch.float32, torch.tensor(9)).view(2000, 32)
    middle = decompress(planes, plain, x.numel(), torch.float32)[:32]
    assert ((y.mean(dim=0) - middle).abs() < 0.02).all()
    assert (y.std(dim=0)[4:-1] > 0.02).all()


def test_density_lies_nearer_to_zero():
    x = torch.randn(1 << 14)
    means = []
    for kind in ("dither", "dither-density"):
        fmt = BFPFormat.parse(f"bfp3b32+{kind}")
        y = decompress(compress(x, fmt), fmt, x.numel(), torch.float32, torch.tensor(2))
        means.append(y.abs().mean())
    assert means[1] < 0.97 * means[0]


@pytest.mark.parametrize("text", ["bfp4b32+sr+dither", "bfp3b8:learned+e4+o1+dither-density", "bfp2b128+e5+search"])
def test_parts_are_stored_as_in_the_whole(text, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    fmt, seed = BFPFormat.parse(text), torch.tensor(77)
    for n in (0, 1, 1024, 3000):
        x = torch.randn(n)
        planes = compress(x, fmt, seed)
        assert all(map(torch.equal, cpu.compress(x, fmt, seed), planes))
        assert torch.equal(
            cpu.decompress(planes, fmt, n, torch.float32, seed), decompress(planes, fmt, n, torch.float32, seed)
        )
