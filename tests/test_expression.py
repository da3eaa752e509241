"""The reader of sympy text: the inverse of str, and deaf to everything else."""

import pytest
import sympy
from hypothesis import given, strategies as st
from torch.utils._sympy import functions as torch_sympy

from fxpipe.errors import PlanError
from fxpipe.ir.expression import LONGEST_TEXT, parse_expression, size_symbol

S0, S1 = size_symbol("s0"), size_symbol("s1")


def expressions():
    leaves = st.one_of(st.sampled_from([S0, S1]), st.integers(1, 50).map(sympy.Integer))
    binary = st.sampled_from(
        [
            lambda a, b: a + b,
            lambda a, b: a * b,
            lambda a, b: a - b,
            lambda a, b: a / b if not b.is_zero else a,
            lambda a, b: torch_sympy.FloorDiv(a, b) if a.is_integer and b.is_positive else a,
            lambda a, b: torch_sympy.Mod(a, b) if a.is_nonnegative and b.is_positive and b.is_integer else a,
            sympy.Max,
            sympy.Min,
        ]
    )
    return st.recursive(leaves, lambda inner: st.builds(lambda f, a, b: f(a, b), binary, inner, inner), max_leaves=8)


@given(expressions(), st.integers(1, 40), st.integers(1, 40))
def test_reads_back_what_was_printed(expression, s0, s1):
    sizes = {S0: s0, S1: s1}
    assert parse_expression(str(expression)).subs(sizes) == expression.subs(sizes)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3*s0**2 + 4*s0", 3 * 49 + 28),
        ("-s0 + 10", 3),
        ("(s0//2)", 3),
        ("Mod(s0, 4)", 3),
        ("floor(s0/2) + ceiling(s0/2)", 7),
        ("Max(s0/1000000, s1/2)", sympy.Rational(5, 2)),
        ("Min(s0, s1)", 5),
        ("CeilDiv(s0, 2)", 4),
        ("PythonMod(s0, 3)", 1),
        ("s0*1.5", 10.5),
    ],
)
def test_reads_what_sizes_and_times_are_made_of(text, value):
    assert parse_expression(text).subs({S0: 7, S1: 5}) == value


def test_symbols_equal_those_that_torch_makes():
    assert parse_expression("s0") == sympy.Symbol("s0", integer=True, positive=True)
    assert parse_expression("u0") == sympy.Symbol("u0", integer=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "may not stand in one"),
        ("open('x')", "the function 'open' is not one of"),
        ("s0.__class__", "may not stand in one"),
        ("[s0]", "may not stand in one"),
        ("lambda: s0", "may not stand in one"),
        ("s0 if s1 else s0", "may not stand in one"),
        ("s0 < s1", "may not stand in one"),
        ("Max(s0, key=s1)", "may not stand in one"),
        ("Max(*s0)", "may not stand in one"),
        ("'s0'", "'s0' is not a number"),
        ("True", "True is not a number"),
        ("s0 @ s1", "may not stand in one"),
        ("Mod(s0)", "Mod has 1 arguments; expected 2"),
        ("Max()", "Max has 0 arguments; expected at least 1"),
        ("s0//0", "ZeroDivisionError"),
        ("9**99999", "the power 99999 is not a number of at most 64"),
        ("(9**60)**60", "a number raised to 60 is too large"),
        ("s0**s1", "the power s1 is not a number"),
        ("(s0**60)**60", "the power 60 is not a number of at most 64"),
        ("s0 +", "SyntaxError"),
        ("", "SyntaxError"),
        ("(" * 500 + "s0" + ")" * 500, "not a size expression"),
        ("s0+" * LONGEST_TEXT + "s0", "characters long; at most"),
    ],
)
def test_refuses_everything_else(text, message):
    with pytest.raises(PlanError, match="not a size expression") as caught:
        parse_expression(text)
    assert message in str(caught.value)
