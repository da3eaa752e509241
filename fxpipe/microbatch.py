"""Cutting the inputs of a step into microbatches along the batch dimension."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from fxpipe.errors import InputError
from fxpipe.ir.program import Signature


@dataclass(frozen=True)
class Microbatches:
    """How a step's inputs are cut: ``n`` equal parts of dimension 0, of size ``batch_size``, of every input marked ``batched``.

    The other inputs (no dimension, or size 1 there) go whole to every microbatch.
    """

    n: int
    batch_size: int
    batched: tuple[bool, ...]

    @staticmethod
    def of(leaves: Sequence[torch.Tensor], paths: Sequence[str], n: int) -> "Microbatches":
        """Finds the batch dimension in example inputs: dimension 0 of the first input that has one of more than 1.

        Raises:
            InputError: the batch is not divisible by ``n``, or an input fits neither the batch nor 1.
        """
        sizes = [int(x.shape[0]) if x.dim() else 1 for x in leaves]
        batch = next((s for s in sizes if s > 1), 1)
        for path, size in zip(paths, sizes, strict=True):
            if size not in (1, batch):
                raise InputError(
                    f"input {path!r} has {size} rows, but the batch has {batch} (from the first input); "
                    "every tensor's dimension 0 must be the batch, or 1"
                )
        if batch % n:
            raise InputError(
                f"{n} microbatches do not divide the batch of {batch}; choose a batch that is a multiple of {n}, "
                f"or one of {', '.join(str(d) for d in range(1, batch + 1) if batch % d == 0)} microbatches"
            )
        return Microbatches(n, batch, tuple(batch > 1 and s == batch for s in sizes))

    def split(self, leaves: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """For each microbatch its part of every input, as views."""
        size = self.batch_size // self.n
        return [
            [x[i * size : (i + 1) * size] if cut else x for x, cut in zip(leaves, self.batched, strict=True)]
            for i in range(self.n)
        ]


def tensor_leaves(
    signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any
) -> list[torch.Tensor]:
    """The tensor leaves of a call, after checking that it has the structure and the constants of the traced one.

    Raises:
        InputError: naming the input that differs, what was expected and what was found.
    """
    order = signature.in_spec.child(1).context
    known = {k: kwargs[k] for k in order if k in kwargs}
    extra = sorted(set(kwargs) - set(order))
    missing = sorted(set(order) - set(kwargs))
    if extra or missing or len(args) != signature.in_spec.child(0).num_children:
        raise InputError(
            f"step takes {signature.in_spec.child(0).num_children} positional inputs and {list(order)} by keyword; "
            f"found {len(args)} positional, missing {missing}, unknown {extra}"
        )
    leaves, spec = pytree.tree_flatten((args, known, target))
    if spec != signature.in_spec:
        raise InputError(
            f"the inputs are nested differently from the traced ones: expected {signature.in_spec}, found {spec}"
        )
    constants = dict(signature.constants)
    for i, value in constants.items():
        if isinstance(leaves[i], torch.Tensor) or leaves[i] != value:
            raise InputError(
                f"input leaf {i} was the constant {value!r} when traced, now {leaves[i]!r}; compile again for it"
            )
    tensors = [x for i, x in enumerate(leaves) if i not in constants]
    for path, x in zip(signature.paths, tensors, strict=True):
        if not isinstance(x, torch.Tensor):
            raise InputError(f"input {path!r} is {type(x).__name__}; expected a tensor, as when traced")
    return tensors


def check_shapes(signature: Signature, examples: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> None:
    """Checks dtype and shape of every tensor of one microbatch against the traced example's.

    Raises:
        InputError: naming the input, what was expected and what was found.
    """
    for path, example, x in zip(signature.paths, examples, leaves, strict=True):
        if x.dtype != example.dtype or tuple(x.shape) != tuple(example.shape):
            raise InputError(
                f"input {path!r} has {x.dtype} {list(x.shape)} in a microbatch; the plan was made for {example.dtype} "
                f"{[int(d) for d in example.shape]}; give inputs of that shape or compile again"
            )
