"""How values look at the prompt: VMCBs by field name and with their bits, numbers in hex."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Final

from harness.proxy.level import GuestLevel, Level
from harness.proxy.vmcb_view import _REGISTERS as CONTROL_REGISTERS
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import VmExit
from harness.svm.bits import Bits
from harness.svm.exit_codes import describe
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import SegAttrib, vmcb, vmcb_seg
from kvm_ioctl.cstruct import CStruct

_SAVE_REGISTERS: Final[Mapping[str, type[Bits]]] = {"efer": Efer, "cr0": Cr0, "cr4": Cr4}
_NAME_WIDTH = 20

#: Field name, its text, and whether it is zero.
_Row = tuple[str, str, bool]


def bits_text(value: Bits) -> str:
    """Return the fields that are not zero: `PG WP V_TPR=0x5`, and `rest=` for undeclared bits."""
    shown, declared = [], 0
    for name, field in value.fields().items():
        declared |= field.mask
        if found := field.extract(value):
            shown.append(name if field.limit == 1 else f"{name}={found:#x}")
    if rest := value & ~declared:
        shown.append(f"rest={rest:#x}")
    return " ".join(shown)


def intercept_names(block: vmcb) -> list[str]:
    """Return the intercepts that are set, as `vmcb={"intercept.NAME": 1}` takes them."""
    names = {int(bit): bit.name.removeprefix("INTERCEPT_").lower() for bit in Intercept}
    found = []
    for word, value in enumerate(block.control.intercepts):
        for bit in range(32):
            number = 32 * word + bit
            if value >> bit & 1:
                found.append(_exception(number) or names.get(number, f"bit {number}"))
    return found


def _exception(number: int) -> str | None:
    vector = number - Intercept.INTERCEPT_EXCEPTION_OFFSET
    return f"excp.{vector}" if 0 <= vector < 32 else None


def vmcb_rows(block: vmcb) -> dict[str, list[_Row]]:
    """Return all fields of a VMCB, by area."""
    return {
        "control": list(_control_rows(block)),
        "save": [_save_row(block.save, name) for name in _fields(block.save)],
    }


def _control_rows(block: vmcb) -> Iterator[_Row]:
    names = intercept_names(block)
    yield "intercepts", " ".join(names), not names
    for name in _fields(block.control):
        if name == "intercepts":
            continue
        value = getattr(block.control, name)
        if name == "exit_code":
            yield name, f"{value:#x}  {describe(value)}", not value
        else:
            yield _row(name, value, CONTROL_REGISTERS.get(name))


def _save_row(save: Any, name: str) -> _Row:
    value = getattr(save, name)
    if not isinstance(value, vmcb_seg):
        return _row(name, value, _SAVE_REGISTERS.get(name))
    text = f"{value.selector:#06x} base={value.base:#x} limit={value.limit:#x}"
    attrib = f" attrib={value.attrib:#05x} ({bits_text(SegAttrib(value.attrib))})"
    return name, text + (attrib if value.attrib else ""), not any(value.as_bytes())


def _row(name: str, value: Any, register: type[Bits] | None) -> _Row:
    if isinstance(value, ctypes.Array):
        data = bytes(value)
        return name, data.rstrip(b"\0").hex(" ") or "0", not any(data)
    decoded = bits_text(register(value)) if register and value else ""
    return name, f"{value:#x}  {decoded}".rstrip(), not value


def _fields(area: Any) -> Iterator[str]:
    for field in area._fields_:
        yield field[0]


def vmcb_text(block: vmcb) -> str:
    """Return the fields of a VMCB that are not zero, one a line, with their bits by name."""
    lines = []
    for area, rows in vmcb_rows(block).items():
        lines.append(area)
        lines += [f"  {name:<{_NAME_WIDTH}}{text}" for name, text, zero in rows if not zero]
    return "\n".join(lines)


def vmcb_difference(old: vmcb, new: vmcb) -> str:
    """Return the fields in which two VMCBs differ, one a line: `save.rip  0x10 -> 0x12`."""
    lines = []
    after = vmcb_rows(new)
    for area, rows in vmcb_rows(old).items():
        for (name, was, _), (_, now, _) in zip(rows, after[area], strict=True):
            if was != now:
                full = f"{area}.{name}"
                lines.append(f"{full:<{_NAME_WIDTH + 8}}{was or 'none'}  ->  {now or 'none'}")
    return "\n".join(lines) or "no difference"


def block_of(value: object) -> vmcb | None:
    """Return the VMCB that a value is, views, or belongs to, as it is now; None: it has none."""
    if isinstance(value, VmExit | GuestLevel):
        value = value.vmcb
    if isinstance(value, VmcbView):
        value = value.read()
    return value if isinstance(value, vmcb) else None


def text_of(value: object) -> str:
    """Return a value as the prompt shows it."""
    if isinstance(value, VmExit):
        return f"{value}\n{vmcb_text(value.vmcb.read())}"
    if isinstance(value, VmcbView):
        return f"VMCB at {value.gpa:#x}\n{vmcb_text(value.read())}"
    if isinstance(value, vmcb):
        return vmcb_text(value)
    if isinstance(value, Level):
        return _level_text(value)
    if isinstance(value, CStruct):
        return _struct_text(value)
    if isinstance(value, list) and value and all(map(_has_own_text, value)):
        return "\n".join(map(str, value))
    return _number_text(value)


def _has_own_text(value: object) -> bool:
    """Tell whether `str` says more than the list's `repr` would: Result, Fault, VmExit."""
    return type(value).__module__.startswith("harness.proxy") and not isinstance(value, Level)


def _level_text(level: Level) -> str:
    state = "has not run yet" if not level.started else "has run"
    if level.cpu.current is level:
        state = "is current"
    extra = ""
    if isinstance(level, GuestLevel):
        paging = "shadow paging" if level.npt is None else "nested paging"
        extra = f", guest of {level.host.name} with {paging}, VMCB at {level.vmcb.gpa:#x}"
        if level.exit is not None:
            extra += f", in the middle of a program at {level.exit}"
    return f"<{level.name} of vCPU {level.cpu.runner.index}{extra}: {state}>"


def _struct_text(value: CStruct) -> str:
    lines = [f"{type(value).__name__}:"]
    for name, content in value.fields_dict().items():
        text = _number_text(content)
        if text not in ("0", "{}") and (not isinstance(content, bytes) or any(content)):
            lines.append(f"  {name:<{_NAME_WIDTH}}{text}")
    return "\n".join(lines)


def _number_text(value: object) -> str:
    """Return numbers in hex, those in dicts too; all else is its `repr`."""
    if isinstance(value, Bits):
        return f"{int(value):#x}  {bits_text(value)}".rstrip()
    if isinstance(value, bool | Enum):
        return repr(value)
    if isinstance(value, int):
        return f"{value:#x}" if value > 9 else repr(value)
    if isinstance(value, Mapping) and value:
        shown = [f"{key}={_number_text(entry)}" for key, entry in value.items()]
        return " ".join(shown) if all(isinstance(key, str) for key in value) else repr(value)
    return repr(value)
