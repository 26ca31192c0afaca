"""`nsvm list`: the scenarios and their cases."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator

import click

import harness.scenarios
from harness.scenarios.case import Scenario, cases_of, scenario_of


def all_scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield every scenario with the name of its module, in the order of declaration."""
    for info in pkgutil.iter_modules(harness.scenarios.__path__):
        if not info.name.startswith("test_"):
            continue
        module = importlib.import_module(f"{harness.scenarios.__name__}.{info.name}")
        for value in vars(module).values():
            if declared := scenario_of(value):
                yield info.name, declared


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="A list of scenarios, as JSON.")
def command(as_json: bool) -> None:
    """List the scenarios: what each claims, needs, and along which axes it varies."""
    found = list(all_scenarios())
    if as_json:
        entries = [
            {
                "name": declared.name,
                "module": module,
                "claim": declared.claim,
                "needs": [need.__name__ for need in declared.needs],
                "axes": {axis: list(values) for axis, values in declared.axes.items()},
                "params": dict(declared.params),
                "levels": declared.levels,
                "quick": declared.quick,
                "unsafe": declared.unsafe,
                "timeout_s": declared.timeout_s,
                "cases": [case.id for case in cases_of(declared)],
            }
            for module, declared in found
        ]
        click.echo(json.dumps(entries, indent=2))
        return
    for _, declared in found:
        cases = len(list(cases_of(declared)))
        marks = [mark for mark in ("quick", "unsafe") if getattr(declared, mark)]
        click.echo(f"{declared.name}  [{', '.join([f'{cases} case(s)', *marks])}]")
        click.echo(f"    {declared.claim}")
    click.echo(f"{len(found)} scenarios, {sum(len(list(cases_of(d))) for _, d in found)} cases")
