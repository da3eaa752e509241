"""What Inductor makes of stored values: read in the code that it generates, and in the gradients."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

# Inductor's own, on its first import
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def convolutions() -> nn.Module:
    """The last ReLU is followed by no convolution: of it, backward needs the mask alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def code_and_gradients(model: nn.Module, x: torch.Tensor, format: str | None) -> tuple[str, list[torch.Tensor]]:
    torch._dynamo.reset()
    model.zero_grad()
    compiled = torch.compile(model, backend="fxpipe", options={"format": format, "on_plan": lambda _: None})

    def step() -> None:
        compiled(x).square().sum().backward()

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    return "\n".join(codes), [p.grad.clone() for p in model.parameters()]


def calls(code: str, operator: str) -> list[str]:
    return [line for line in code.splitlines() if f"torch.ops.fxpipe.{operator}.default(" in line]


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_values_of_convolutions_are_stored_in_the_layout_that_inductor_gives_them():
    model, x = convolutions(), torch.randn(4, 3, 16, 16)
    code, gradients = code_and_gradients(model, x, "bfp8b32")
    stored = calls(code, "bfp_compress") + calls(code, "bfp_decompress")
    assert len(stored) >= 4
    assert all("[0, 2, 3, 1]" in line for line in stored)
    _, expected = code_and_gradients(model, x, None)
    for found, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_masks_pass_between_loops_and_bits_as_bytes():
    model, x = convolutions(), torch.randn(4, 3, 16, 16)
    code, _ = code_and_gradients(model, x, "bfp8b32")
    assert calls(code, "pack_bools")
    assert all(", True)" in line for line in calls(code, "unpack_bools"))
    assert "torch.bool" not in code


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_relu_after_a_batch_norm_is_not_written_for_its_mean_and_its_mask():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    code, _ = code_and_gradients(model, torch.randn(4, 3, 16, 16), "bfp8b32")
    assert code.count("clamp_min(") == 2  # for each of the two, rather than once to memory


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_mask_that_is_an_input_is_packed_as_it_is():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.sin(x @ self.weight) > 0.2, x @ self.weight, 0.0)

    model, x = Masked(), torch.randn(256, 64)
    _, gradients = code_and_gradients(model, x, "bfp8b32")
    _, expected = code_and_gradients(model, x, None)
    assert torch.equal(gradients[0], expected[0])  # the mask is all that is saved
