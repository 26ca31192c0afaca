"""`nsvm kernel`: the kernels that the emulated host can boot."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from harness.host.kernels import list_kernels, resolve


@click.group("kernel")
def command() -> None:
    """Kernels for the emulated host, from the distribution's archive."""


@command.command("list")
@click.option("--all", "all_versions", is_flag=True, help="Every version, not one per series.")
def list_command(all_versions: bool) -> None:
    """Show what the archive offers and what is cached."""
    table = Table()
    for column in ("series", "release", "version", "download", "cached"):
        table.add_column(column, justify="right" if column in ("download", "cached") else "left")
    for offer in list_kernels(all_versions=all_versions):
        cached = f"{offer.cached_bytes >> 20} MiB" if offer.is_cached else ""
        download = f"{offer.size_bytes >> 20} MiB"
        table.add_row(offer.series, offer.release, offer.version, download, cached)
    Console(highlight=False).print(table)


@command.command("fetch")
@click.argument("spec")
def fetch_command(spec: str) -> None:
    """Download the newest kernel that SPEC names, such as 6.1, and make it ready to boot."""
    kernel = resolve(spec, refresh=True)
    click.echo(f"{kernel.release}  {kernel.origin}")
