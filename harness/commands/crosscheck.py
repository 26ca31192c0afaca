"""`nsvm crosscheck`: the model and a kernel, side by side, over generated sequences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.commands.crosscheck_run import CrosscheckRun, Plan, Report
from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, print_host, require_writable
from harness.crosscheck.complaints import COMPLAINTS, DEATHS
from harness.crosscheck.deviations import DEVIATIONS
from harness.crosscheck.generator import AREAS
from harness.crosscheck.hazards import HAZARDS
from harness.crosscheck.record import Bundle, steps_in_words, told
from harness.crosscheck.settings import chosen
from harness.errors import HostError
from harness.report.verdict import exit_status
from harness.runner.hosts import make_host


@click.command("crosscheck")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, metavar="N")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--focus", type=click.Choice(list(AREAS)), help="Mostly this area.")
@click.option(
    "--knobs",
    "words",
    multiple=True,
    metavar="NAME|KNOB=VALUE",
    help="A setting's name, or one knob turned; may be repeated. By default by kernel release.",
)
@click.option("--memory", is_flag=True, help="Count nested memory after every step, too: slow.")
@click.option(
    "--bundles",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where findings are written; by default here.",
)
@json_option
@host_options
def command(
    steps: int,
    seed: int,
    focus: str | None,
    words: tuple[str, ...],
    memory: bool,
    bundles: Path,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Run sequences of operations on the model of nested state and on a kernel, and compare.

    Every step's answer and all that can be seen after it must be as the model says, or be a named
    deviation. What is not is made small and written as a bundle for `nsvm replay`.

    Exit status: 0 no difference without a name, 1 findings, 2 the harness or a host broke.
    """
    require_writable(json_file)
    if not bundles.is_dir():
        raise HostError(f"no directory {bundles}")
    with make_host(host_choice(host, kernel, modules), log=log) as where:
        session = where.start()
        setting = chosen(words, str(where.describe()["kernel_release"]))
        log(f"kernel {where.describe()['kernel_release']}, knobs of {setting}")
        plan = Plan(steps, seed, focus, setting, memory)
        report = CrosscheckRun(where, plan, log, lambda each: each.write(_file(each, bundles))).go(
            session
        )
        described = where.describe()
    deliver(
        json_file,
        {"host": described, "knobs": str(setting), "seed": seed, **report.to_plain()},
        lambda: _print(report, described, str(setting), bundles),
    )
    sys.exit(exit_status([report.verdict]))


def _file(bundle: Bundle, where: Path) -> Path:
    evidence = bundle.evidence
    return where / f"crosscheck-{bundle.kernel}-{evidence['seed']}-{evidence['sequence']}.json"


def _print(report: Report, host: dict[str, Any], setting: str, where: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    print_host(console, host, 13)
    say(f"knobs        {setting}")
    for bundle in report.bundles:
        say("")
        _say_finding(say, bundle)
        say(f"  bundle: {_file(bundle, where)}")
    for signature, count in report.again.items():
        say(f"again        {count} times: {signature}")
    for error in report.errors:
        say(f"ERROR        {error}")
    if report.known:
        _print_known(console, report)
    say("")
    per_s = report.steps / report.seconds if report.seconds else 0.0
    say(f"steps        {report.steps} in {report.sequences} sequences, {per_s:.0f} per second")
    times = report.times
    whole = sum(times.values()) or 1.0
    shares = ", ".join(
        f"{name.removesuffix('_s')} {value / whole:.0%}" for name, value in times.items()
    )
    say(f"time         {report.seconds:.1f} s: {shares}")
    plain = report.to_plain()
    asked, silent = plain["knobs_asked"], plain["knobs_not_asked"]
    say(f"transitions  {len(plain['transitions'])} kinds (operation, state before, result)")
    say(f"knobs        {len(asked)} decided something; not met: {', '.join(silent) or 'none'}")
    if report.hosts_lost:
        say(f"hosts lost   {report.hosts_lost}")
    say(f"verdict      {report.verdict.value}")


def _say_finding(say: Any, bundle: Bundle) -> None:
    say(f"FAIL         {bundle.what}")
    if bundle.difference:
        say(f"  {told(bundle.difference)}")
    for line in steps_in_words(bundle.operations):
        say(f"  {line}")
    for turn in bundle.evidence.get("explained_by", ()):
        say(f"  would agree with {turn}")
    if bundle.difference and not bundle.evidence.get("explained_by"):
        say("  no single knob explains it")


def _print_known(console: Console, report: Report) -> None:
    table = Table("known", "met", "what", title=None)
    words = {**HAZARDS, **{each.id: each.what for each in DEVIATIONS}}
    words |= {each.id: each.what for each in (*COMPLAINTS, *DEATHS)}
    for name, count in report.known.most_common():
        table.add_row(name, str(count), words.get(name, ""))
    console.print(table)
