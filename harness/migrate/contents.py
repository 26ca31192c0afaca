"""What a stream says of a machine, its memory apart; no VM is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from harness.migrate import fingerprint
from harness.migrate.errors import StreamError
from harness.migrate.parts import check_parts
from harness.migrate.sections import (
    HEAD,
    LONGEST,
    SIDE,
    VCPU,
    VMST,
    Section,
    parse_json,
    unpack_parts,
    unpack_side,
    unpack_vcpu,
)
from harness.migrate.shape import Shape
from harness.migrate.state import VM_PARTS, MachineState
from harness.migrate.vcpu_parts import VCPU_PARTS

MAX_SIDES: Final = 1024
MAX_SIDES_BYTES: Final = LONGEST[SIDE]
"""More than this of all SIDEs together is taken for nonsense."""


class Contents:
    """Collects what sections say, as `StreamReader` gives them; each is checked as it comes."""

    def __init__(self) -> None:
        self.source: Mapping[str, Any] = {}
        """The fingerprint of where the stream comes from."""
        self.sides: dict[str, Any] = {}
        self._shape: Shape | None = None
        self._vm: dict[str, bytes] = {}
        self._vcpus: list[dict[str, bytes]] = []
        self._sides_bytes = 0

    @property
    def shape(self) -> Shape:
        """The machine's shape.

        Raises StreamError: there was no header yet.
        """
        if self._shape is None:
            raise StreamError("there is no header")
        return self._shape

    def take(self, section: Section) -> None:
        """Take what a section says, if it is one of those that say something.

        Raises StreamError: it cannot be.
        Raises Refused: the stream is of another architecture.
        """
        if section.tag == HEAD:
            self._head(section)
        elif section.tag == VMST:
            self._vm = unpack_parts(section, 0, VM_PARTS)
            check_parts(section.where, self._vm, VM_PARTS, self.shape.irqchip)
        elif section.tag == VCPU:
            self._vcpu(section)
        elif section.tag == SIDE:
            self._side(section)

    def state(self) -> MachineState:
        """Return the whole state, all sections having been taken.

        Raises StreamError: vCPUs are missing.
        """
        if len(self._vcpus) != self.shape.vcpus:
            raise StreamError(f"{len(self._vcpus)} vCPUs of {self.shape.vcpus} came")
        return MachineState(self._vm, tuple(self._vcpus))

    def _head(self, section: Section) -> None:
        head = parse_json(section, section.body)
        if not isinstance(head, dict) or set(head) != {"source", "shape"}:
            raise StreamError(f"{section.where}: malformed")
        self.source = fingerprint.check(head["source"])
        self._shape = Shape.from_json(head["shape"])

    def _vcpu(self, section: Section) -> None:
        number, parts = unpack_vcpu(section, VCPU_PARTS)
        if number != len(self._vcpus):
            raise StreamError(f"{section.where}: vCPU {number}, {len(self._vcpus)} is next")
        if number >= self.shape.vcpus:
            raise StreamError(f"{section.where}: the machine has {self.shape.vcpus} vCPUs")
        check_parts(section.where, parts, VCPU_PARTS, self.shape.irqchip)
        self._vcpus.append(parts)

    def _side(self, section: Section) -> None:
        self._sides_bytes += len(section.body)
        if len(self.sides) == MAX_SIDES or self._sides_bytes > MAX_SIDES_BYTES:
            raise StreamError(f"{section.where}: too many SIDEs, or too long ones")
        name, data = unpack_side(section)
        if name in self.sides:
            raise StreamError(f"{section.where}: {name!r} is there twice")
        self.sides[name] = data
