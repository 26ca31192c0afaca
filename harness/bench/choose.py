"""Choosing benchmarks by an expression, as pytest's -k does: ``get_ and not msrs``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from harness.errors import NsvmError

_TOKEN = re.compile(r"\s*(\(|\)|[^\s()]+)")

Matcher = Callable[[str], bool]


class ExpressionError(NsvmError):
    """An expression that cannot be read, or that chooses nothing."""


class _Parser:
    """Recursive descent over ``or``, ``and``, ``not``, parentheses and words."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _TOKEN.findall(text)

    def parse(self) -> Matcher:
        """Return what tells whether a name fits."""
        matcher = self._either()
        if self._tokens:
            raise self._error(f"{self._tokens[0]!r} is not expected there")
        return matcher

    def _error(self, why: str) -> ExpressionError:
        return ExpressionError(f"-k {self._text!r}: {why}")

    def _accept(self, token: str) -> bool:
        if self._tokens[:1] == [token]:
            self._tokens.pop(0)
            return True
        return False

    def _either(self) -> Matcher:
        found = [self._both()]
        while self._accept("or"):
            found.append(self._both())
        return lambda name: any(matcher(name) for matcher in found)

    def _both(self) -> Matcher:
        found = [self._one()]
        while self._accept("and"):
            found.append(self._one())
        return lambda name: all(matcher(name) for matcher in found)

    def _one(self) -> Matcher:
        if self._accept("not"):
            inner = self._one()
            return lambda name: not inner(name)
        if self._accept("("):
            inner = self._either()
            if not self._accept(")"):
                raise self._error("a ( is not closed")
            return inner
        if not self._tokens or self._tokens[0] in ("and", "or", ")"):
            raise self._error("a part of a name is missing")
        word = self._tokens.pop(0).lower()
        return lambda name: word in name.lower()


def matching(names: Iterable[str], expression: str) -> list[str]:
    """Return the names that the expression fits; an empty one fits all.

    Raises ExpressionError: it cannot be read, or it fits none.
    """
    known = list(names)
    if not expression.strip():
        return known
    matcher = _Parser(expression).parse()
    chosen = [name for name in known if matcher(name)]
    if not chosen:
        raise ExpressionError(f"-k {expression!r} chooses none of {', '.join(known)}")
    return chosen
