"""MODEL on the command line: ``package.module:function``, ``file.py:function`` or ``demo:NAME`` -> model and inputs.

The function returns ``(model, example_inputs)``, as ``fxpipe.compile`` takes them. The file or module is run as Python, as an
import would: a MODEL is trusted code.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxpipe.api import call_arguments
from fxpipe.errors import OptionError, unknown

FORMS = "package.module:function, file.py:function or demo:NAME"


class Source(NamedTuple):
    """A model with the positional and keyword arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_model(text: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """Calls the function that ``text`` names, with the keyword ``arguments`` if there are any.

    Raises:
        OptionError: the text has another form; the file, module or function is not there; it returns something else.
            What the file or the function itself raises is passed on as it is.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise OptionError(f"MODEL {text!r} is not of the form {FORMS}")
    return _checked(text, _function(text, place, name)(**(arguments or {})))


def _function(text: str, place: str, name: str) -> Callable[..., object]:
    if place == "demo":
        from fxpipe.demos import demo

        return demo(name)
    module = _file(text, Path(place)) if place.endswith(".py") else _module(text, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise OptionError(f"MODEL {text!r}: {unknown('function', name, known)}")
    return function  # type: ignore[no-any-return]


def _file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"MODEL {text!r}: there is no file {str(path)!r} in {Path.cwd()}")
    name = f"fxpipe_model_{path.stem}"  # its own name, lest a file called random.py hide the library's
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    _search(path.parent)
    sys.modules[name] = module  # classes of the file must be found by their module's name
    loader.exec_module(module)
    return module


def _module(text: str, name: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            raise OptionError(f"MODEL {text!r}: there is no module {error.name!r}; MODEL is {FORMS}") from error
        raise


def _search(folder: Path) -> None:
    """What ``python file.py`` and ``python -m module`` do: the folder's modules can be imported."""
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def _checked(text: str, result: object) -> Source:
    match result:
        case (nn.Module() as model, (Tensor() | tuple() | Mapping()) as inputs):
            args, kwargs = call_arguments(inputs)
            return Source(model, args, dict(kwargs))
    raise OptionError(f"MODEL {text!r} returned {_shape_of(result)}; expected (model, example_inputs)")


def _shape_of(result: object) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(item).__name__ for item in result)})"
    return type(result).__name__
