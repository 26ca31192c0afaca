"""The score of `nsvm mutants` as the page has it: which bugs that were put back were noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from harness.errors import HarnessError


@dataclass(frozen=True)
class Bug:
    """One bug that was put back."""

    name: str
    area: str
    cases: tuple[str, ...]
    """Cases of scenarios that failed with it."""
    others: str
    """The cross-check's finding, or a race's; empty if there is none."""
    selftests: tuple[str, ...] | None
    """The kernel's own ones that noticed; None: they did not run."""

    @property
    def noticed(self) -> bool:
        """Whether any check of ours saw it."""
        return bool(self.cases or self.others)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `nsvm mutants --json` says of one."""
        peers = plain["peers"]
        return cls(
            plain["variant"],
            plain["area"],
            tuple(plain["scenarios"]),
            plain["crosscheck"] or plain["window"],
            None if peers is None else tuple(peers),
        )


@dataclass(frozen=True)
class Bugs:
    """A run of `nsvm mutants`."""

    kernel: str
    bugs: tuple[Bug, ...]

    @property
    def areas(self) -> list[tuple[str, int, int, int]]:
        """Each area with how many of its bugs we noticed, the selftests, and how many there are."""
        return [
            (
                area,
                sum(bug.noticed for bug in self.bugs if bug.area == area),
                sum(bool(bug.selftests) for bug in self.bugs if bug.area == area),
                sum(bug.area == area for bug in self.bugs),
            )
            for area in sorted({bug.area for bug in self.bugs})
        ]

    @property
    def has_selftests(self) -> bool:
        """Whether the kernel's own selftests ran."""
        return any(bug.selftests is not None for bug in self.bugs)


def load(path: Path) -> Bugs:
    """Read a file of `nsvm mutants --json`.

    Raises HarnessError: it cannot be read, or is no such file.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Bugs(plain["kernel"], tuple(map(Bug.from_plain, plain["mutants"])))
    except OSError as e:
        raise HarnessError(f"{path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise HarnessError(f"{path}: not of nsvm mutants --json: {type(e).__name__}: {e}") from e
