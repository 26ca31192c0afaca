"""Results for KernelCI's database: KCIDB's JSON, schema 5.3.

One checkout and one build for each kernel, one test for each outcome, one issue for each known
issue that a test showed (or did not show, where it should have), and an incident between the two.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from harness.errors import HostError
from harness.report.run_record import CaseRecord, RunRecord

VERSION = {"major": 5, "minor": 3}

_ORIGIN = re.compile(r"[a-z0-9_]+")

#: The schema's limit for log_excerpt, in characters.
_MOST_LOG = 16384

Json = dict[str, Any]


class KcidbError(HostError):
    """What KCIDB would not take; one line says what."""


def to_kcidb(runs: Iterable[RunRecord], origin: str) -> Json:
    """Return runs as one KCIDB document; `origin` is the name of the CI system that submits it.

    Raises:
        KcidbError: KCIDB takes no such name.
    """
    if not _ORIGIN.fullmatch(origin):
        raise KcidbError(f"origin {origin!r}: lower-case letters, digits and _ only")
    checkouts: dict[str, Json] = {}
    builds: dict[str, Json] = {}
    issues: dict[str, Json] = {}
    tests, incidents = [], []
    for run in runs:
        kernel = f"{origin}:{_digest(run.kernel, str(run.host.get('kernel_version', '')))}"
        checkouts[kernel] = _checkout(run, kernel, origin)
        builds[kernel] = _build(run, kernel, origin)
        for case in run.cases:
            test = _test(run, case, kernel, origin)
            tests.append(test)
            if case.known:
                issue = _issue(case.known, origin)
                issues[issue["id"]] = issue
                incidents.append(_incident(test, issue, case, origin))
    found: Json = {"version": VERSION, "checkouts": [*checkouts.values()],
                   "builds": [*builds.values()], "tests": tests,
                   "issues": [*issues.values()], "incidents": incidents}  # fmt: skip
    return {key: value for key, value in found.items() if value}


def _checkout(run: RunRecord, kernel: str, origin: str) -> Json:
    name = str(run.host.get("kernel_origin", ""))
    tree = {"tree_name": "debian"} if name.startswith("Debian ") else {}
    return {
        "id": kernel,
        "origin": origin,
        **tree,
        "git_commit_name": _plain(run.kernel),
        "comment": _plain(name or run.kernel),
        "valid": True,
    }


def _build(run: RunRecord, kernel: str, origin: str) -> Json:
    said = " ".join([run.kernel, str(run.host.get("kernel_version", ""))])
    return {
        "id": kernel,
        "checkout_id": kernel,
        "origin": origin,
        "architecture": "x86_64",
        "comment": _plain(said),
        "status": "PASS",
    }


def _test(run: RunRecord, case: CaseRecord, kernel: str, origin: str) -> Json:
    log = "\n".join(_log(case))
    found: Json = {
        "id": f"{origin}:{run.id}:{_digest(case.case)}:{case.repeat}",
        "build_id": kernel,
        "origin": origin,
        "path": path_of(case.case),
        "status": case.verdict.value,
        "comment": _plain(case.claim or case.case),
        "duration": case.seconds,
        "environment": {"comment": _plain(run.host_name), "misc": _environment(run, case)},
        "misc": {"case": case.case, "repeat": case.repeat, "known": case.known, "argv": run.argv},
    }
    if log:
        found["log_excerpt"] = _plain(log)[:_MOST_LOG]
    if run.started:
        found["start_time"] = datetime.fromtimestamp(run.started, UTC).isoformat()
    return found


def path_of(case: str) -> str:
    """Return a case's place in KCIDB's tree of tests: nsvm.SCENARIO.axis_value.axis_value."""
    name, _, values = case.removesuffix("]").partition("[")
    parts = [name, *values.split(",")] if values else [name]
    return ".".join(["nsvm", *(re.sub(r"[^a-zA-Z0-9_-]+", "_", part) or "_" for part in parts)])


def _environment(run: RunRecord, case: CaseRecord) -> Mapping[str, Any]:
    return {**(case.host or run.host), "driver": dict(run.machine), "harness": run.revision}


def _log(case: CaseRecord) -> Iterator[str]:
    if case.reason:
        yield case.reason
    for title, text in case.evidence.items():
        yield f"--- {title}\n{text}"


def _issue(known: str, origin: str) -> Json:
    ours = known.startswith("quirk-")
    return {
        "id": f"{origin}:{known}",
        "version": 1,
        "origin": origin,
        "culprit": {"code": not ours, "tool": False, "harness": ours},
        "comment": _plain(known),
    }


def _incident(test: Json, issue: Json, case: CaseRecord, origin: str) -> Json:
    return {
        "id": f"{origin}:{_digest(test['id'], issue['id'])}",
        "origin": origin,
        "issue_id": issue["id"],
        "issue_version": issue["version"],
        "test_id": test["id"],
        "present": case.word == "KNOWN",
    }


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _plain(text: str) -> str:
    return text.replace("\0", "\\0")
