"""What a run's command line says: which cases it was of, and the command that repeats one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

#: Options of `nsvm run` that say where and how a case runs; those with a value, and those without.
_VALUED = ("--host", "--kernel", "--modules", "--param", "--lifecycle", "--timeout")
_FLAGS = ("--shared", "--unsafe")

#: Those that say which cases; with --until-fail, those up to the first that fails.
_CHOOSING = ("-k", "--case", "--part")
_CHOOSING_FLAGS = ("--quick", "--until-fail")

_REPEATING = ("--repeat",)

#: What the same options are called with plain pytest, and those of its own that choose.
_PYTEST = "--nsvm-"
_PYTEST_CHOOSING = ("-m", "--deselect", "--ignore", "--ignore-glob", "--lf", "--last-failed",
                    "--sw", "--stepwise")  # fmt: skip


def chooses(argv: Sequence[str]) -> bool:
    """Say whether a run was of some cases only; what such a run does not have may still be."""
    names = {_name(word) for word in argv}
    return not names.isdisjoint(_CHOOSING + _CHOOSING_FLAGS + _PYTEST_CHOOSING) or any(
        word.partition("::")[0].endswith(".py") for word in argv
    )


def command(argv: Sequence[str], case: str) -> str:
    """Return a line for a shell; `argv` is the run's own."""
    return shlex.join(["nsvm", "run", *_kept(argv, _VALUED, _FLAGS), "--case", case])


def told_command(argv: Sequence[str]) -> str:
    """Return what others repeat a run by: without where it wrote to, and how many jobs it had."""
    kept = _kept(argv, _VALUED + _CHOOSING + _REPEATING, _FLAGS + _CHOOSING_FLAGS)
    return shlex.join(["nsvm", "run", *kept]) if argv else ""


def run_command(argv: Sequence[str]) -> str:
    """Return what a run was started by; empty if it was not recorded."""
    return shlex.join(["nsvm", *argv]) if argv else ""


def _kept(argv: Sequence[str], valued: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    words = iter([word.replace(_PYTEST, "--", 1) for word in argv])
    for word in words:
        name = _name(word)
        if name in valued:
            yield word
            if word == name and (value := next(words, None)) is not None:
                yield value
        elif word in flags or (word.endswith(".py") and not word.startswith("-")):
            yield word


def _name(word: str) -> str:
    """Return which option a word is: of ``--case=ID`` and ``-kEXPR`` what goes before the value."""
    is_short = word.startswith("-") and not word.startswith("--")
    return word[:2] if is_short else word.partition("=")[0]
