"""class Pass: a frozen value whose text is its spelling."""

import dataclasses
from typing import ClassVar

import pytest

from fxpipe.errors import OptionError
from fxpipe.pass_base import Pass, parse_pass
from fxpipe.pipeline import PASSES


@dataclasses.dataclass(frozen=True)
class Example(Pass):
    """Every kind of option."""

    name: ClassVar[str] = "make-example"
    count: int = 1
    rate: float = 0.5
    fast: bool = False
    text: str = "a"
    limit: int | None = None
    label: str | None = None
    secret: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    def run(self, program):
        return program


KNOWN = {"make-example": Example}

SPELLINGS = [
    ("make-example", Example()),
    ("make-example{count=3}", Example(count=3)),
    ("make-example{rate=1e-05,fast=true}", Example(rate=1e-5, fast=True)),
    ("make-example{text=x y,limit=7,label=b}", Example(text="x y", limit=7, label="b")),
    ("make-example{text=a,b,label=}", Example(text="a,b", label="")),
]


@pytest.mark.parametrize(("text", "value"), SPELLINGS)
def test_text_and_value(text, value):
    assert str(value) == text
    assert parse_pass(text, KNOWN) == value


@pytest.mark.parametrize("text", ["make-example{}", " make-example ", "make-example{limit=none,fast=false}"])
def test_other_spellings_of_the_default(text):
    assert parse_pass(text, KNOWN) == Example()


def test_what_is_no_option_has_no_spelling():
    assert str(Example(secret=(1,))) == "make-example"
    with pytest.raises(OptionError, match="unknown option 'secret'"):
        parse_pass("make-example{secret=1}", KNOWN)


@pytest.mark.parametrize("kind", PASSES.values(), ids=PASSES)
def test_every_pass_is_a_frozen_named_value(kind):
    one = kind()
    assert dataclasses.fields(one) is not None
    assert kind.__doc__
    assert PASSES[kind.name] is kind
    assert parse_pass(str(one), PASSES) == one
    assert str(one) == kind.name  # every option has a default
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.extra = 1


OTHER_VALUES = [
    "annotate-costs{device=A100}",
    "partition-stages{n_stages=3,bandwidth_bytes_per_second=1000000.0,memory_bytes=4096,n_microbatches=2}",
    "schedule-stages{n_microbatches=4,order=gpipe,max_in_flight=4}",
    "lower-stages{partitioner=default}",
    "choose-save-points{format=bfp4b32,min_bytes=0}",
]


@pytest.mark.parametrize("text", OTHER_VALUES)
def test_options_of_the_registered_passes(text):
    assert str(parse_pass(text, PASSES)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make-exmaple", "unknown pass 'make-exmaple'; known: make-example"),
        ("make-example{count=1", "unknown pass"),
        (
            "make-example{colour=red}",
            "make-example: unknown option 'colour'; known: count, fast, label, limit, rate, text",
        ),
        ("make-example{count=x}", "make-example: option count is 'x'; expected int"),
        ("make-example{count=1.5}", "make-example: option count is '1.5'; expected int"),
        ("make-example{fast=yes}", "make-example: option fast is 'yes'; expected bool"),
        ("make-example{limit=x}", "make-example: option limit is 'x'; expected int or NoneType"),
        ("make-example{count=none}", "make-example: option count is 'none'; expected int"),
        ("make-example{count=1,count=2}", "make-example: option count is given twice; write count=VALUE once"),
        ("make-example{count}", "make-example: option count is given no value; write count=VALUE once"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(OptionError) as caught:
        parse_pass(text, KNOWN)
    assert str(caught.value).startswith(message)


def test_a_pass_must_run():
    with pytest.raises(TypeError, match="abstract"):
        Pass()
