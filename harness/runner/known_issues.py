"""Known issues: differences between KVM (or the emulated silicon) and what a scenario claims.

Reviewed data, in `harness/known_issues.toml`. A known FAIL is shown as what it is, with the issue's
id; it does not fail the run unless `--strict`. A known issue whose case passes is reported too.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from harness.errors import HarnessError

FILE = Path(__file__).parent.parent / "known_issues.toml"

_REQUIRED = ("id", "match", "behaviour", "reason", "evidence")


@dataclass(frozen=True)
class KnownIssue:
    """One difference that is explained."""

    id: str
    #: Case ids, with * for anything.
    match: tuple[str, ...]
    #: What the kernel does, in the model's words.
    behaviour: str
    #: Why: the mechanism, or the quirk of the emulated silicon.
    reason: str
    #: Kernel function or commit, manual section, or how it was seen.
    evidence: str
    #: Beginnings of kernel releases on which it was seen; none for "wherever it shows".
    kernels: tuple[str, ...] = ()
    #: Only on this kind of host; empty for any.
    host: str = ""
    #: The last day on which it excuses a FAIL; None: it is reviewed when it does not show any more.
    expires: date | None = None

    def has_expired(self, today: date) -> bool:
        """Say whether it excuses nothing any more."""
        return self.expires is not None and today > self.expires

    def applies(self, case_id: str, release: str, host_kind: str) -> bool:
        """Say whether this issue is about the case on this kernel and host."""
        return (
            any(_matches(pattern, case_id) for pattern in self.match)
            and (not self.kernels or any(_is_of(release, prefix) for prefix in self.kernels))
            and self.host in ("", host_kind)
        )


def _matches(pattern: str, case_id: str) -> bool:
    # Not fnmatch: case ids have brackets of their own.
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(expression, case_id) is not None


def _is_of(release: str, prefix: str) -> bool:
    """Say whether ``6.1.0-56-amd64`` is of ``6.1``; ``6.12`` is not."""
    return re.match(re.escape(prefix) + r"(?!\d)", release) is not None


def load(path: Path = FILE) -> list[KnownIssue]:
    """Return the issues of a file.

    Raises:
        HarnessError: the file is not as it must be; names the entry and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise HarnessError(f"{path}: {e}") from e
    issues = [_issue(path, number, entry) for number, entry in enumerate(data.get("issue", ()), 1)]
    seen: set[str] = set()
    for issue in issues:
        if issue.id in seen:
            raise HarnessError(f"{path}: two issues have the id {issue.id!r}")
        seen.add(issue.id)
    return issues


def _issue(path: Path, number: int, entry: dict[str, object]) -> KnownIssue:
    where = f"{path}: issue {number} ({entry.get('id', 'without id')})"
    for key in _REQUIRED:
        if not entry.get(key):
            raise HarnessError(f"{where}: no {key}")
    known = set(KnownIssue.__dataclass_fields__)
    if unknown := sorted(set(entry) - known):
        raise HarnessError(f"{where}: unknown key {unknown[0]!r}")
    lists = {key: _texts(where, key, entry.get(key, [])) for key in ("match", "kernels")}
    expires = entry.get("expires")
    # A date with a time of day is a date to Python.
    if expires is not None and type(expires) is not date:
        raise HarnessError(f"{where}: expires must be a date such as 2027-01-31, without quotes")
    others = {*lists, "expires"}
    texts = {key: str(value) for key, value in entry.items() if key not in others}
    return KnownIssue(**lists, **texts, expires=expires)  # type: ignore[arg-type]


def _texts(where: str, key: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise HarnessError(f"{where}: {key} must be a text or a list of texts")
    return tuple(items)


def find(
    issues: Sequence[KnownIssue], case_id: str, release: str, host_kind: str
) -> KnownIssue | None:
    """Return the issue that a case is known for, if there is one."""
    return next((i for i in issues if i.applies(case_id, release, host_kind)), None)


def unused(issues: Iterable[KnownIssue], case_ids: Iterable[str]) -> list[KnownIssue]:
    """Return the issues whose patterns match no case at all: leftovers of renamed scenarios."""
    ids = list(case_ids)
    return [i for i in issues if not any(_matches(p, c) for p in i.match for c in ids)]
