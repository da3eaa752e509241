"""One class per kind of failure.

Every message says what was asked, what was found, where, and what to do; the class says which part of fxpipe refused.
This file imports nothing, so every floor may raise.
"""

from collections.abc import Iterable


class FxpipeError(Exception):
    """Any failure that fxpipe reports on purpose."""


class OptionError(FxpipeError, ValueError):
    """An option is unknown or has a value that it cannot take."""


class FormatError(OptionError):
    """A format text cannot be parsed, or names a format that cannot exist."""


class TraceError(FxpipeError):
    """The model cannot be captured as one graph."""


class VerifyError(FxpipeError):
    """A program, schedule or plan breaks a rule that every later step relies on."""


class PartitionError(FxpipeError):
    """No partition satisfies what was asked."""


class ScheduleError(VerifyError):
    """A schedule is incomplete, out of order, unmatched, deadlocked or over a limit."""


class PlanError(FxpipeError):
    """A plan file is damaged, of another version, or does not fit the model."""


class InputError(FxpipeError, ValueError):
    """The inputs of a step do not fit the plan."""


class RuntimeFailure(FxpipeError, RuntimeError):
    """A rank failed, died or did not answer while a plan was running."""


def unknown(kind: str, found: object, known: Iterable[object]) -> str:
    """The message for a name that is not on the list: ``unknown format 'x'; known: a, b``."""
    return f"unknown {kind} {str(found)!r}; known: {', '.join(sorted(map(str, known)))}"
