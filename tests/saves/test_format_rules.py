"""Formats by pattern: which format a value gets, the text both ways, what is wrong with a pattern."""

import re

import pytest

from fxpipe.errors import FormatError, OptionError
from fxpipe.pass_base import parse_pass
from fxpipe.passes.compress import ChooseSavePoints
from fxpipe.pipeline import PASSES, Options
from fxpipe.saves.format_rules import FormatRules, Names

MLP = Names("mm_7", "aten.mm.default", "model.layers.10.mlp.gate")
RELU = Names("relu_2", "aten.relu.default", "stem")
TOP = Names("getitem_3", "aten.max_pool2d_with_indices.default")


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.mlp.*", [MLP]),
        ("*.mlp", [MLP]),
        ("model.layers.1*", [MLP]),
        ("model.layers.1", []),
        ("model", [MLP]),
        ("stem", [RELU]),
        ("*.stem.*", [RELU]),
        ("gate", []),
        ("aten.relu.default", [RELU]),
        ("aten.relu", [RELU]),
        ("aten.*", [MLP, RELU, TOP]),
        ("getitem_[0-3]", [TOP]),
        ("getitem", []),
        ("*", [MLP, RELU, TOP]),
    ],
)
def test_match(pattern, matched):
    assert [v for v in (MLP, RELU, TOP) if v.match(pattern)] == matched


def test_the_first_match_counts():
    rules = FormatRules.parse({"*.mlp.*": "bfp4b32", "aten.*": "none", "model": "bfp2b32", "default": "bfp8b32"})
    assert [str(rules.of(v)) for v in (MLP, RELU, Names("x", "placeholder"))] == ["bfp4b32", "None", "bfp8b32"]
    assert FormatRules.parse({"stem": "bfp4b32"}).of(MLP) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, None),
        ("none", None),
        ({}, None),
        ({"default": None}, None),
        ("bfp4b32:gauss+e6m2", "bfp4b32:gauss+e6m2"),
        ({"default": "bfp4b32"}, "bfp4b32"),
        ({"default": "bfp8b32", "*.mlp.*": "bfp4b32:gauss+e6m2"}, "*.mlp.*=bfp4b32:gauss+e6m2,default=bfp8b32"),
        ("a=bfp4b32, b=none", "a=bfp4b32,b=none"),
        ("bfp8b32,a=none", "a=none,default=bfp8b32"),
    ],
)
def test_text(given, text):
    rules = FormatRules.parse(given)
    assert rules.text == text
    assert FormatRules.parse(str(rules)) == rules


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            4,
            OptionError,
            "option format is a text such as 'bfp8b32', a mapping from patterns to such texts, or None; found 4",
        ),
        ({3: "bfp4b32"}, OptionError, "found {3: 'bfp4b32'}"),
        ({"a": ["bfp4b32"]}, OptionError, "found {'a': ['bfp4b32']}"),
        ("bfp9b32", FormatError, "format 'bfp9b32' cannot be"),
        ("a=bfp9b32", FormatError, "pattern 'a': format 'bfp9b32' cannot be"),
        ("=bfp4b32", OptionError, "the pattern ''; expected one of a node, operator or module path"),
        ({"a,b": "bfp4b32"}, OptionError, "the pattern 'a,b'"),
        ("a=bfp4b32,a=none", OptionError, "option format has 'a' more than once"),
        ("bfp4b32,bfp8b32", OptionError, "option format has 'default' more than once"),
    ],
)
def test_what_cannot_be(given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FormatRules.parse(given)


def test_a_pattern_of_no_value_is_told_with_what_there_is():
    rules = FormatRules.parse({"stem": "bfp4b32", "*.mpl.*": "none"})
    assert rules.unmatched([MLP, RELU, TOP]) == (
        "format pattern '*.mpl.*' matches none of the 3 values that are saved for backward; of modules "
        "model.layers.10.mlp.gate, stem; operators aten.max_pool2d_with_indices.default, aten.mm.default, "
        "aten.relu.default; values getitem_3, mm_7, relu_2"
    )
    many = [Names(f"v{i:02}", "aten.mm.default") for i in range(42)]
    assert rules.unmatched(many).endswith(", v39 and 2 more")
    assert FormatRules.parse({"*.mlp.*": "none"}).unmatched([MLP]) == ""


def test_options_keep_the_text():
    options = Options(format={"*.mlp.*": "bfp4b32", "default": "bfp8b32"})
    assert options == Options(format="*.mlp.*=bfp4b32,default=bfp8b32")
    assert hash(options) == hash(Options(format="*.mlp.*=bfp4b32,bfp8b32"))
    assert Options(format="none").format is None


def test_the_pass_is_spelled_with_its_rules():
    step = ChooseSavePoints(format="*.mlp.*=bfp4b32,default=bfp8b32", min_bytes=1, exact_forms=False)
    assert str(step) == ("choose-save-points{format='*.mlp.*=bfp4b32,default=bfp8b32',min_bytes=1,exact_forms=false}")
    assert parse_pass(str(step), PASSES) == step
