"""`nsvm bisect`: between which two kernels of the archive a scenario turns from good to bad."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from harness.commands.options import expression_option
from harness.host.debian_kernels import KernelOffer, matching
from harness.host.kernels import list_kernels
from harness.runner.bisection import Answer, BisectError, Turn, bisect
from harness.runner.run import OWN_RESULTS

#: `nsvm`, in a process of its own for each kernel.
_NSVM = (sys.executable, "-m", "harness")


@click.command("bisect")
@click.option("--good", required=True, metavar="SPEC", help="A kernel on which the cases pass.")
@click.option("--bad", required=True, metavar="SPEC", help="One on which something fails.")
@expression_option()
@click.option("--case", "cases", multiple=True, metavar="ID", help="This case. Repeatable.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, metavar="N",
              help="Try each kernel N times, until it fails: for what fails at times.")  # fmt: skip
@click.option("--cached", is_flag=True, help="Only kernels that need no download.")
@click.option("--shared", is_flag=True, help="One machine for all cases of a kernel.")
@click.option("--dry-run", is_flag=True, help="Only show the kernels in between.")
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR",
              help="With a directory for each kernel. Default: a new one in results/")  # fmt: skip
def command(
    good: str,
    bad: str,
    expression: str,
    cases: tuple[str, ...],
    repeat: int,
    cached: bool,
    shared: bool,
    dry_run: bool,
    results: Path | None,
) -> None:
    """Find the first bad kernel between a good and a bad one, of those in the archive.

    SPEC is the beginning of a version or a release, as `nsvm kernel list --all` has them; the
    newest that fits is taken. GOOD may be the newer of the two: then the bisection finds what
    mended it. Kernels are in the order of their versions; a stable series gets mends of its own,
    so that more than one turn is possible, and one of them is found. A known issue's FAIL is bad.

    Exit status: 0 found, 1 the ends are not as they were said to be, 2 it cannot be done.
    """
    if not (expression or cases):
        raise click.UsageError("which cases: -k EXPR or --case ID")
    offers = between(good, bad, _kernels(cached))
    if dry_run:
        for offer in offers:
            click.echo(f"{offer.release}{'  (cached)' if offer.is_cached else ''}")
        return
    directory = results or OWN_RESULTS / datetime.now(UTC).strftime("bisect-%Y%m%dT%H%M%SZ")
    arguments = ["-k", expression, *(word for case in cases for word in ("--case", case))]
    if repeat > 1:
        arguments += ["--repeat", str(repeat), "--until-fail"]
    arguments += ["--shared"] if shared else []
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BisectError(f"cannot make {directory}: {e.strerror}") from e
    click.echo(f"{len(offers)} kernels; results in {directory}")
    try:
        turn = bisect([o.release for o in offers], lambda name: _test(name, directory, arguments))
    except BisectError as e:
        click.echo(f"nsvm: {e}; its output is in {directory}", err=True)
        sys.exit(1)
    for line in _told(turn):
        click.echo(line)


def _kernels(cached: bool) -> list[KernelOffer]:
    return [o for o in list_kernels(all_versions=True) if o.is_cached or not cached]


def between(good: str, bad: str, offers: Sequence[KernelOffer]) -> list[KernelOffer]:
    """Return the kernels from the good to the bad one, both included, in the order of testing.

    `offers` are the kernels that there are, oldest first.

    Raises:
        BisectError: there is no such kernel, or both are the same.
    """
    first, last = (_one(spec, offers) for spec in (good, bad))
    if first == last:
        raise BisectError(f"{good} and {bad} are the same kernel, {offers[first].release}")
    step = 1 if first < last else -1
    return [offers[number] for number in range(first, last + step, step)]


def _one(spec: str, offers: Sequence[KernelOffer]) -> int:
    found = matching(spec, offers) if spec else []
    if not found:
        raise BisectError(f"no kernel {spec} in the archive; see nsvm kernel list --all")
    return list(offers).index(found[-1])


def _test(release: str, directory: Path, arguments: Sequence[str]) -> Answer:
    """Run the cases on one kernel; what the run says goes to a file beside its results.

    Raises:
        BisectError: the run was ended, or could not be begun on any kernel.
    """
    own = directory / release
    own.mkdir(parents=True, exist_ok=True)
    click.echo(f"{release}: ", nl=False)
    with (own / "output.txt").open("w") as output:
        # Every wait in there has its deadline, so this has one.
        done = subprocess.run(
            [*_NSVM, "run", "--exit-style", "bisect", "--kernel", release, "--results", own,
             "--store", directory / "nsvm.sqlite", *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    try:
        answer = Answer(done.returncode)
    except ValueError:
        click.echo("stopped")
        last = (own / "output.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        raise BisectError(f"nsvm run ended with {done.returncode}: {last}") from None
    click.echo(answer.name.lower().replace("_", " "))
    return answer


def _told(turn: Turn) -> list[str]:
    lines = [f"last good:  {turn.last_good}", f"first bad:  {turn.first_bad}"]
    if turn.untold:
        lines.append(f"cannot tell, in between: {', '.join(turn.untold)}")
    return [*lines, f"{turn.tried} kernels tried"]
