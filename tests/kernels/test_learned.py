"""Codebooks fitted to data."""

import pytest
import torch

from fxpipe.triton_kernels import BFPFormat, FormatError, codebooks
from fxpipe.triton_kernels.learned import learn_codebook, levels_of
from fxpipe.triton_kernels.reference import compress, decompress


def error(x: torch.Tensor, fmt: BFPFormat) -> float:
    return float((x - decompress(compress(x, fmt), fmt, x.numel(), x.dtype)).square().sum() / x.square().sum())


@pytest.mark.parametrize("text", ["bfp3b32+e5m3", "bfp4b32+e5m3", "bfp2b32:gauss+se5m2", "bfp3b32+unsigned+e5m3"])
def test_on_gaussian_values_a_fit_is_as_good_as_the_table(text):
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
    fmt = BFPFormat.parse(text)
    x = x.relu() if fmt.unsigned else x
    fitted = learn_codebook(x, fmt)
    assert BFPFormat.parse(str(fitted)) == fitted
    assert len(fitted.levels) == fitted.n_levels
    sign, _, rest = text.partition("+")
    table = BFPFormat.parse(text if ":" in text else f"{sign}:gauss+{rest}")
    assert error(x, fitted) < 1.05 * error(x, table)


def test_on_other_values_it_is_better():
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.gelu(x)
    gauss = BFPFormat.parse("bfp2b32:gauss+se5m2")
    assert error(x, learn_codebook(x, gauss)) < 0.9 * error(x, gauss)
    assert error(x, BFPFormat.parse("bfp2b32:learned+se5m2")) < 0.9 * error(x, gauss)


def test_values_on_few_levels_are_found_exactly():
    levels = torch.tensor([20.0, 90.0, 150.0, 255.0]) / 128
    generator = torch.Generator().manual_seed(0)
    x = levels[torch.randint(0, 4, (4096,), generator=generator)] * torch.randn(4096, generator=generator).sign()
    x[::16] = levels[3]
    fitted = learn_codebook(x, BFPFormat.parse("bfp3b16"))
    assert fitted.levels == (20, 90, 150, 255)
    assert error(x, fitted) == 0


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(100), torch.full((100,), torch.nan)])
def test_without_values_to_fit_the_gaussian_levels_stay(x):
    fmt = BFPFormat.parse("bfp3b16:learned+e5m3")
    assert levels_of(x, fmt) == fmt.levels == codebooks.gauss(2, 16, unsigned=False, power_of_two=False)


def test_what_cannot_have_a_codebook_is_refused():
    with pytest.raises(FormatError, match="a codebook has at most 16 levels"):
        learn_codebook(torch.randn(64), BFPFormat.parse("bfp8b32"))
