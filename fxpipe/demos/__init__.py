"""The demo models: what ``demo:NAME`` means on the command line, and what the tests run on.

Each is a function that returns ``(model, example_inputs)``: the model in train mode with the loss among its outputs,
and a tuple of positional or a dict of keyword inputs. The same ``seed`` gives the same weights and inputs on every
call, and the caller's random state is left alone. Sizes are small enough for a CPU and can all be changed by keyword.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from fxpipe.demos import hugging_face, plain
from fxpipe.errors import OptionError, unknown

Inputs = tuple[Any, ...] | dict[str, Any]
Demo = Callable[..., tuple[nn.Module, Inputs]]

DEMOS: dict[str, Demo] = {
    "mlp": plain.mlp,
    "cnn": plain.cnn,
    "unet": plain.unet,
    "tied": plain.tied,
    "multi": plain.multi,
    "gpt": hugging_face.gpt,
    "llama": hugging_face.llama,
    "bert": hugging_face.bert,
    "vit": hugging_face.vit,
    "t5": hugging_face.t5,
}


def demo(name: str) -> Demo:
    """The demo of this name; raises OptionError with the known names when there is none."""
    if name not in DEMOS:
        raise OptionError(unknown("demo", name, DEMOS))
    return DEMOS[name]
