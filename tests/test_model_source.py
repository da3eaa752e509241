import re

import pytest
import torch

from fxpipe.errors import OptionError
from fxpipe.model_source import load_model

MODEL_FILE = """
import torch
from sibling import WIDTH

def build():
    return torch.nn.Linear(WIDTH, 2), (torch.ones(1, WIDTH),)

def wrong():
    return torch.nn.Linear(2, 2)

def pair():
    return torch.nn.Linear(2, 2), 3

def broken():
    raise RuntimeError("the user's own error")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text(MODEL_FILE)
    (tmp_path / "sibling.py").write_text("WIDTH = 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_beside_its_own_modules(folder):
    import random

    model, args, kwargs = load_model("random.py:build")
    assert model(*args, **kwargs).shape == (1, 2)
    assert random.random() < 1, "the file's name hides no module"


def test_a_module_and_a_demo():
    by_module, by_demo = load_model("fxpipe.demos.plain:mlp"), load_model("demo:mlp", {"batch": 16})
    assert torch.equal(by_module.model(*by_module.args), by_demo.model(*by_demo.args))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt", "MODEL 'gpt' is not of the form package.module:function, file.py:function or demo:NAME"),
        ("demo:", "MODEL 'demo:' is not of the form"),
        (":build", "MODEL ':build' is not of the form"),
        ("demo:resnet", "unknown demo 'resnet'; known: bert, cnn"),
        ("absent.py:build", "MODEL 'absent.py:build': there is no file 'absent.py' in "),
        ("random.py:bild", "MODEL 'random.py:bild': unknown function 'bild'; known: broken, build, pair, wrong"),
        ("random.py:wrong", "MODEL 'random.py:wrong' returned Linear; expected (model, example_inputs)"),
        ("random.py:pair", "MODEL 'random.py:pair' returned (Linear, int); expected (model, example_inputs)"),
        ("absent.module:build", "MODEL 'absent.module:build': there is no module 'absent'; MODEL is package.module"),
        ("fxpipe.absent:build", "MODEL 'fxpipe.absent:build': there is no module 'fxpipe.absent'"),
    ],
)
def test_a_wrong_model_says_what_is_expected(folder, text, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        load_model(text)


def test_the_functions_own_error_is_passed_on(folder):
    with pytest.raises(RuntimeError, match="the user's own error"):
        load_model("random.py:broken")


def test_a_module_that_misses_another_passes_the_error_on(folder):
    (folder / "needs.py").write_text("import not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        load_model("needs:build")
