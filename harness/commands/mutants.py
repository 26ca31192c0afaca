"""`nsvm mutants`: put known bugs back into a kernel, and see what notices them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from harness.commands.list import all_scenarios
from harness.commands.mutants_run import Bugged, Work, run_with, run_without
from harness.commands.options import expression_option
from harness.commands.output import json_option, log, require_writable, wide_console, write_json
from harness.errors import HarnessError, NsvmError
from harness.host.debian_kernels import fetch_kernel
from harness.host.kernel_build import Variant, variants
from harness.host.selftests import build_selftests
from harness.repro.mutants import (
    Enough,
    KernelRun,
    Mutant,
    by_peers,
    compare,
    elsewhere,
    noticed,
    score,
)
from harness.repro.races import race_name
from harness.repro.table import load
from harness.runner.expression import matcher
from harness.runner.hosts import DEFAULT_KERNEL
from harness.runner.run import new_directory
from harness.scenarios.case import Case, cases_of

_STATUS_MISSED = 1
_STATUS_BROKE = 2
_STEPS = 1000
_ENOUGH = 3
_RACE_S = 5.0


@click.command("mutants")
@click.option("--from", "spec", default=DEFAULT_KERNEL, show_default=True, metavar="SPEC")
@click.option("--select", "names", multiple=True, metavar="VARIANT", help="Only these. Repeatable.")
@expression_option()
@click.option("--all-cases", is_flag=True, help="Every case, not one of each scenario.")
@click.option(
    "--enough",
    type=click.IntRange(0),
    default=_ENOUGH,
    show_default=True,
    help="Cases that fail, after which a bug is noticed well enough; 0 runs them all.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0),
    metavar="S",
    help="Seconds for the cases of a kernel whose bug was noticed already. Default: no limit.",
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=_STEPS,
    show_default=True,
    help="Of the cross-check, which ends at the first finding; 0 leaves it out.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the cross-check.")
@click.option(
    "--race",
    "race_s",
    type=click.FloatRange(0, 3600),
    default=_RACE_S,
    show_default=True,
    metavar="S",
    help="Race for each field of vmcb12 if nothing else noticed a bug; 0 leaves it out.",
)
@click.option("--selftests", is_flag=True, help="The kernel's own selftests for KVM, too.")
@click.option(
    "--without",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What the kernel without a bug does: without.json of an earlier run's results.",
)
@json_option
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
def command(
    spec: str,
    names: tuple[str, ...],
    expression: str,
    all_cases: bool,
    enough: int,
    budget: float | None,
    steps: int,
    seed: int,
    race_s: float,
    selftests: bool,
    without: Path | None,
    json_file: Path | None,
    results: Path | None,
) -> None:
    """Build each kernel with a bug put back, run the checks on it, and say which noticed.

    A check notices a bug if it fails with the bug, a scenario twice, and not without it. Without
    --all-cases one case of each scenario runs, the first, and what the bugs' reproducers name. Only
    what passes without a bug is run with it: what its reproducer names, then the quickest first.

    The kernel's own selftests (--selftests) are built from its source package and run beside ours;
    what they notice is told, and is no part of the score.

    Exit status: 0 every bug was noticed, 1 one was not, 2 a kernel could not be built or run.
    """
    require_writable(json_file)
    chosen = _bugs(spec, names)
    limit = Enough(enough, math.inf if budget is None else budget)
    peers = _selftests(spec) if selftests else None
    cases = _cases(expression, chosen, all_cases=all_cases)
    work = Work(cases, steps, seed, limit, race_s, peers)
    directory = results or new_directory()
    log(f"{len(chosen)} variants, {len(work.cases)} cases each; results in {directory}")
    before = _before(spec, work, directory, without)
    mutants, errors = [], []
    for variant in chosen:
        try:
            run = run_with(_on(spec, variant), work, before, directory / variant.name, log)
        except NsvmError as e:
            errors.append(f"{variant.name}: {e}")
            log(errors[-1])
        else:
            mutants.append(compare(variant, before, run, _own(variant)))
            log(_in_short(mutants[-1]))
        if json_file is not None and str(json_file) != "-":
            # As it happens: a long run that is cut short has its score so far.
            write_json(json_file, _plain(spec, work, mutants, errors))
    if json_file is not None:
        write_json(json_file, _plain(spec, work, mutants, errors))
    _print(mutants, errors)
    sys.exit(_status(mutants, errors))


def _plain(
    spec: str, work: Work, mutants: Sequence[Mutant], errors: Sequence[str]
) -> dict[str, Any]:
    return {
        "kernel": spec,
        "cases": [case.id for case in work.cases],
        "enough": work.enough.cases,
        "crosscheck_steps": work.steps,
        "mutants": [mutant.to_plain() for mutant in mutants],
        "score": {
            name: {area: list(each) for area, each in score(mutants, [sees]).items()}
            for name, sees in (("ours", noticed), ("elsewhere", elsewhere), ("peers", by_peers))
        },
        "selftests": work.selftests and list(work.selftests),
        "errors": list(errors),
    }


def _bugs(spec: str, names: Sequence[str]) -> list[Variant]:
    """Return the variants that are bugs; of the names given, if any.

    Raises click.UsageError: there is none of a name.
    """
    found = {n: v for n, v in variants(fetch_kernel(spec).series).items() if v.area}
    for name in names:
        if name not in found:
            raise click.UsageError(f"--select {name}: the bugs are {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def _cases(expression: str, bugs: Sequence[Variant], *, all_cases: bool) -> list[Case]:
    """Return one case of each scenario, or all, and what the bugs' reproducers name."""
    wanted = matcher(expression)
    own = {case for bug in bugs for case in _own(bug)}
    chosen = []
    for _, declared in all_scenarios():
        matching = [case for case in cases_of(declared) if wanted(case.id)]
        chosen += [
            case
            for number, case in enumerate(matching)
            if all_cases or not number or case.id in own
        ]
    return chosen


def _on(spec: str, bug: Variant) -> Bugged:
    return Bugged(f"{spec}:{bug.name}", bug, frozenset(_own(bug)))


def _own(bug: Variant) -> set[str]:
    """Return the cases, and the races, that the bug's reproducers name."""
    mine = [one for one in load().values() if bug.name in one.variants]
    races = {race_name(field) for one in mine for field in one.races}
    return races | {case for one in mine for case in one.cases}


def _selftests(spec: str) -> Mapping[str, Path]:
    built = build_selftests(fetch_kernel(spec))
    for name, why in built.unbuilt.items():
        log(f"selftest {name} could not be built: {why}")
    return built.programs


def _status(mutants: Sequence[Mutant], errors: Sequence[str]) -> int:
    if errors or not mutants:
        return _STATUS_BROKE
    return 0 if all(mutant.noticed for mutant in mutants) else _STATUS_MISSED


# Without a bug


def _before(spec: str, work: Work, directory: Path, file: Path | None) -> KernelRun:
    """Return what the kernel does without a bug, now or as an earlier run saw it.

    Raises HarnessError: the earlier run was of another kernel, or had no such cases.
    """
    if file is not None:
        before = KernelRun.load(file, spec)
        if missing := [case.id for case in work.cases if case.id not in before.outcomes]:
            raise HarnessError(f"{file}: {missing[0]} did not run, nor {len(missing) - 1} others")
        if work.steps and before.crosscheck is None:
            raise HarnessError(f"{file}: there was no cross-check; --steps 0 goes without")
        if work.selftests is not None and before.peers is None:
            raise HarnessError(f"{file}: the selftests did not run")
        return before
    before = run_without(spec, work, directory / "without", log)
    before.save(directory / "without.json", spec)
    return before


# Output


def _in_short(mutant: Mutant) -> str:
    by = [f"{len(mutant.scenarios)} cases"] if mutant.scenarios else []
    by += ["the cross-check"] if mutant.crosscheck else []
    by += [mutant.window] if mutant.window else []
    by += [f"{len(mutant.peers)} selftests"] if mutant.peers else []
    who = " and ".join(by) or "NOBODY"
    return f"{mutant.variant.name}: noticed by {who} ({mutant.ran} ran, {mutant.seconds:.0f} s)"


def _print(mutants: Sequence[Mutant], errors: Sequence[str]) -> None:
    console = wide_console()
    with_peers = any(mutant.peers is not None for mutant in mutants)
    table = Table("bug", "area", "cases", "for example", "cross-check")
    if with_peers:
        table.add_column("selftests")
    for mutant in mutants:
        others = [case for case in mutant.scenarios if case not in mutant.own]
        example = next(iter([*others, *mutant.scenarios]), mutant.window or "-")
        found = "yes" if mutant.crosscheck else "-"
        row = [mutant.variant.area, str(len(mutant.scenarios)), example.replace("[", r"\["), found]
        if with_peers:
            row.append(", ".join(mutant.peers or ()) or "-")
        table.add_row(mutant.variant.name, *row)
    console.print(table)
    columns = {"noticed": noticed, "by checks that no reproducer of it names": elsewhere}
    if with_peers:
        columns["by the selftests"] = by_peers
    for area, counts in score(mutants, columns.values()).items():
        *seen, of = counts
        said = (f"{count} {name}" for count, name in zip(seen, columns, strict=True))
        bugs = "1 bug" if of == 1 else f"{of} bugs"
        console.print(f"{area}, {bugs}: {', '.join(said)}", markup=False)
    for mutant in mutants:
        if not mutant.noticed:
            console.print(f"NOT NOTICED  {mutant.variant.name}", markup=False)
    for error in errors:
        console.print(f"ERROR  {error}", markup=False, soft_wrap=True)
