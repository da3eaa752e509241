"""Reads the text of a sympy expression without running it: Python's own parser, and a list of what may stand in it."""

import ast
from collections.abc import Callable

import sympy
from torch.utils._sympy import functions as torch_sympy

from fxpipe.errors import PlanError

LONGEST_TEXT = 20_000
LARGEST_POWER = 64
LARGEST_POWER_BITS = 4096

Binary = Callable[[sympy.Expr, sympy.Expr], sympy.Expr]

_BINARY: dict[type[ast.operator], Binary] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: torch_sympy.FloorDiv,
    ast.Mod: torch_sympy.Mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[sympy.Expr], sympy.Expr]] = {ast.USub: lambda a: -a, ast.UAdd: lambda a: a}
_FUNCTIONS: dict[str, tuple[int | None, Callable[..., sympy.Expr]]] = {  # number of arguments (None: any), function
    "Max": (None, sympy.Max),
    "Min": (None, sympy.Min),
    "floor": (1, sympy.floor),
    "ceiling": (1, sympy.ceiling),
    "Abs": (1, sympy.Abs),
    "sqrt": (1, sympy.sqrt),
    "Mod": (2, torch_sympy.Mod),
    "PythonMod": (2, torch_sympy.PythonMod),
    "FloorDiv": (2, torch_sympy.FloorDiv),
    "CleanDiv": (2, torch_sympy.CleanDiv),
    "CeilDiv": (2, torch_sympy.CeilDiv),
    "IntTrueDiv": (2, torch_sympy.IntTrueDiv),
    "FloatTrueDiv": (2, torch_sympy.FloatTrueDiv),
    "ToFloat": (1, torch_sympy.ToFloat),
    "TruncToInt": (1, torch_sympy.TruncToInt),
    "CeilToInt": (1, torch_sympy.CeilToInt),
    "FloorToInt": (1, torch_sympy.FloorToInt),
}


def parse_expression(text: str) -> sympy.Expr:
    """The expression that ``str`` printed: ``parse_expression(str(e)) == e`` for what sizes and times are made of.

    Numbers, names (sizes: positive integers), ``+ - * / // % **``, and the functions listed above. Raises PlanError for
    anything else; no text can run code, and none can ask for a number of more than a few thousand digits.
    """
    if len(text) > LONGEST_TEXT:
        raise PlanError(f"not a size expression: {len(text)} characters long; at most {LONGEST_TEXT} are read")
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except PlanError as e:
        raise PlanError(f"not a size expression: {text[:80]!r}: {e}") from None
    except (SyntaxError, ValueError, ArithmeticError, AssertionError, TypeError, RecursionError, MemoryError) as e:
        raise PlanError(f"not a size expression: {text[:80]!r}: {type(e).__name__}: {e}") from e


def size_symbol(name: str) -> sympy.Symbol:
    """The symbol of a dimension, as torch makes it: sizes that torch knows an example of (``s0``) are positive."""
    return sympy.Symbol(name, integer=True) if name.startswith("u") else sympy.Symbol(name, integer=True, positive=True)


def _build(node: ast.expr) -> sympy.Expr:
    match node:
        case ast.Constant(value=value):
            return _number(value)
        case ast.Name(id=name):
            return size_symbol(name)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_build(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_build(left), _build(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_build(left), _build(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _call(name, args)
    raise PlanError(f"{ast.unparse(node)[:40]!r} may not stand in one")


def _number(value: object) -> sympy.Expr:
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    if isinstance(value, float):
        return sympy.Float(value)
    raise PlanError(f"{value!r} is not a number")


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    below = base.exp if base.is_Pow and base.exp.is_Rational else 1
    if not (exponent.is_Rational and abs(exponent * below) <= LARGEST_POWER):
        raise PlanError(f"the power {str(exponent)[:40]} is not a number of at most {LARGEST_POWER}")
    if base.is_Rational and max(abs(base.p), base.q).bit_length() * abs(exponent) > LARGEST_POWER_BITS:
        raise PlanError(f"a number raised to {exponent} is too large")
    return base**exponent


def _call(name: str, args: list[ast.expr]) -> sympy.Expr:
    if name not in _FUNCTIONS:
        raise PlanError(f"the function {name!r} is not one of {', '.join(sorted(_FUNCTIONS))}")
    count, function = _FUNCTIONS[name]
    if not args or (count is not None and len(args) != count):
        raise PlanError(f"{name} has {len(args)} arguments; expected {count or 'at least 1'}")
    return function(*map(_build, args))
