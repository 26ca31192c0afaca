"""The command that repeats one case of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

#: Options of `nsvm run` that say where and how a case runs; those with a value, and those without.
_VALUED = ("--host", "--kernel", "--modules", "--param", "--lifecycle", "--timeout")
_FLAGS = ("--shared", "--unsafe")

#: Those that say which cases, and how often.
_CHOOSING = ("-k", "--case", "--part", "--repeat")
_CHOOSING_FLAGS = ("--quick", "--until-fail")

#: What the same options are called with plain pytest.
_PYTEST = "--nsvm-"


def command(argv: Sequence[str], case: str) -> str:
    """Return a line for a shell; `argv` is the run's own."""
    return shlex.join(["nsvm", "run", *_kept(argv, _VALUED, _FLAGS), "--case", case])


def told_command(argv: Sequence[str]) -> str:
    """Return what others repeat a run by: without where it wrote to, and how many jobs it had."""
    kept = _kept(argv, _VALUED + _CHOOSING, _FLAGS + _CHOOSING_FLAGS)
    return shlex.join(["nsvm", "run", *kept]) if argv else ""


def run_command(argv: Sequence[str]) -> str:
    """Return what a run was started by; empty if it was not recorded."""
    return shlex.join(["nsvm", *argv]) if argv else ""


def _kept(argv: Sequence[str], valued: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    words = iter([word.replace(_PYTEST, "--", 1) for word in argv])
    for word in words:
        name, equals, _ = word.partition("=")
        if name in valued:
            yield word
            if not equals and (value := next(words, None)) is not None:
                yield value
        elif word in flags or (word.endswith(".py") and not word.startswith("-")):
            yield word
