"""Which format for which value: one for all, or one for each pattern of names."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fxpipe.errors import FormatError, OptionError
from fxpipe.triton_kernels.format import BFPFormat, FormatError as CannotBe

DEFAULT = "default"
NONE = "none"
MOST_NAMES = 40
"""An error lists so many names of a kind."""

FormatText = str | None | Mapping[str, str | None]


@dataclass(frozen=True)
class Names:
    """What a saved value may be called: its node's name, the operator that computed it, the path of the module it is of."""

    value: str
    operator: str
    module: str = ""

    def match(self, pattern: str) -> bool:
        """Whether the pattern is of one of the names, or of a module that encloses the value's (``layers.0``, ``*.mlp.*``)."""
        parts = self.module.split(".") if self.module else []
        modules = (".".join(parts[: n + 1]) for n in range(len(parts)))
        names = (self.value, self.operator, self.operator.removesuffix(".default"), f".{self.module}.", *modules)
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class FormatRules:
    """Patterns (``fnmatch``), each with the format of the values that it is the first to match; ``default`` for the others.

    A format of ``None`` keeps the value as it is. The text is ``PATTERN=FORMAT,...,default=FORMAT``, ``none`` for no format;
    ``parse`` inverts ``str``. One format for all is its own text.
    """

    rules: tuple[tuple[str, BFPFormat | None], ...] = ()
    default: BFPFormat | None = None

    @staticmethod
    def parse(given: FormatText) -> "FormatRules":
        """The rules of a format's text, of such a text of rules, or of a mapping from patterns to formats' texts.

        Without a ``default`` other values are kept.

        Raises:
            OptionError: neither, or a pattern is empty, comes twice or holds a ``,``, ``=`` or ``'``.
            FormatError: a text names no format; the message lists what is legal.
        """
        rules: dict[str, BFPFormat | None] = {}
        for pattern, text in _items(given):
            if not pattern or set(pattern) & set(",='"):
                raise OptionError(
                    f"option format has the pattern {pattern!r}; expected one of a node, operator or module path, "
                    "such as '*.mlp.*', or 'default', without ',', '=' or quotes"
                )
            if pattern in rules:
                raise OptionError(f"option format has {pattern!r} more than once; the first would hide the other")
            rules[pattern] = _format(pattern, text)
        default = rules.pop(DEFAULT, None)
        return FormatRules(tuple(rules.items()), default)

    def __str__(self) -> str:
        if not self.rules:
            return _text(self.default)
        pairs = [*self.rules, *([(DEFAULT, self.default)] if self.default else [])]
        return ",".join(f"{pattern}={_text(format)}" for pattern, format in pairs)

    @property
    def text(self) -> str | None:
        """The text, ``None`` where nothing is compressed."""
        return None if self == FormatRules() else str(self)

    def of(self, names: Names) -> BFPFormat | None:
        """The format of the value that has these names."""
        return next((format for pattern, format in self.rules if names.match(pattern)), self.default)

    def unmatched(self, values: Collection[Names]) -> str:
        """Says which patterns are of none of these values, and what values there are; empty if there is no such pattern."""
        lost = [pattern for pattern, _ in self.rules if not any(v.match(pattern) for v in values)]
        if not lost:
            return ""
        kinds = {"modules": "module", "operators": "operator", "values": "value"}
        there = "; ".join(f"{kind} {_listed(getattr(v, field) for v in values)}" for kind, field in kinds.items())
        return f"format pattern {lost[0]!r} matches none of the {len(values)} values that are saved for backward; of {there}"


def _items(given: object) -> Iterator[tuple[str, object]]:
    if isinstance(given, str):
        for part in given.split(",") if "=" in given or "," in given else [given]:
            pattern, eq, format = part.rpartition("=")
            yield (pattern.strip() if eq else DEFAULT), format.strip()
    elif isinstance(given, Mapping) and all(isinstance(pattern, str) for pattern in given):
        yield from given.items()
    elif given is not None:
        raise _refusal(given)


def _format(pattern: str, text: object) -> BFPFormat | None:
    if text is None or text == NONE:
        return None
    if not isinstance(text, str):
        raise _refusal({pattern: text})
    try:
        return BFPFormat.parse(text)
    except CannotBe as e:
        raise FormatError(str(e) if pattern == DEFAULT else f"pattern {pattern!r}: {e}") from e


def _refusal(found: object) -> OptionError:
    return OptionError(
        f"option format is a text such as 'bfp8b32', a mapping from patterns to such texts, or None; found {found!r}"
    )


def _text(format: BFPFormat | None) -> str:
    return NONE if format is None else str(format)


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(filter(None, names)))
    rest = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return (", ".join(found[:MOST_NAMES]) or "none") + rest
