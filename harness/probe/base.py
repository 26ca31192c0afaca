"""What all memory probes have in common."""

from __future__ import annotations

from typing import Protocol, Self


class MemoryProbe(Protocol):
    """Counts the bytes that the kernel holds for this process's VMs.

    A context manager: entering arms it, leaving gives the machine back as it was. Only differences
    between readings mean anything.
    """

    #: How results name it.
    name: str

    def read_bytes(self) -> int:
        """Return the bytes held now, relative to an arbitrary but fixed origin."""

    def resolution_bytes(self) -> int:
        """Return by how much one reading may be off."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
