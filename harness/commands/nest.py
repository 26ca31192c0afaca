"""`nsvm nest`: Linux as guest of Linux, level by level, with one verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, require_writable
from harness.nest.plan import Inner, Plan, Vmm
from harness.qemu_vmm.over import Over
from harness.report.verdict import Verdict, exit_status
from harness.runner.nest import nest

_MEMORY_COLUMNS = {
    "anon": ("guest, MiB", 20),
    "kernel": ("kernel, KiB", 10),
    "sec_pagetables": ("tables, KiB", 10),
    "nested_bytes": ("nested, B", 0),
    "pages_4k": ("4 KiB pages", 0),
    "pages_2m": ("2 MiB pages", 0),
}
"""Of a `memory` event: the title, and by how many bits its figure is shifted."""


@click.command("nest")
@click.option(
    "--depth",
    type=click.IntRange(1, 3),
    default=1,
    show_default=True,
    help="Levels of Linux, the host not counted.",
)
@click.option(
    "--inner",
    type=click.Choice([kind.value for kind in Inner]),
    default=Inner.PROXY.value,
    show_default=True,
    help="What the innermost of them has as its guest: a proxy machine, or one more Linux.",
)
@click.option("--guest-kernel", metavar="SPEC", help="Kernel of the guests; the host's by default.")
@click.option("--vcpus", type=click.IntRange(1, 4), default=1, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of every level's work."
)
@click.option(
    "--steps", type=click.IntRange(1), default=24, show_default=True, help="Of the proxy's work."
)
@click.option(
    "--patience",
    type=click.FloatRange(0.01),
    default=1.0,
    show_default=True,
    metavar="X",
    help="All deadlines are multiplied by it.",
)
@click.option(
    "--slow-clock",
    type=click.IntRange(1, 10),
    default=1,
    show_default=True,
    metavar="N",
    help="Let time pass N times slower in all guests: emulated ticks would eat up most of it.",
)
@click.option(
    "--moves",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Migrations of L1 to and fro between two processes, at random moments.",
)
@click.option(
    "--smis",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="SMIs that L1 gets, at random moments.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides about the moments.")
@click.option(
    "--vmm",
    type=click.Choice([kind.value for kind in Vmm]),
    default=Vmm.OWN.value,
    show_default=True,
    help="What runs L1 in the host: the harness itself, or QEMU.",
)
@click.option(
    "--move-over",
    type=click.Choice([kind.value for kind in Over]),
    default=Over.UNIX.value,
    show_default=True,
    help="What QEMU migrates L1 over.",
)
@click.option("--append", default="", metavar="ARGS", help="More of the guests' command line.")
@click.option(
    "--consoles",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the consoles and kernel logs of all levels.",
)
@json_option
@host_options
def command(
    depth: int,
    inner: str,
    guest_kernel: str | None,
    vcpus: int,
    rounds: int,
    steps: int,
    patience: float,
    slow_clock: int,
    moves: int,
    smis: int,
    seed: int,
    vmm: str,
    move_over: str,
    append: str,
    consoles: Path | None,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Boot Linux in the host, in it Linux, and so on; have every level work and check itself.

    Every Linux boots from the same kernel and an initrd that holds this harness, which creates the
    next level with the same code. Deadlines are per level and grow with it.

    Exit status: 0 all levels worked and no kernel complained, 1 a level failed, 2 the host or the
    harness broke, or a level stopped and nobody can say whether it hangs or is slow.
    """
    require_writable(json_file)
    if vmm == Vmm.QEMU and smis:
        raise click.UsageError("--smis cannot go with --vmm qemu: QMP has no command for an SMI")
    if vmm != Vmm.QEMU and move_over != Over.UNIX:
        raise click.UsageError("--move-over chooses what QEMU migrates over: it needs --vmm qemu")
    options = f"{Plan.options} {append}".strip()
    plan = Plan(
        depth,
        Inner(inner),
        vcpus,
        steps,
        rounds,
        options,
        patience,
        slow_clock,
        moves,
        smis,
        seed,
        Vmm(vmm),
        Over(move_over),
    )
    report = nest(host_choice(host, kernel, modules), plan, guest_kernel, log, consoles)
    deliver(json_file, report, lambda: _print(report))
    sys.exit(exit_status([Verdict(report["verdict"])]))


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host, plan = report["host"], report["plan"]
    console.print(f"host         {host['kernel_release']}, {host['silicon']}")
    console.print(f"tower        {plan['depth']} levels, the guest of the last: {plan['inner']}")
    table = Table("level", "kernel", "CPUs", "boot, s", "all, s", "stands at")
    for level in report["levels"]:
        if level["number"] and (level["stages"] or level["report"]):
            table.add_row(*_row(level))
    console.print(table)
    if report["memory"]:
        console.print(_memory_table(report["memory"]))
    for level in report["levels"]:
        for line in level["kernel_log"][-5:]:
            console.print(f"L{level['number']} kernel    {line}", markup=False)
    for move in report["moves"]:
        console.print(
            f"move {move['number']:<7} {move['bytes'] >> 20} MiB in {move['seconds']:.1f} s, down"
            f" for {1e3 * move['downtime_s']:.0f} ms, {move['in_guest_mode']} vCPUs in guest mode"
        )
    if report["smis"]:
        console.print(_smis(report["smis"]))
    if report["lost"]:
        console.print(f"last console lines of L{report['lost']['level']}:")
        for line in report["lost"]["console"].splitlines():
            console.print(f"  {line}", markup=False)
    console.print(
        f"verdict      {report['verdict']}: {report['why']} ({report['seconds']:.0f} s)",
        markup=False,
        soft_wrap=True,
    )


def _smis(smis: list[dict[str, Any]]) -> str:
    """Return in one line what the SMIs hit, and how fast their handler was entered."""
    hit = sum(smi["left_guest"] for smi in smis)
    times = sorted(smi["seconds"] for smi in smis)
    median, longest = 1e3 * times[len(times) // 2], 1e3 * times[-1]
    ways = sorted({smi["way"] for smi in smis})
    return (
        f"SMIs         {len(smis)} by {' and '.join(ways)}, {hit} while L1 ran a guest;"
        f" handler after {median:.0f} ms (median), {longest:.0f} ms at most"
    )


def _row(level: dict[str, Any]) -> tuple[str, ...]:
    stages, seen = level["stages"], level["report"]
    boot = stages["ready"] - stages["entered"] if "ready" in stages else None
    return (
        f"L{level['number']}",
        str(seen.get("release", "")),
        str(seen.get("cpus", "")),
        "" if boot is None else f"{boot:.1f}",
        f"{stages['done']:.1f}" if "done" in stages else "",
        level["at"],
    )


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    """Return what each VM cost the kernel that runs it, stage by stage."""
    seen = {name for row in rows for name in row}
    columns = {name: column for name, column in _MEMORY_COLUMNS.items() if name in seen}
    table = Table("VM", "when", *(title for title, _ in columns.values()))
    for vm in sorted({row["vm"] for row in rows}):
        for row in (row for row in rows if row["vm"] == vm):
            figures = (
                str(row[name] >> shift) if name in row else ""
                for name, (_, shift) in columns.items()
            )
            table.add_row(f"L{vm}", f"L{row['level']} {row['what']}", *figures)
        table.add_section()
    return table
