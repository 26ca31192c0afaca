"""`nsvm mutants`: put known bugs back into a kernel, and see what notices them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.commands.compare import matcher
from harness.commands.crosscheck_run import CrosscheckRun, Plan
from harness.commands.list import all_scenarios
from harness.commands.options import require_writable, write_json
from harness.crosscheck.record import told
from harness.crosscheck.settings import Setting, setting_for
from harness.errors import NsvmError
from harness.host.debian_kernels import fetch_kernel
from harness.host.kernel_build import Variant, variants
from harness.report.results import ResultsFile
from harness.report.verdict import Outcome, Verdict
from harness.repro.mutants import CrossChecked, KernelRun, Mutant, compare, run_cases, score
from harness.runner.hosts import DEFAULT_KERNEL, HostChoice, HostPool
from harness.runner.lab import Lab
from harness.runner.run import new_directory
from harness.scenarios.case import Case, cases_of

_STATUS_MISSED = 1
_STATUS_BROKE = 2
_FOCUS_STEPS = 1000


@click.command("mutants")
@click.option("--from", "spec", default=DEFAULT_KERNEL, show_default=True, metavar="SPEC")
@click.option("--select", "names", multiple=True, metavar="VARIANT", help="Only these. Repeatable.")
@click.option("-k", "expression", default="", metavar="EXPR", help="Only cases that match.")
@click.option("--all-cases", is_flag=True, help="Every case, not one of each scenario.")
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=_FOCUS_STEPS,
    show_default=True,
    help="Of the cross-check; 0 leaves it out.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the cross-check.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout.")
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
def command(
    spec: str,
    names: tuple[str, ...],
    expression: str,
    all_cases: bool,
    steps: int,
    seed: int,
    json_file: Path | None,
    results: Path | None,
) -> None:
    """Build each kernel with a bug put back, run the checks on it, and say which noticed.

    A check notices a bug if it fails with the bug and not without. Without --all-cases one case of
    each scenario runs, the first.

    Exit status: 0 every bug was noticed, 1 one was not, 2 a kernel could not be built or run.
    """
    require_writable(json_file)
    chosen = _bugs(spec, names)
    cases = _cases(expression, all_cases=all_cases)
    directory = results or new_directory()
    _log(f"{len(chosen)} variants, {len(cases)} cases each; results in {directory}")
    without = _run(spec, cases, steps, seed, directory / "without")
    mutants, errors = [], []
    for variant in chosen:
        try:
            run = _run(f"{spec}:{variant.name}", cases, steps, seed, directory / variant.name)
        except NsvmError as e:
            errors.append(f"{variant.name}: {e}")
            continue
        mutants.append(compare(variant, without, run))
        _log(_in_short(mutants[-1]))
    if json_file is not None:
        plain = {
            "kernel": spec,
            "cases": [case.id for case in cases],
            "crosscheck_steps": steps,
            "mutants": [mutant.to_plain() for mutant in mutants],
            "score": {area: list(each) for area, each in score(mutants).items()},
            "errors": errors,
        }
        write_json(json_file, plain)
    _print(mutants, errors)
    sys.exit(_status(mutants, errors))


def _bugs(spec: str, names: Sequence[str]) -> list[Variant]:
    """Return the variants that are bugs; of the names given, if any.

    Raises click.UsageError: there is none of a name.
    """
    found = {n: v for n, v in variants(fetch_kernel(spec).series).items() if v.area}
    for name in names:
        if name not in found:
            raise click.UsageError(f"--select {name}: the bugs are {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def _cases(expression: str, *, all_cases: bool) -> list[Case]:
    wanted = matcher(expression)
    chosen = []
    for _, declared in all_scenarios():
        matching = [case for case in cases_of(declared) if wanted(case.id)]
        chosen += matching if all_cases else matching[:1]
    return chosen


def _status(mutants: Sequence[Mutant], errors: Sequence[str]) -> int:
    if errors or not mutants:
        return _STATUS_BROKE
    return 0 if all(mutant.noticed for mutant in mutants) else _STATUS_MISSED


def _log(text: str) -> None:
    click.echo(f"nsvm: {text}", err=True)


# One kernel


def _run(spec: str, cases: Sequence[Case], steps: int, seed: int, directory: Path) -> KernelRun:
    choice = HostChoice("emulated", spec)
    with (
        ResultsFile(directory / "results.jsonl") as file,
        HostPool(choice, fresh=False, log=_log) as pool,
    ):
        crosscheck = _crosscheck(pool, steps, seed) if steps else None
        return KernelRun(run_cases(pool, Lab(file), cases, _told), crosscheck)


def _told(case: Case, outcome: Outcome) -> None:
    if outcome.verdict in (Verdict.ERROR, Verdict.MISS):
        _log(f"{outcome.verdict.value} {case.id}: {outcome.reason.partition(chr(10))[0]}")


def _crosscheck(pool: HostPool, steps: int, seed: int) -> CrossChecked:
    host, session = pool.session({})
    setting = Setting(setting_for(str(host.describe()["kernel_release"])))
    report = CrosscheckRun(host, Plan(steps, seed, None, setting), _log).go(session)
    # Its host may have been started anew: the session that the pool has may be gone.
    pool.drop({})
    findings = tuple(
        f"{bundle.what}: {told(bundle.difference)}" if bundle.difference else bundle.what
        for bundle in report.bundles
    )
    return CrossChecked(findings, "; ".join(report.errors))


# Output


def _in_short(mutant: Mutant) -> str:
    by = [f"{len(mutant.scenarios)} cases"] if mutant.scenarios else []
    by += ["the cross-check"] if mutant.crosscheck else []
    return f"{mutant.variant.name}: noticed by {' and '.join(by) or 'NOBODY'}"


def _print(mutants: Sequence[Mutant], errors: Sequence[str]) -> None:
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=160)
    table = Table("bug", "area", "cases", "for example", "cross-check")
    for mutant in mutants:
        example = next(iter(mutant.scenarios), "-")
        found = "yes" if mutant.crosscheck else "-"
        row = (mutant.variant.area, str(len(mutant.scenarios)), example.replace("[", r"\["), found)
        table.add_row(mutant.variant.name, *row)
    console.print(table)
    for area, (noticed, of) in score(mutants).items():
        console.print(f"{area}: {noticed} of {of} noticed", markup=False)
    for mutant in mutants:
        if not mutant.noticed:
            console.print(f"NOT NOTICED  {mutant.variant.name}", markup=False)
    for error in errors:
        console.print(f"ERROR  {error}", markup=False, soft_wrap=True)
