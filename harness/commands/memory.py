"""`nsvm memory`: what nesting costs a VM, in bytes per vCPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, print_host, require_writable
from harness.host.session import CallResult, Host
from harness.probe.kmsg import new_taints, splats
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host

#: Guests have areas for so many (harness.machine.guest_abi).
MAX_VCPUS = 64


@click.command("memory")
@click.option("--vcpus", type=click.IntRange(1, MAX_VCPUS), default=8, show_default=True)
@click.option("--vms", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option(
    "--path",
    type=click.Choice(["wrmsr", "msrs", "sregs"]),
    default="wrmsr",
    show_default=True,
    help="Who writes EFER.SVME: the guest, KVM_SET_MSRS or KVM_SET_SREGS.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, metavar="S")
@json_option
@host_options
def command(
    vcpus: int,
    vms: int,
    path: str,
    rounds: int,
    timeout_s: float,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Measure nested-state memory per vCPU: EFER.SVME off, on, and off again.

    Three independent probes must agree with each other and with the model. Exit status: 0 they do,
    1 they do not, 2 it could not be measured.
    """
    require_writable(json_file)
    choice = host_choice(host, kernel, modules)
    with make_host(choice, log=log) as where:
        session = where.start()
        result = session.call(
            "harness.inside:measure_nested_memory",
            timeout_s=timeout_s,
            vcpus=vcpus,
            vms=vms,
            path=path,
            rounds=rounds,
        )
        report = _report(where, result)
    deliver(json_file, report, lambda: _print(report))
    sys.exit(exit_status([Verdict(report["verdict"])]))


def _report(host: Host, result: CallResult) -> dict[str, Any]:
    own_words = {"ScenarioFailure": "FAIL", "Unsupported": "SKIP"}
    verdict = next((own_words[c] for c in result.error.get("bases", ()) if c in own_words), None)
    if verdict:
        measured: dict[str, Any] = {"verdict": verdict, "reason": result.error["message"]}
    else:
        measured = dict(result.unwrap("measuring nested-state memory"))
    said = splats(event["text"] for event in result.kmsg)
    tainted = [f"kernel tainted: {name}" for name in new_taints(*result.tainted)]
    if said or tainted:
        measured |= {"verdict": "FAIL", "kernel_log": [*said, *tainted]}
    return {"host": host.describe(), **measured, "seconds": result.seconds}


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    print_host(console, report["host"], 9)
    if "probes" not in report:
        console.print(f"verdict  {report['verdict']}: {report.get('reason', '')}")
        return
    console.print(
        f"vCPUs    {report['vms']} x {report['vcpus']}, EFER.SVME by {report['path']},"
        f" median of {report['rounds']}"
    )
    table = Table(title="bytes per vCPU", title_justify="left")
    for column in ("probe", "SVME off", "on", "off again", "delta", "resolution"):
        table.add_column(column, justify="left" if column == "probe" else "right")
    for name, reading in report["probes"].items():
        figures = ("on_bytes_per_vcpu", "off_bytes_per_vcpu", "delta_bytes_per_vcpu")
        row = [_number(reading[figure]) for figure in figures]
        table.add_row(name, "0", *row, f"± {_number(reading['resolution_bytes'])}")
    console.print(table)
    for site in report["call_sites"]:
        chain = " ← ".join((site["function"], *site["via"][:2]))
        console.print(f"  {site['count']} x order {site['order']}  {chain}")
    model = report["model"]
    console.print(
        f"model    {model['policy']}: {model['delta_bytes_per_vcpu']} bytes per vCPU;"
        f" this kernel fits: {model['running_kernel_fits'] or 'no known policy'}"
    )
    for line in report.get("kernel_log", ()):
        console.print(f"kernel log: {line}", markup=False)
    console.print(f"verdict  {report['verdict']}")


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"
