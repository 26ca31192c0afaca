"""What commands give out: a report for people or as JSON, and words beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.errors import HostError

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout."
)
"""Add --json FILE; the command takes it as json_file."""


_WIDTH = 200


def wide_console() -> Console:
    """Return the terminal, or where there is none a console on which no case's name is broken."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=_WIDTH)


def progress_bar() -> Progress:
    """Return a bar on standard error that counts what is done; to be used in a `with`."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip


def print_host(console: Console, host: Mapping[str, Any], width: int) -> None:
    """Say which kernel and host it was, in two lines whose titles are `width` columns wide.

    `host` is a host's description.
    """
    kernel = f"{host['kernel_release']}  ({host['kernel_origin']})"
    for title, text in (("kernel", kernel), ("host", f"{host['kind']}: {host['silicon']}")):
        # Never broken, and no markup: an origin may be any path.
        console.print(f"{title:<{width}}{text}", markup=False, soft_wrap=True)


def log(text: str) -> None:
    """Say something beside the report: a line on standard error."""
    click.echo(f"nsvm: {text}", err=True)


def deliver(json_file: Path | None, value: object, show: Callable[[], None]) -> None:
    """Write `value` where --json says, and show it unless it is on standard output by now.

    Raises:
        HostError: the file cannot be written.
    """
    if json_file is not None:
        write_json(json_file, value)
    if str(json_file) != "-":
        show()


def require_writable(path: Path | None) -> None:
    """Check, before anything is measured, that `write_json` can do its part.

    Raises:
        HostError: it cannot: no such directory, a directory itself, or no permission.
    """
    if path is None or str(path) == "-":
        return
    if not path.parent.is_dir():
        raise HostError(f"cannot write {path}: no directory {path.parent}")
    if path.is_dir():
        raise HostError(f"cannot write {path}: it is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise HostError(f"cannot write {path}: no permission")


def write_json(path: Path, value: object) -> None:
    """Write `value` to a file, or to standard output if the path is ``-``.

    Raises:
        HostError: the file cannot be written.
    """
    text = json.dumps(value, indent=2) + "\n"
    if str(path) == "-":
        click.echo(text, nl=False)
    else:
        write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        HostError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise HostError(f"cannot write {path}: {e.strerror}") from e
