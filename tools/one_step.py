"""One training step of a model, and what it keeps for backward: for ``bench_saved_bytes.py`` and ``saved_gradients.py``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def one_step(
    model: nn.Module, compiled: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[float, int, Tensor]:
    """The loss, the bytes saved, each storage once and without parameters and inputs, and all gradients as one vector."""
    given = (t for t in tree_leaves((list(model.parameters()), args, kwargs)) if isinstance(t, Tensor))
    own = {t.untyped_storage().data_ptr() for t in given}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = compiled(*args, **kwargs)
    loss: Tensor = next(t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.ndim == 0)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), sum(stored.values()), gradient
