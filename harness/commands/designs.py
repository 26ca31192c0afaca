"""`nsvm designs`: eager, v1 and today's allocation of nested state, side by side on one kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from harness.commands.output import json_option, log, require_writable, write_json, write_text
from harness.host.debian_kernels import fetch_kernel
from harness.host.kernel_build import find_variant
from harness.host.session import Session
from harness.identify.report import Report
from harness.model.knobs import KNOBS
from harness.runner.hosts import DEFAULT_KERNEL, HostChoice, make_host, on_session

TODAY: Final = "today"
_DESIGNS: Final = {
    "eager": "before the series: with the vCPU, for good",
    "v1": "the series' first version: with EFER.SVME, and a whole copy of vmcb12",
    TODAY: "as merged: with EFER.SVME",
}
_TIMEOUT_S = 600.0


@click.command("designs")
@click.option("--from", "spec", default=DEFAULT_KERNEL, show_default=True, metavar="SPEC")
@click.option("--vcpus", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--toggles", type=click.IntRange(1), default=200, show_default=True)
@click.option("--vmruns", type=click.IntRange(1), default=10, show_default=True, metavar="PROGRAMS")
@json_option
@click.option("--markdown", type=click.Path(path_type=Path), help="The document, in place of text.")
def command(
    spec: str,
    vcpus: int,
    toggles: int,
    vmruns: int,
    json_file: Path | None,
    markdown: Path | None,
) -> None:
    """Measure what the series claim: memory, behaviour and cost of each design, on one kernel.

    The designs are variants of the archive's kernel (`nsvm kernel build`): nothing differs but the
    patch. Exit status: 0, or 2: one could not be built or measured.
    """
    require_writable(json_file)
    require_writable(markdown)
    series = fetch_kernel(spec).series
    for name in _DESIGNS:
        if name != TODAY:
            find_variant(series, name)
    found = {
        name: _measured(spec if name == TODAY else f"{spec}:{name}", vcpus, toggles, vmruns)
        for name in _DESIGNS
    }
    if json_file is not None:
        write_json(json_file, {"kernel": spec, "designs": found})
    text = document(found)
    if markdown is not None:
        write_text(markdown, text)
    elif json_file is None or str(json_file) != "-":
        click.echo(text, nl=False)


def _measured(spec: str, vcpus: int, toggles: int, vmruns: int) -> dict[str, Any]:
    def measure(session: Session) -> tuple[dict[str, Any], Report]:
        measured = session.call(
            "harness.bench.designs:measure_design", timeout_s=_TIMEOUT_S,
            vcpus=vcpus, toggles=toggles, vmruns=vmruns,
        ).unwrap("measuring")  # fmt: skip
        battery = session.call("harness.identify.calls:run_battery", timeout_s=_TIMEOUT_S)
        return measured, Report.from_plain(battery.unwrap("the battery"))

    with make_host(HostChoice("emulated", spec), log=log) as host:
        measured, report = on_session(host, measure, log)
        knobs = {n: f.to_plain()["value"] for n, f in report.findings.items() if f.seen}
        return {**measured, "host": host.describe(), "knobs": knobs}


def document(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the document, as Markdown."""
    today = found[TODAY]
    host = today["host"]
    stages = list(today["bytes_per_vcpu"])
    lines = [
        "# Nested state: three designs on one kernel",
        "",
        f"{host['kernel_release']}, {host['silicon']}; {today['vcpus']} vCPUs."
        " Figures of memory are exact; times are the shortest of five, on this host.",
        "",
        *_row("design", "", *(f"{stage}, bytes per vCPU" for stage in stages),
              "SVME on and off, us", "VMRUN to #VMEXIT, us"),
        "|---|---|" + "---:|" * (len(stages) + 2),
    ]  # fmt: skip
    for name, one in found.items():
        held = (f"{one['bytes_per_vcpu'][stage]:.0f}" for stage in stages)
        lines += _row(name, _DESIGNS[name], *held, one["toggle_us"], one["vmrun_us"])
    return "\n".join([*lines, "", *_behaviour(found)]) + "\n"


def _row(*cells: object) -> list[str]:
    return [f"| {' | '.join(map(str, cells))} |"]


def _behaviour(found: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    today = found[TODAY]["knobs"]
    lines = ["## Behaviour, where it is not today's", ""]
    for name, one in found.items():
        for knob, value in one["knobs"].items():
            if knob in today and today[knob] != value:
                words = [
                    KNOBS[knob].in_words(KNOBS[knob].value_of(v)) for v in (value, today[knob])
                ]
                lines.append(f"- {name}: {KNOBS[knob].what}: {words[0]} (today: {words[1]})")
    return lines if len(lines) > 2 else [*lines, "None of the knobs that can be seen differs."]
