"""Class Pass: a named, frozen value; ``run(program) -> program``; its text is its spelling."""

import dataclasses
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar, get_type_hints

from fxpipe.errors import OptionError, unknown
from fxpipe.ir.program import Program


@dataclasses.dataclass(frozen=True)
class Pass(ABC):
    """One step from program to program.

    A subclass is a frozen dataclass whose fields are its options. ``requires`` and ``provides`` are classes of facts,
    ``preserves`` the facts that survive its rewrite of the graph, ``exact`` whether every number stays bitwise the same,
    ``rewrites`` whether it may edit the graph: one that only decides gets the program itself and no copy.
    Copying, timing, verifying, recording and dumping are the pass manager's.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()
    exact: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    @abstractmethod
    def run(self, program: Program) -> Program:
        """Returns the new program; the given one is not changed."""

    def __str__(self) -> str:
        """``partition-stages{n_stages=2,objective=time}``: the options that differ from their default; parse inverts it."""
        options = [
            f"{f.name}={_print_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.repr and getattr(self, f.name) != f.default
        ]
        return self.name + ("{" + ",".join(options) + "}" if options else "")

    @classmethod
    def parse_options(cls, text: str) -> "Pass":
        """Builds the pass from the text between the braces; raises OptionError for an unknown option or a bad value."""
        fields = {f.name: f for f in dataclasses.fields(cls) if f.repr}
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for item in filter(None, _split(text)):
            key, eq, value = item.partition("=")
            if key not in fields:
                raise OptionError(f"{cls.name}: {unknown('option', key, fields)}")
            if not eq or key in values:
                raise OptionError(
                    f"{cls.name}: option {key} is given {'twice' if eq else 'no value'}; write {key}=VALUE once"
                )
            values[key] = _parse_value(cls.name, key, value, hints[key])
        return cls(**values)


def _split(text: str) -> list[str]:
    """At commas before ``name=`` that stand outside of quotes."""
    return re.split(r",(?=\w+=)(?=(?:[^']*'[^']*')*[^']*$)", text)


def _print_value(value: object) -> str:
    if isinstance(value, str) and len(_split(value)) > 1:
        return f"'{value}'"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _parse_value(pass_name: str, key: str, value: str, hint: Any) -> Any:
    kinds = getattr(hint, "__args__", (hint,))
    if value == "none" and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            if kind is bool:
                return {"true": True, "false": False}[value]
            if kind is str:
                return value[1:-1] if re.fullmatch(r"'.*'", value) else value
            if kind in (int, float):
                return kind(value)
        except (ValueError, KeyError):
            continue
    expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise OptionError(f"{pass_name}: option {key} is {value!r}; expected {expected}")


def parse_pass(text: str, known: dict[str, type[Pass]]) -> Pass:
    """The inverse of ``str(pass)`` over the passes in ``known`` (by name)."""
    match = re.fullmatch(r"([\w-]+)(?:\{(.*)\})?", text.strip())
    if not match or match[1] not in known:
        raise OptionError(unknown("pass", match[1] if match else text, known))
    return known[match[1]].parse_options(match[2] or "")
