"""Races for fields of vmcb12 (`harness.race`), as reproducers and mutants run them."""

from __future__ import annotations

from typing import Any

from harness.errors import NsvmError
from harness.host.session import Host, Session
from harness.race.fields import FIELDS

CPUS = 2
"""Of an emulated host: VMRUN and the writer must run at the same time."""

_SET_UP_S = 300.0
"""For a machine, the attempts without a race, and the last ones with it."""


def race_for(session: Session, field: str, seconds: float) -> dict[str, Any]:
    """Race for a field until the first hit; return its tally, as `Tally.to_json` gives it.

    Raises:
        NsvmError: the race could not be held.
        HostLost: the host died.
    """
    result = session.call(
        "harness.race.calls:run",
        timeout_s=seconds + _SET_UP_S,
        fields=[field],
        by="vcpu",
        seconds=seconds,
        first=True,
    )
    [row] = result.unwrap(f"the race for {field}")
    return dict(row)


def race_name(field: str) -> str:
    """Return what a race for a field is called, as a case has an id."""
    return f"race for {field}"


def unknown_window(host: Host, seconds: float) -> str:
    """Race for every field; return the first window that the table of kernels has none of.

    Empty if there is no such, as where a race could not be held.
    """
    session = host.start()
    for field in FIELDS:
        if field.expects_window(str(host.describe()["kernel_release"])) is not False:
            continue
        try:
            row = race_for(session, field.name, seconds)
        except NsvmError:
            session = host.start()
            continue
        if row["first_evidence"]:
            return f"{race_name(field.name)}: {row['first_evidence']['proof']}"
    return ""
