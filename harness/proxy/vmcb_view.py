"""A VMCB in guest memory, read and written by the kernel's field names.

Names: `save.rip`, `control.asid` (or just `rip`, `asid`), `save.cs.attrib`, `int_ctl.V_GIF`,
`intercept.vmmcall`, `intercept.excp.13`. The view holds nothing: memory is the truth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.memory import GuestMemory
from harness.svm.exit_codes import describe
from harness.svm.intercepts import Intercept
from harness.svm.vmcb import (
    VMCB_SIZE,
    vmcb,
    vmcb_control_area,
    vmcb_save_area,
)
from harness.svm.vmcb_text import EXCEPTIONS, FIELD_BITS

_SHOWN: Final = (
    *("exit_code", "exit_info_1", "exit_info_2", "exit_int_info", "rip", "rsp", "rax", "rflags"),
    *("cr0", "cr3", "cr4", "efer", "cpl", "int_ctl", "int_state", "event_inj", "asid"),
    *("nested_ctl", "nested_cr3"),
)


class VmcbFieldError(MachineError):
    """A VMCB has no field of that name."""


@dataclass(frozen=True)
class _Place:
    """Bytes of a field, and the bits of them that count."""

    offset: int
    size: int
    shift: int = 0
    mask: int = (1 << 64) - 1


def intercept_named(name: str) -> Intercept | int:
    """Return the bit of `vmmcall`, `INTERCEPT_VMMCALL` or `excp.14`.

    Raises VmcbFieldError: there is none.
    """
    vector = name.removeprefix("excp.")
    if vector != name and vector.isdecimal() and int(vector) < EXCEPTIONS:
        return Intercept.INTERCEPT_EXCEPTION_OFFSET + int(vector)
    wanted = name.upper().removeprefix("INTERCEPT_")
    for bit in Intercept:
        if bit.name.removeprefix("INTERCEPT_").upper() == wanted:
            return bit
    raise VmcbFieldError(f"no intercept is called {name}")


def _find(name: str) -> _Place:
    if name.startswith("intercept."):
        number = int(intercept_named(name.removeprefix("intercept.")))
        offset = vmcb_control_area.intercepts.offset + number // 32 * 4
        return _Place(offset, 4, number % 32, 1)
    parts = name.split(".")
    if parts[0] not in ("control", "save"):
        in_control = hasattr(vmcb_control_area, parts[0])
        parts = ["control" if in_control else "save", *parts]
    kind: Any = vmcb
    offset = 0
    for position, part in enumerate(parts):
        register = FIELD_BITS.get(parts[position - 1]) if position else None
        if not issubclass(kind, ctypes.Structure):
            if register is None or part not in register.fields():
                raise VmcbFieldError(f"the VMCB has no field {name}")
            field = register.fields()[part]
            return _Place(offset, ctypes.sizeof(kind), field.lo, field.limit)
        types = {entry[0]: entry[1] for entry in kind._fields_}
        if part not in types:
            raise VmcbFieldError(f"the VMCB has no field {name}")
        offset += getattr(kind, part).offset
        kind = types[part]
    if issubclass(kind, ctypes.Structure | ctypes.Array):
        raise VmcbFieldError(f"{name} is not one number")
    return _Place(offset, ctypes.sizeof(kind))


_PLACES: dict[str, _Place] = {}


def place_of(name: str) -> _Place:
    """Return where a field lies.

    Raises VmcbFieldError: there is none of that name.
    """
    if name not in _PLACES:
        _PLACES[name] = _find(name)
    return _PLACES[name]


class VmcbView:
    """A VMCB by its address."""

    def __init__(self, memory: GuestMemory, gpa: Gpa) -> None:
        self._memory = memory
        self.gpa = gpa

    def __getitem__(self, name: str) -> int:
        """Return a field or a bit.

        Raises VmcbFieldError: no such field.
        """
        place = place_of(name)
        value = self._memory.read_int(Gpa(self.gpa + place.offset), place.size)
        return value >> place.shift & place.mask

    def __setitem__(self, name: str, value: int) -> None:
        """Write a field or a bit.

        Raises VmcbFieldError: no such field, or a value that does not fit it.
        """
        place = place_of(name)
        if not isinstance(value, int):
            raise VmcbFieldError(f"{name}: {value!r} is no number")
        at = Gpa(self.gpa + place.offset)
        if place.mask == (1 << 64) - 1:
            new = int(value) & place.mask
        else:
            old = self._memory.read_int(at, place.size)
            new = old & ~(place.mask << place.shift) | (int(value) & place.mask) << place.shift
            if not 0 <= int(value) <= place.mask:
                raise VmcbFieldError(f"{name}: {value:#x} does not fit")
        if new >> place.size * 8:
            raise VmcbFieldError(f"{name}: {value:#x} does not fit {place.size} bytes")
        self._memory.write_int(at, place.size, new)

    def update(self, values: Mapping[str, int]) -> None:
        """Write several fields."""
        for name, value in values.items():
            self[name] = value

    def read(self) -> vmcb:
        """Return a copy of the whole VMCB."""
        return self._memory.read_struct(vmcb, self.gpa)

    def write(self, whole: vmcb) -> None:
        """Replace the whole VMCB."""
        self._memory.write_struct(self.gpa, whole)

    def bytes(self) -> bytes:
        """Return its page."""
        return self._memory.read(self.gpa, VMCB_SIZE)

    @property
    def control(self) -> vmcb_control_area:
        """A copy of the control area."""
        return self.read().control  # type: ignore[no-any-return]

    @property
    def save(self) -> vmcb_save_area:
        """A copy of the state save area."""
        return self.read().save  # type: ignore[no-any-return]

    def has_intercept(self, number: int) -> bool:
        """Tell whether an intercept bit is set."""
        at = Gpa(self.gpa + vmcb_control_area.intercepts.offset + number // 32 * 4)
        return bool(self._memory.read_int(at, 4) >> number % 32 & 1)

    def summary(self) -> str:
        """Return the fields that explain most, in one line."""
        fields = ", ".join(f"{name}={self[name]:#x}" for name in _SHOWN)
        return f"vmcb {self.gpa:#x}: {describe(self['exit_code'])}, {fields}"
