"""`nsvm identify`: which known behaviours of nested SVM the running kernel has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, print_host, require_writable
from harness.host.session import CallResult, Session
from harness.identify.changes import Change, changes
from harness.identify.finding import Finding
from harness.identify.report import Report
from harness.model.knobs import KNOBS
from harness.probe.kmsg import splats
from harness.runner.hosts import HostChoice, make_host, on_session

_TIMEOUT_S = 300.0
_WITHOUT_NESTED = {"nested": "0"}
_NEEDS_NESTED_0 = "nested_state_without_nested"


@dataclass(frozen=True)
class Identity:
    """What was found out about one kernel."""

    host: dict[str, Any]
    report: Report
    kernel_log: list[str]
    """Splats that the battery provoked."""

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        fit = self.report.fit()
        return {
            "host": self.host,
            "fits": {
                "setting": fit.setting,
                "exactly": not fit.differences,
                "differences": [each.to_plain() for each in fit.differences],
            },
            "findings": self.report.to_plain(),
            "kernel_log": self.kernel_log,
        }


@click.command("identify")
@click.option("--compare", nargs=2, metavar="A B", help="Two kernels: what changed between them.")
@json_option
@host_options
def command(
    compare: tuple[str, str] | None,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Find out which known behaviours of nested SVM the running kernel has.

    One experiment for each knob of the model; then the named setting that the kernel is nearest to.
    --compare does that on two kernels of the emulated host and prints what changed, in words.

    Exit status: 0 whatever the kernel is like, 2 a host broke.
    """
    require_writable(json_file)
    if compare is not None:
        _refuse_host_options(host, kernel, modules)
        one, other = (_identified(HostChoice("emulated", spec)) for spec in compare)
        changed = changes(one.report, other.report)
        plain: dict[str, Any] = {
            "kernels": [one.to_plain(), other.to_plain()],
            "changes": [each.to_plain() for each in changed],
        }
        show = partial(_print_changes, one, other, changed)
    else:
        one = _identified(host_choice(host, kernel, modules))
        plain = one.to_plain()
        show = partial(_print_identity, one)
    deliver(json_file, plain, show)


def _refuse_host_options(host: str, kernel: str | None, modules: Path | None) -> None:
    if host not in ("auto", "emulated") or kernel is not None or modules is not None:
        raise click.UsageError("--compare names its kernels itself: no --host, --kernel, --modules")


# The battery on a host


def _identified(choice: HostChoice) -> Identity:
    with make_host(choice, log=log) as where:
        result = on_session(where, _battery, log)
        plain = result.unwrap("the battery")
        described = where.describe()
    report = Report.from_plain([*plain, *_without_nested(choice)])
    said = list(splats(event["text"] for event in result.kmsg))
    return Identity(described, report, said)


def _battery(session: Session) -> CallResult:
    return session.call("harness.identify.calls:run_battery", timeout_s=_TIMEOUT_S)


def _without_nested(choice: HostChoice) -> list[dict[str, Any]]:
    """Return what a kvm_amd with nested=0 shows, where one can be loaded for the purpose."""
    if choice.resolved() != "emulated":
        return []
    with make_host(choice, _WITHOUT_NESTED, log) as where:
        result = where.start().call(
            "harness.identify.calls:run_experiment", timeout_s=_TIMEOUT_S, name=_NEEDS_NESTED_0
        )
    findings: list[dict[str, Any]] = result.unwrap(_NEEDS_NESTED_0)
    return findings


# Output


def _print_identity(identity: Identity) -> None:
    console = Console(highlight=False)
    report, fit = identity.report, identity.report.fit()
    _print_head(console, identity)
    for difference in fit.differences:
        console.print(f"         {difference}", markup=False, soft_wrap=True)
    table = Table("knob and value", "in words, and as seen")
    for finding in report.findings.values():
        if finding.seen:
            table.add_row(*_row(finding))
    console.print(table)
    for finding in report.not_seen:
        line = f"not seen: {finding.knob}: {finding.evidence}"
        console.print(line, markup=False, soft_wrap=True)


def _row(finding: Finding) -> tuple[Text, Text]:
    knob = KNOBS[finding.knob]
    name = Text(f"{finding.knob}\n  {knob.key_of(finding.value)}")
    return name, Text(f"{knob.what}: {finding.in_words()}\n").append(finding.evidence, "dim")


def _print_head(console: Console, identity: Identity) -> None:
    print_host(console, identity.host, 9)
    console.print(f"fits     {identity.report.fit()}", markup=False, soft_wrap=True)
    for line in identity.kernel_log:
        console.print(f"kernel log   {line}", markup=False, soft_wrap=True)


def _print_changes(one: Identity, other: Identity, changed: list[Change]) -> None:
    console = Console(highlight=False)
    for identity in (one, other):
        _print_head(console, identity)
    console.print(f"changed  {sum(each.seen for each in changed)}, as seen on both:")
    for each in changed:
        if each.seen:
            console.print(f"  {each}", markup=False, soft_wrap=True)
    if not all(each.seen for each in changed):
        console.print("not seen, but so in the table of settings:")
        for each in changed:
            if not each.seen:
                console.print(f"  {each}", markup=False, soft_wrap=True)
