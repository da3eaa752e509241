"""A digest of a model: whether a plan still fits it."""

import hashlib
import inspect
from collections.abc import Iterable

from torch import Tensor, nn


def model_digest(model: nn.Module) -> dict[str, str]:
    """Digests of what a plan depends on, by aspect: so that a difference can be named.

    ``structure``: the module tree with each module's plain settings and mode. ``parameters``, ``buffers``: name, shape,
    dtype, and which names share one tensor. ``code``: the source of every module class that has source.
    """
    return {
        "structure": _hash(f"{name} {_settings(m)}" for name, m in model.named_modules()),
        "parameters": _tensors(model.named_parameters(remove_duplicate=False)),
        "buffers": _tensors(model.named_buffers(remove_duplicate=False)),
        "code": _hash(sorted(map(_source, {type(m) for m in model.modules()}))),
    }


def _settings(module: nn.Module) -> str:
    """What the module says of itself, and its plain attributes (``num_heads``, ``training``): constants of its graph."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, int | float | str | None)}
    return f"{type(module).__qualname__} {module.extra_repr()} {sorted(plain.items())}"


def _tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    first: dict[int, str] = {}
    return _hash(
        f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad} {first.setdefault(id(t), name)}" for name, t in named
    )


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # built in, or typed at a prompt
        return kind.__qualname__


def _hash(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()[:16]
