"""The demo models at the sizes that the tests of the runtime use, and PyTorch's own step on them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from models import build
from torch import Tensor, nn

TRANSFORMER = {"length": 16, "width": 32, "n_layers": 2, "n_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {"size": 8, "channels": 8, "n_blocks": 2},
    "unet": {"size": 8, "channels": 4},
    "tied": {"n_layers": 2},
    "multi": {},
    "gpt": TRANSFORMER,
    "llama": TRANSFORMER,
    "bert": TRANSFORMER,
    "vit": {"width": 32, "n_layers": 2, "n_heads": 2},
    "t5": {**TRANSFORMER, "n_layers": 1},
}


def small(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A small demo model with its inputs."""
    return build(name, **SIZES[name])


def small_without_dropout(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The same without random numbers, whose order differs between a batch and its microbatches."""
    model, args, kwargs = build(name, **SIZES[name], **({"dropout": 0.0} if name in ("bert", "t5") else {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, args, kwargs


def loss_of(output: Any) -> Tensor:
    """The loss among a demo model's outputs."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output["loss"]


def eager(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_microbatches: int = 1
) -> tuple[Tensor, nn.Module]:
    """Loss of an eager step, and a copy of the model with its gradients and buffers; the mean over microbatches."""
    twin = copy.deepcopy(model)
    losses = []
    for i in range(n_microbatches):

        def part(x: Any, i: int = i) -> Any:
            return x.chunk(n_microbatches)[i]

        loss = loss_of(twin(*map(part, args), **{k: part(v) for k, v in kwargs.items()}))
        (loss / n_microbatches).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), twin


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by parameter."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def unequal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names whose tensors are not bitwise equal."""
    return sorted(
        n for n in {*found, *expected} if n not in found or n not in expected or not torch.equal(found[n], expected[n])
    )


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of a tensor relative to its norm, or to a hundredth of the norm of all where that is more.

    (Some gradients are zero but for rounding: that of the bias of an attention's keys.)
    """
    assert set(found) == set(expected)
    whole = torch.stack([e.double().norm() for e in expected.values()]).norm()
    return max(
        ((found[n].double() - e.double()).norm() / torch.maximum(e.double().norm(), whole / 100)).item()
        for n, e in expected.items()
    )
