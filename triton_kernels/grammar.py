"""The text of formats, both ways: ``bfp{width}b{block}[:codebook][+option...]``, one text for each format.

Imports no torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .codebooks import NAMES
from .scales import SCALES

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
BLOCKS = (8, 16, 32, 64, 128)

# Options stand in this order, one of each line at most: text -> the field of ``BFPFormat`` and its value there.
_CHOICES: tuple[dict[str, tuple[str, object]], ...] = (
    {"twos": ("twos", True), "unsigned": ("unsigned", True)},
    {name: ("scale", name) for name in SCALES if name != "e8"},
    {"search": ("search", True), "absmax": ("absmax", True)},
    {name: ("rounding", name) for name in ("sr", "hash", "trunc")},
    {},  # o{k} or o{k}t{j}
    {"dither": ("dither", "uniform"), "dither-density": ("dither", "density")},
)
_OUTLIERS_PLACE = 4

_TEXT = re.compile(
    r"bfp(?P<width>0|[1-9]\d{0,3})b(?P<size>(?:0|[1-9]\d{0,3})(?:x(?:0|[1-9]\d{0,3}))?)"
    r"(?::(?P<codebook>[^+:]*))?(?P<options>(?:\+[^+]*)*)",
    re.ASCII,
)
_OUTLIERS = re.compile(r"o([1-9]\d{0,2})(?:t([1-9]\d?))?", re.ASCII)


class FormatError(ValueError):
    """A text names no format, or a format cannot exist."""


def fields_of(text: str) -> dict[str, Any]:
    """The fields of the ``BFPFormat`` that ``text`` names, those at their defaults left out.

    Raises:
        FormatError: ``text`` is not of the shape of a format's text. What it says may still be impossible.
    """
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise refusal(text, "it is not of that shape")
    rows, _, columns = match["size"].rpartition("x")
    fields: dict[str, Any] = {"width": int(match["width"]), "block": int(columns)}
    if rows:
        fields |= {"rows": int(rows), "block": int(rows) * int(columns)}
        if fields["block"] not in BLOCKS:
            raise refusal(text, f"the block is {rows} x {columns} values")
    if match["codebook"] is not None:
        if not match["codebook"]:
            raise refusal(text, "the codebook has no name")
        fields["codebook"] = match["codebook"]
    return fields | _options(text, match["options"].split("+")[1:])


def _options(text: str, options: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    places: list[int] = []
    for option in options:
        place, values = _option(text, option)
        if place in places:
            before = options[places.index(place)]
            again = "is given more than once" if before == option else f"excludes '+{before}'"
            raise refusal(text, f"option '+{option}' {again}")
        places.append(place)
        fields |= values
    if places != sorted(places):
        right = "".join(f"+{options[places.index(place)]}" for place in sorted(places))
        raise refusal(text, f"its options are out of order, which is '{right}'")
    return fields


def _option(text: str, option: str) -> tuple[int, dict[str, Any]]:
    """The place of an option in the order, and the fields that it sets."""
    for place, choices in enumerate(_CHOICES):
        if option in choices:
            field, value = choices[option]
            return place, {field: value}
    match = _OUTLIERS.fullmatch(option)
    if match is None:
        raise refusal(text, f"unknown option '+{option}'")
    return _OUTLIERS_PLACE, {"outliers": int(match[1]), "outlier_threshold": int(match[2] or 0)}


def text_of(fields: Mapping[str, Any]) -> str:
    """The text of the format that has these fields, all of them; inverts ``fields_of``."""
    rows, block = fields["rows"], fields["block"]
    text = f"bfp{fields['width']}b{rows}x{block // rows}" if rows else f"bfp{fields['width']}b{block}"
    if fields["codebook"]:
        text += f":{fields['codebook']}"
    for place, choices in enumerate(_CHOICES):
        text += "".join(f"+{option}" for option, (field, value) in choices.items() if fields[field] == value)
        if place == _OUTLIERS_PLACE and fields["outliers"]:
            text += f"+o{fields['outliers']}"
            text += f"t{fields['outlier_threshold']}" if fields["outlier_threshold"] else ""
    return text


def refusal(text: object, reason: str) -> FormatError:
    """The error that shows the text, why no format has it, and what is legal."""
    options = [*(name for choices in _CHOICES for name in choices)]
    options[-2:-2] = ["o{k}", "o{k}t{j}"]
    return FormatError(
        f"format {text!r} cannot be: {reason}; a format is bfp{{width}}b{{block}}[:codebook][+option...], "
        f"width one of {listed(WIDTHS)}, block one of {listed(BLOCKS)} or {{rows}}x{{columns}} with such a product, "
        f"codebook one of {listed(NAMES)} or levels as two hexadecimal digits each, "
        f"option one of {listed(f'+{name}' for name in options)}, in this order, "
        "such as 'bfp4b32' or 'bfp4b32:gauss+e5m3+search'"
    )


def listed(values: Iterable[object]) -> str:
    """``a, b, c``"""
    return ", ".join(map(str, values))
