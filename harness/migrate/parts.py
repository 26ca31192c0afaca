"""What all parts of a machine's state have in common: when they are there, and of what size."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

from harness.migrate.errors import StreamError
from kvm_ioctl.cstruct import CStruct

Data = bytes | memoryview
"""A part's bytes."""


class Need(Enum):
    """Which machines have a part."""

    ALWAYS = auto()
    IRQCHIP = auto()
    """Those with interrupt controllers in the kernel, and no others."""
    IF_GIVEN = auto()
    """Those whose kernel could tell it."""


@dataclass(frozen=True)
class Size:
    """How many bytes a part may have."""

    least: int
    most: int
    step: int = 1

    @classmethod
    def of(cls, kind: type[CStruct], also: int = 0) -> Self:
        """Return the size of one struct, that is followed by nothing or by `also` more bytes."""
        size = ctypes.sizeof(kind)
        return cls(size, size + also, also or 1)

    @classmethod
    def array(cls, kind: type[CStruct], most: int) -> Self:
        """Return the size of 0 up to `most` structs."""
        size = ctypes.sizeof(kind)
        return cls(0, size * most, size)

    def admits(self, size_bytes: int) -> bool:
        """Tell whether a part may have so many bytes."""
        inside = self.least <= size_bytes <= self.most
        return inside and (size_bytes - self.least) % self.step == 0

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least}"
        return f"{self.least} to {self.most} in steps of {self.step}"


@dataclass(frozen=True)
class Part:
    """One named piece of state, as bytes of KVM's structs."""

    name: str
    kind: type[CStruct]
    """What it is made of."""
    size: Size
    need: Need = field(default=Need.ALWAYS, kw_only=True)
    flaw: Callable[[Data], str | None] | None = field(default=None, kw_only=True)
    """Says what is wrong with bytes of the right size; None: nothing."""


def check_parts(
    where: str,
    parts: Mapping[str, Data],
    known: Mapping[str, Part],
    irqchip: bool,
) -> None:
    """Make sure that parts, as a stream has them, are those of a whole machine.

    Args:
        where: what messages begin with.
        parts: what came; their names are known.
        known: every part that there is.
        irqchip: whether the machine has interrupt controllers in the kernel.

    Raises StreamError: one is missing, of a wrong size, wrong in itself, or for another machine.

    """
    for part in known.values():
        data = parts.get(part.name)
        if data is None:
            if part.need is Need.ALWAYS or (irqchip and part.need is Need.IRQCHIP):
                raise StreamError(f"{where}: part {part.name} is missing")
            continue
        if part.need is Need.IRQCHIP and not irqchip:
            raise StreamError(f"{where}: part {part.name} of a machine without irqchip")
        _check_size(where, part, data)
        _check_flaw(where, part, data)


def check_like(where: str, parts: dict[str, bytes], known: Mapping[str, Part]) -> None:
    """Do the same for parts of the names and lengths of others that are right, but for the last.

    Raises StreamError: one is of a wrong size, or wrong in itself.
    """
    last = next(reversed(parts))
    _check_size(where, known[last], parts[last])
    for name, data in parts.items():
        if known[name].flaw is not None:
            _check_flaw(where, known[name], data)


def _check_size(where: str, part: Part, data: Data) -> None:
    if not part.size.admits(len(data)):
        raise StreamError(f"{where}: part {part.name} has {len(data)} bytes, not {part.size}")


def _check_flaw(where: str, part: Part, data: Data) -> None:
    if part.flaw is not None and (problem := part.flaw(data)):
        raise StreamError(f"{where}: part {part.name}: {problem}")
