"""What a fleet is to run: on which hosts, which share each, and where that is recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FleetPlan:
    """What the command line says, with the hosts that the inventory has."""

    inventories: tuple[Path, ...]
    #: Names, sorted.
    hosts: tuple[str, ...]
    #: Whether each host gets a share of the cases; else each gets all.
    deal: bool
    #: A directory for each host below it.
    directory: Path
    store: Path
    #: Options and files of `nsvm run`, the same for each host.
    arguments: tuple[str, ...]
    limit: str = ""
    #: For all of it, in seconds: then what never ran is MISS.
    longest_s: float = 6 * 3600.0

    def where(self, host: str) -> Path:
        """Return the directory of a host's results."""
        return self.directory / host

    def part(self, host: str) -> str:
        """Return a host's share, as ``I/N``; empty if it gets all."""
        return f"{self.hosts.index(host) + 1}/{len(self.hosts)}" if self.deal else ""

    def arguments_of(self, host: str) -> list[str]:
        """Return what follows ``nsvm run --host ... --lab ... --results ...`` for a host."""
        part = ["--part", self.part(host)] if self.deal else []
        return ["--store", str(self.store), *part, *self.arguments]

    def variables(self, here: Path) -> dict[str, object]:
        """Return the playbook's variables; relative names are below `here`."""
        return {
            "fleet_command": [sys.executable, "-m", "harness", "run"],
            "fleet_arguments": {host: self.arguments_of(host) for host in self.hosts},
            "fleet_directory": str(self.directory),
            "fleet_from": str(here),
        }


def absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return paths that mean the same from everywhere."""
    return tuple(path.absolute() for path in paths)
