"""What a run ran on, as tables: L0 (the kernel under test, its silicon), L1, and who drove it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report.run_record import RunRecord

Table = tuple[str, list[tuple[str, str]]]

#: The key of a host's description that is a table by itself.
_PARAMETERS = "module_parameters"


def environment_of(run: RunRecord) -> list[Table]:
    """Return titles with their rows; what was not recorded is left out."""
    host = run.host
    tables = [
        ("L0: the host", _rows(host, but=(_PARAMETERS,))),
        ("L0: module parameters of KVM", _rows(_mapping(host.get(_PARAMETERS)))),
        ("L0: other parameters, for some cases", _differing(run)),
        ("L1: the guest", _guest(run)),
        ("The machine that drove the run", _rows(run.machine)),
    ]
    return [(title, rows) for title, rows in tables if rows]


def _guest(run: RunRecord) -> list[tuple[str, str]]:
    """Return what L1 is: this harness's own program, so its revision says which."""
    deepest = max((case.levels for case in run.cases), default=0)
    rows = [("image", f"the proxy of guest_images, harness {run.version} {run.revision}".rstrip())]
    if deepest:
        rows.append(("deepest guest", f"L{deepest}"))
    linux = [case.host.get("guest_linux") for case in run.cases if case.host]
    rows += [("Linux, in its scenarios", str(name)) for name in dict.fromkeys(filter(None, linux))]
    return rows


def _differing(run: RunRecord) -> list[tuple[str, str]]:
    usual = _mapping(run.host.get(_PARAMETERS))
    found: dict[tuple[str, str], None] = {}
    for case in run.cases:
        for name, value in _mapping((case.host or {}).get(_PARAMETERS)).items():
            if usual.get(name) != value:
                found[name, str(value)] = None
    return sorted(found)


def _rows(table: Mapping[str, Any], but: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(str(key), str(value)) for key, value in table.items() if key not in but]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
