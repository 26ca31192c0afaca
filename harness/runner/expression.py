"""Choosing names by an expression, by pytest's rules for -k: ``smi and not (l3 or shadow)``."""

from __future__ import annotations

from collections.abc import Callable

from _pytest.mark.expression import Expression

from harness.errors import NsvmError


class ExpressionError(NsvmError):
    """An expression that cannot be read, or that chooses nothing."""


def matcher(expression: str) -> Callable[[str], bool]:
    """Return what tells whether a name fits; all do where the expression is empty.

    Raises ExpressionError: it cannot be read.
    """
    if not expression.strip():
        return lambda name: True
    try:
        compiled = Expression.compile(expression)
    except SyntaxError as e:
        raise ExpressionError(f"{expression!r}: at column {e.offset}: {e.msg}") from None

    def fits(name: str) -> bool:
        return compiled.evaluate(lambda word, /, **_: word.lower() in name.lower())

    return fits
