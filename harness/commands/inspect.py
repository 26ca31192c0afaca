"""`nsvm inspect`: what is in the stream of a saved machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import HostError, NsvmError
from harness.migrate.decode import Block
from harness.migrate.inspect import (
    Comparison,
    Inspection,
    as_json,
    blocks,
    compare,
    comparison_as_json,
    inspect_stream,
)

STATUS_DIFFERENT = 1


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare with this stream.")
@click.option("--all", "show_all", is_flag=True, help="Show what is zero too.")
@click.option("--json", "as_machine", is_flag=True, help="Print one JSON object instead of tables.")
def command(file: Path, other: Path | None, show_all: bool, as_machine: bool) -> None:
    """Say what is in the stream of a saved machine.

    Registers and nested state come with their bits by name; in guest mode the registers are L2's.

    Exit status: 0; 1 if --diff finds a difference that is no time counter; 2 if a file is no
    stream.
    """
    found = _read(file)
    if other is not None:
        compared = compare(found, _read(other))
        if as_machine:
            click.echo(json.dumps(comparison_as_json(compared), indent=2))
        else:
            _print_comparison(compared)
        sys.exit(STATUS_DIFFERENT if compared.differences else 0)
    if as_machine:
        click.echo(json.dumps(as_json(found), indent=2))
    else:
        _print(found, show_all)


def _read(path: Path) -> Inspection:
    try:
        with open(path, "rb") as file:
            return inspect_stream(file)
    except OSError as e:
        raise HostError(f"cannot read {path}: {e.strerror}") from e
    except NsvmError as e:
        raise type(e)(f"{path}: {e}") from e


def _print(found: Inspection, show_all: bool) -> None:
    console = Console(highlight=False)
    for block in blocks(found):
        if table := _table(block, show_all):
            console.print(Text(block.title, style="bold"))
            console.print(table)


def _table(block: Block, show_all: bool) -> Table | None:
    rows = [row for row in block.rows if show_all or not row.zero]
    if not rows:
        return None
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        # As Text, for a stream's own words may look like markup.
        table.add_row(Text(row.name), Text(row.text))
    return table


def _print_comparison(compared: Comparison) -> None:
    for difference in compared.differences:
        click.echo(str(difference))
    if compared.excused:
        click.echo(f"{len(compared.excused)} excused difference(s):")
    for excused in compared.excused:
        click.echo(f"  {excused.difference} ({excused.why})")
    click.echo(f"{len(compared.differences) or 'no'} difference(s)")
