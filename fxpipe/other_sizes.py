"""A model traced once, with its costs taken at other sizes of its inputs than those of the example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
import torch.utils._pytree as pytree

from fxpipe.errors import OptionError, unknown
from fxpipe.ir.program import Program
from fxpipe.trace import input_path, trace

BATCH = "batch"


@dataclass(frozen=True)
class AskedSize:
    """``size`` for dimension ``dim`` of an input, by its path; of every input that has the batch there, for ``BATCH``."""

    path: str
    dim: int
    size: int


def trace_at(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: Sequence[AskedSize]) -> Program:
    """The program of the example with the asked dimensions symbolic, and ``signature.sizes`` as asked.

    Other inputs that are as large in the same dimension become symbolic there too: a target has the batch and the length of
    its input. Which of them are always equal, ``torch.export`` finds out.

    Raises:
        OptionError: no such input or dimension; the model fixes it, or makes it follow another; two sizes for one.
        TraceError: as ``trace``.
    """
    leaves = pytree.tree_flatten_with_path((args, dict(kwargs), None))[0]
    shapes = {input_path(key): tuple(x.shape) for key, x in leaves if isinstance(x, torch.Tensor)}
    wanted = [one for a in asked for one in _of_inputs(a, shapes)]
    alike = [
        (path, a.dim) for a in wanted for path, shape in shapes.items() if shape[a.dim : a.dim + 1] == _size(shapes, a)
    ]
    dynamic = {path: sorted({dim for p, dim in alike if p == path}) for path, _ in alike}
    program = trace(model, args, kwargs, dynamic=dynamic)
    placeholders = dict(zip(program.signature.paths, program.graph.find_nodes(op="placeholder"), strict=True))
    sizes: dict[str, int] = {}
    for one in wanted:
        symbol = _symbol(placeholders[one.path], one)
        if sizes.setdefault(symbol, one.size) != one.size:
            raise OptionError(
                f"dimension {one.dim} of input {one.path!r} is to be {one.size}, but the model makes it equal to one that is "
                f"to be {sizes[symbol]}; ask for one size"
            )
    signature = replace(program.signature, sizes={**program.signature.sizes, **sizes})
    return replace(program, signature=signature)


def _size(shapes: Mapping[str, tuple[int, ...]], asked: AskedSize) -> tuple[int, ...]:
    return shapes[asked.path][asked.dim : asked.dim + 1]


def _of_inputs(asked: AskedSize, shapes: Mapping[str, tuple[int, ...]]) -> list[AskedSize]:
    """One for each input that is meant."""
    if asked.path == BATCH and BATCH not in shapes:
        batch = next((shape[0] for shape in shapes.values() if shape), None)
        return [AskedSize(path, 0, asked.size) for path, shape in shapes.items() if shape and shape[0] == batch]
    if asked.path not in shapes:
        raise OptionError(unknown("input", asked.path, [*shapes, BATCH]))
    if asked.dim >= len(shapes[asked.path]):
        raise OptionError(
            f"input {asked.path!r} has {len(shapes[asked.path])} dimensions, from 0; dimension {asked.dim} was asked for"
        )
    return [asked]


def _symbol(placeholder: fx.Node, asked: AskedSize) -> str:
    found = placeholder.meta["val"].shape[asked.dim]
    if isinstance(found, torch.SymInt) and found.node.expr.is_symbol:
        return str(found.node.expr)
    raise OptionError(
        f"the model fixes dimension {asked.dim} of input {asked.path!r} at {found}, whatever its size; "
        "give example inputs of the size that you want"
    )
