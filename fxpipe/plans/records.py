"""Frozen records read back from JSON, with every type checked. ``dataclasses.asdict`` is the way there."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fxpipe.errors import PlanError

Record = TypeVar("Record")


def record_from(kind: type[Record], data: Any, where: str) -> Record:
    """The record of class ``kind`` that ``asdict`` made ``data`` of; lists become tuples where the class says so.

    Raises:
        PlanError: a field is missing, unknown or of another type; names it, below ``where``.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{where} is {_shown(data)}; expected an object with the fields of {kind.__name__}")
    hints: dict[str, Any] = _hints(cast(Any, kind))
    if odd := sorted(set(data) ^ set(hints)):
        state = "missing" if odd[0] in hints else "unknown"
        raise PlanError(f"{where}: field {odd[0]!r} of {kind.__name__} is {state}; found {sorted(data)}")
    return kind(**{name: _value(hint, data[name], f"{where}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.init}


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return record_from(kind, data, where)  # type: ignore[arg-type]
    if origin is tuple and arguments[1:] == (...,) and isinstance(data, list):
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (dict, Mapping) and isinstance(data, dict):
        return {key: _value(arguments[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    kinds = arguments if origin in (Union, UnionType) else (kind,)
    if type(data) in kinds:
        return data
    if type(data) is int and float in kinds:
        return float(data)
    raise PlanError(f"{where} is {_shown(data)}; expected {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
