"""`nsvm kernel`: the kernels that the emulated host can boot."""

from __future__ import annotations

import time

import click
from rich.console import Console
from rich.table import Table

from harness.host.debian_kernels import fetch_kernel
from harness.host.kernel_build import build, find_variant, series_of, variants
from harness.host.kernels import list_kernels, resolve
from harness.runner.hosts import DEFAULT_KERNEL


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


@command.command("variants")
@click.option("--from", "series", default=DEFAULT_KERNEL, show_default=True, metavar="SERIES")
def variants_command(series: str) -> None:
    """List the variants of KVM that can be built for a series of kernels.

    Each with all series that it can be built for.
    """
    found = variants(series)
    for name, variant in found.items():
        click.echo(f"{name:<36}{', '.join(series_of(name)):<17}{variant.summary}")
    if not found:
        click.echo(f"none for {series}; a FILE.patch of your own can be built")


@command.command("build")
@click.option("--from", "spec", default=DEFAULT_KERNEL, show_default=True, metavar="SPEC")
@click.option(
    "--variant", "name", required=True, help="One of nsvm kernel variants, or a FILE.patch."
)
def build_command(spec: str, name: str) -> None:
    """Build kvm and kvm-amd for a kernel of the archive with a patch, from its own source.

    Where the patch is in arch/x86/kvm/svm only, kvm-amd alone is built. What was built once with
    the same patch, kernel and compiler is taken from the cache. Every --kernel option takes
    SPEC:VARIANT, and builds it if need be.

    Exit status: 0, or 2: what could not be built, or fetched, is named.
    """
    offer = fetch_kernel(spec)
    variant = find_variant(offer.series, name)
    started = time.monotonic()
    tree = build(offer, variant)
    click.echo(f"{tree}  {time.monotonic() - started:.0f} s")
    click.echo(f"nsvm run --kernel {spec}:{name}")
