"""What a stream says of a machine, its memory apart; no VM is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from harness.migrate import fingerprint
from harness.migrate.errors import StreamError
from harness.migrate.parts import Part, check_like, check_parts
from harness.migrate.sections import (
    HEAD,
    LONGEST,
    NUMBER,
    PREP,
    SIDE,
    VCPU,
    VMST,
    Mould,
    Section,
    parse_json,
    unpack_number,
    unpack_parts,
    unpack_side,
)
from harness.migrate.shape import Shape
from harness.migrate.state import MachineState
from harness.migrate.vcpu_parts import VCPU_PARTS
from harness.migrate.vm_parts import VM_PARTS

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
        self.early: list[dict[str, bytes]] = []
        """What came beforehand: the parts of the vCPUs, and after them the VM's."""
        self._moulds: list[Mould] = []
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
            self._vm = self._parts(section, self.shape.vcpus, 0)
        elif section.tag == VCPU:
            self._vcpu(section)
        elif section.tag == PREP:
            self._prepare(section)
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
        number = self._number(section, len(self._vcpus), self.shape.vcpus - 1)
        self._vcpus.append(self._parts(section, number, NUMBER.size))

    def _prepare(self, section: Section) -> None:
        number = self._number(section, len(self.early), self.shape.vcpus)
        parts = self._parts(section, number, NUMBER.size)
        self.early.append(parts)
        self._moulds.append(Mould(parts))

    def _number(self, section: Section, due: int, most: int) -> int:
        """Return whose parts a section has: a vCPU's, or after the last one the VM's."""
        number = unpack_number(section)
        if number != due:
            raise StreamError(f"{section.where}: vCPU {number}, {due} is next")
        if number > most:
            raise StreamError(f"{section.where}: the machine has {self.shape.vcpus} vCPUs")
        return number

    def _parts(self, section: Section, number: int, at: int) -> dict[str, bytes]:
        """Return the parts of a section, checked; quickly, if they are like those of its PREP."""
        known: Mapping[str, Part] = VM_PARTS if number == self.shape.vcpus else VCPU_PARTS
        if number < len(self._moulds):
            parts = self._moulds[number].split(section.body, at)
            if parts is not None:
                check_like(section.where, parts, known)
                return parts
        parts = unpack_parts(section, at, known)
        check_parts(section.where, parts, known, self.shape.irqchip)
        return parts

    def _side(self, section: Section) -> None:
        self._sides_bytes += len(section.body)
        if len(self.sides) == MAX_SIDES or self._sides_bytes > MAX_SIDES_BYTES:
            raise StreamError(f"{section.where}: too many SIDEs, or too long ones")
        name, data = unpack_side(section)
        if name in self.sides:
            raise StreamError(f"{section.where}: {name!r} is there twice")
        self.sides[name] = data
