"""The models that the parametrised tests run on, small and seeded.

@pytest.mark.parametrize("name", MODELS)
def test_something(name):
    model, args, kwargs = build(name)
"""

from typing import Any

from torch import nn

from fxpipe.demos import DEMOS, demo

MODELS = tuple(DEMOS)
HUGGING_FACE = ("gpt", "llama", "bert", "vit", "t5")
SMALL = ("mlp", "cnn", "unet", "tied", "multi", "gpt")


def build(name: str, **sizes: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A fresh model in train mode with its positional and keyword inputs; ``sizes`` go to the demo's function."""
    model, inputs = demo(name)(**sizes)
    return (model, (), inputs) if isinstance(inputs, dict) else (model, inputs, {})
