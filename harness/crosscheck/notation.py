"""Operations as plain data, for JSON and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Final, get_type_hints

from harness.errors import NsvmError
from harness.model import layout
from harness.model.areas import SMRAM_32, SMRAM_64, VMCB
from harness.model.operations import (
    OPERATIONS,
    Execute,
    Instruction,
    Operation,
    SetCpuid,
    SetSlot,
    SetSregs,
    WriteSaveArea,
    WriteVmcb,
)


class BadNotation(NsvmError):
    """What was read is no operation."""


_KINDS: Final[Mapping[str, Any]] = {kind.__name__: kind for kind in OPERATIONS}
_TYPES: Final = {kind: get_type_hints(kind) for kind in OPERATIONS}

SREGS: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "cs.attrib")
"""Registers that `SetSregs` can change."""
CPUID_FEATURES: Final = ("svm", "lm", "nx", "npt", "nrips")
"""What `SetCpuid` can take away."""


def to_plain(operation: Operation) -> dict[str, Any]:
    """Return an operation as JSON can hold it; what is as by default is left out."""
    plain: dict[str, Any] = {"do": type(operation).__name__}
    for each in fields(operation):
        value = getattr(operation, each.name)
        made = each.default_factory
        default = each.default if made is MISSING else made()
        if value != default:
            plain[each.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Instruction):
        return value.value
    if isinstance(value, Mapping):
        return {name: int(number) for name, number in value.items()}
    # An IntEnum is an int, and no JSON of its own.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def from_plain(plain: Any) -> Operation:
    """Return the operation.

    Raises BadNotation: it is none; says why.
    """
    if not isinstance(plain, Mapping) or plain.get("do") not in _KINDS:
        raise BadNotation(f"no operation: {str(plain)[:80]}")
    kind = _KINDS[plain["do"]]
    known = {each.name: each for each in fields(kind)}
    given = {name: value for name, value in plain.items() if name != "do"}
    for name in given:
        if name not in known:
            raise BadNotation(f"{kind.__name__} has no {name}")
    for name, each in known.items():
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed and name not in given:
            raise BadNotation(f"{kind.__name__} needs {name}")
    values = {name: _value(kind, name, value) for name, value in given.items()}
    operation: Operation = kind(**values)
    _check_names(operation)
    return operation


def _value(kind: Any, name: str, value: Any) -> Any:
    wanted = _TYPES[kind][name]
    if wanted is Instruction:
        try:
            return Instruction(value)
        except ValueError:
            raise BadNotation(f"no instruction: {value!r}") from None
    if wanted in (int, bool, str):
        # A bool is an int to Python, but not here.
        if type(value) is not wanted or (wanted is int and not 0 <= value < 1 << 64):
            raise BadNotation(f"{kind.__name__}.{name}: no {wanted.__name__}: {value!r}")
        return value
    if not isinstance(value, Mapping) or any(
        not isinstance(key, str) or type(number) is not int or not 0 <= number < 1 << 64
        for key, number in value.items()
    ):
        raise BadNotation(f"{kind.__name__}.{name}: no numbers by name: {str(value)[:80]}")
    return dict(value)


def _check_names(operation: Operation) -> None:
    """Check that what an operation names is there."""
    if isinstance(operation, SetSlot):
        _among("slot", operation.what, layout.SLOTS)
    elif isinstance(operation, SetCpuid):
        _among("CPUID feature", operation.feature, CPUID_FEATURES)
    elif isinstance(operation, SetSregs):
        for name in operation.changes:
            _among("register", name, SREGS)
    elif isinstance(operation, WriteVmcb):
        _among("vmcb", operation.vmcb, ("a", "b"))
    area = VMCB if hasattr(operation, "changes") else None
    if isinstance(operation, WriteSaveArea):
        area = SMRAM_32 if operation.legacy else SMRAM_64
    if area is not None and not isinstance(operation, SetSregs):
        for name in getattr(operation, "changes", ()):
            _among("field", name, area)


def _among(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise BadNotation(f"there is no {what} {name!r}")


def in_words(operation: Operation) -> str:
    """Return one line: `WRMSR rcx=0xc0000080 rax=0x1500`, `WriteVmcb a control.asid=0x0`."""
    if isinstance(operation, Execute):
        head = operation.instruction.name + (" at CPL 3" if operation.user else "")
        head += " with TF" if operation.trap else ""
        numbers = {name: getattr(operation, name) for name in ("rax", "rcx", "rdx")}
        return " ".join((head, *(f"{name}={v:#x}" for name, v in numbers.items() if v)))
    parts = [type(operation).__name__]
    for name, value in to_plain(operation).items():
        if isinstance(value, Mapping):
            parts += [f"{field}={number:#x}" for field, number in value.items()]
        elif isinstance(value, bool) or (isinstance(value, str) and name != "do"):
            parts.append(f"{name}={value}")
        elif isinstance(value, int):
            parts.append(f"{name}={value:#x}")
    return " ".join(parts)


def sequence_from(plain: Any) -> tuple[Operation, ...]:
    """Return a list of operations.

    Raises BadNotation: something in it is none; says which.
    """
    if not isinstance(plain, Sequence) or isinstance(plain, str):
        raise BadNotation("no list of operations")
    found = []
    for number, each in enumerate(plain):
        try:
            found.append(from_plain(each))
        except BadNotation as e:
            raise BadNotation(f"operation {number}: {e}") from None
    return tuple(found)
