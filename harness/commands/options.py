"""Options that several commands have: which host, and which kernel on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.errors import HostError
from harness.runner.hosts import HostChoice

F = TypeVar("F", bound=Callable[..., Any])


def kernel_options(function: F) -> F:
    """Add --kernel and --modules; the command takes them as kernel, modules."""
    for option in (
        click.option(
            "--modules",
            type=click.Path(path_type=Path),
            help="With --kernel PATH: the tree of its modules (kernel/, or lib/modules/RELEASE).",
        ),
        click.option(
            "--kernel",
            metavar="SPEC",
            help="Kernel of the emulated host: a version prefix such as 5.10, 6.1, 6.12 or 7.3;"
            " 'running'; or the path of a bzImage or vmlinux.",
        ),
    ):
        function = option(function)
    return function


def host_options(function: F) -> F:
    """Add --host, --kernel and --modules; the command takes them as host, kernel, modules."""
    for option in (
        kernel_options,
        click.option(
            "--host",
            type=click.Choice(["auto", "local", "emulated"]),
            default="auto",
            show_default=True,
            help="auto: this machine's /dev/kvm if it has nested SVM, else the emulated host.",
        ),
    ):
        function = option(function)
    return function


def host_choice(host: str, kernel: str | None, modules: Path | None) -> HostChoice:
    """Return what `host_options` collected."""
    if modules is not None and kernel is None:
        raise click.UsageError("--modules goes with --kernel PATH")
    return HostChoice(host, kernel, modules)


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
        return
    try:
        path.write_text(text)
    except OSError as e:
        raise HostError(f"cannot write {path}: {e.strerror}") from e
