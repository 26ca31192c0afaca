"""How values look at the prompt: VMCBs by field name and with their bits, numbers in hex."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import VmExit
from harness.svm.bits import Bits
from harness.svm.vmcb import vmcb
from harness.svm.vmcb_text import bits_text, vmcb_rows
from kvm_ioctl.cstruct import CStruct

_NAME_WIDTH = 20


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
    if isinstance(value, ProxyMachine):
        return _machine_text(value)
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


def _machine_text(machine: ProxyMachine) -> str:
    count = len(machine.vcpus)
    parts = [f"{count} vCPU{'s' * (count != 1)}", f"{machine.memory_bytes >> 20} MiB"]
    parts += ["irqchip"] * machine.irqchip + ["SMM"] * machine.smm_wired
    levels = [level.name for cpu in machine.cpus[:1] for level in cpu.levels()]
    return f"<machine with {', '.join(parts)}; vCPU 0 has {', '.join(levels)}>"


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
