"""What the user says about stages: modules marked to stay together in one stage, and apart from those of another hint."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch.fx as fx
import torch.nn as nn

from fxpipe.errors import OptionError, PartitionError, unknown
from fxpipe.printing import module_path

_MARK = "_fxpipe_stage_hint"


def stage_hint(module: nn.Module, hint: int | str) -> nn.Module:
    """Marks a module for the cut into stages, and returns it: what has one hint shares a stage, what has two does not.

    The inner mark counts where marked modules are nested. ``Options(stage_hints={...})`` says the same by name.
    """
    setattr(module, _MARK, str(hint))
    return module


def marked(model: nn.Module) -> dict[str, str]:
    """The marks of a model, by the qualified name of each module; that of the model itself is ``""``."""
    return {name: hint for name, module in model.named_modules() if (hint := getattr(module, _MARK, None)) is not None}


def hints_text(hints: Mapping[str, object] | str) -> str:
    """``module=hint;module=hint``, which ``parse_hints`` reads; a text as it is."""
    return hints if isinstance(hints, str) else ";".join(f"{name}={hint}" for name, hint in hints.items())


def parse_hints(text: str) -> dict[str, str]:
    """The hint of each module or node named.

    Raises:
        OptionError: the text is not of that form.
    """
    pairs = [item.rpartition("=") for item in text.split(";") if item]
    for name, equals, hint in pairs:
        if not equals or not hint:
            raise OptionError(f"stage hint {name + hint!r} is not of the form MODULE=HINT")
    return {name: hint for name, _, hint in pairs}


def hints_of(nodes: Sequence[fx.Node], hints: Mapping[str, str]) -> dict[int, str]:
    """The hint of each node that has one, by place in ``nodes``: that of the innermost module named, or of the node itself.

    Raises:
        OptionError: a name is neither a node's nor that of a module that has nodes.
    """
    found: dict[int, str] = {}
    used: set[str] = set()
    for place, node in enumerate(nodes):
        names = [name for name in (node.name, *_modules_around(module_path(node))) if name in hints]
        used |= set(names)
        if names:
            found[place] = hints[names[0]]
    for name in hints:
        if name not in used:
            paths = sorted({module_path(node) for node in nodes} - {""})
            raise OptionError(unknown("module or node of a stage hint", name, paths))
    return found


def _modules_around(path: str) -> Iterable[str]:
    """``a.b.c``, ``a.b``, ``a``, and the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def spans(hints: Mapping[int, str]) -> dict[str, tuple[int, int]]:
    """The first and the last place of each hint, in order.

    Raises:
        PartitionError: two of them overlap, so that no cut of the program order keeps both together and apart.
    """
    found: dict[str, tuple[int, int]] = {}
    for place, hint in sorted(hints.items()):
        found[hint] = (found.get(hint, (place, place))[0], place)
    for (a, (_, last)), (b, (first, _)) in pairwise(found.items()):
        if first <= last:
            raise PartitionError(
                f"stage hints {a!r} and {b!r} overlap in the order of the program: part of {b!r} is computed between parts of "
                f"{a!r}, so they cannot be in two stages; give them one hint"
            )
    return found
