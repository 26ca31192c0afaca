"""`nsvm bench`: how fast the harness is, as a share of what C or a bare QEMU reaches."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.console import Console

from harness.bench.suite import Wanted, choose, run
from harness.bench.table import as_json, show
from harness.commands.options import expression_option, host_choice, kernel_options
from harness.commands.output import deliver, json_option, log, require_writable
from harness.runner.hosts import DEFAULT_KERNEL

_HOSTS = {"local": ("local",), "emulated": ("emulated",), "both": ("local", "emulated")}

#: Something could not be measured.
_STATUS_ERROR = 2


@click.command("bench")
@click.option("--host", type=click.Choice(list(_HOSTS)), default="both", show_default=True)
@kernel_options
@click.option(
    "--repeat",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Repetitions of each; cold boots and the memory split, being slow, take fewer.",
)
@expression_option("benchmarks")
@json_option
def command(
    host: str,
    kernel: str | None,
    modules: Path | None,
    repeat: int,
    expression: str,
    json_file: Path | None,
) -> None:
    """Compare the harness's speed with C's and bare QEMU's, in one run on one machine.

    A share of 1 is the counterpart's speed, 0.5 half of it; the spread is the lowest and highest
    repetition's. Rates through the proxies are shares of each other, from the guests' own counters.
    Times depend on the machine and its load and are there for orientation only.

    Exit status: 0 all was measured or skipped, 2 something could not be measured.
    """
    started = time.monotonic()
    hosts = _HOSTS[host]
    require_writable(json_file)
    chosen = choose(expression, hosts)
    choice = host_choice("local" if host == "local" else "emulated", kernel, modules)
    choice.resolved()  # refuses a kernel where there is no emulated host to boot it
    wanted = Wanted(hosts, choice.kernel or DEFAULT_KERNEL, repeat, chosen, modules=modules)
    report = run(wanted, log=log)
    deliver(
        json_file,
        as_json(report, time.monotonic() - started),
        lambda: show(report, Console(highlight=False)),
    )
    sys.exit(_STATUS_ERROR if report.errors else 0)
