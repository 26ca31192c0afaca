"""What an SMI must write into SMRAM, from the interrupted context's registers by ioctl.

Every field of the save area is told, also those that KVM does not implement: they are 0. APM
vol. 2, 10.2.3 SMRAM State-Save Area. Kernel: `enter_smm_save_state_64()` and `_32()`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any, Final

from harness.model.save_area import GPRS_32
from harness.svm.smram import (
    SMM_REVISION_32,
    SMM_REVISION_64,
    SMRAM_GPRS,
    kvm_smram_state_32,
    kvm_smram_state_64,
)
from kvm_ioctl.asm_kvm import kvm_segment
from kvm_ioctl.handles import Vcpu

Fields = Mapping[str, int]

_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "tr")
_LOW_HALF: Final = 0xFFFF_FFFF


def flags_of(segment: kvm_segment) -> int:
    """Return a segment's attributes as the legacy form has them: a descriptor's second half."""
    bits = (
        (segment.g, 23),
        (segment.db, 22),
        (segment.l, 21),
        (segment.avl, 20),
        (segment.present, 15),
        (segment.dpl, 13),
        (segment.s, 12),
        (segment.type, 8),
    )
    return sum(value << at for value, at in bits)


def area_64(vcpu: Vcpu, *, smbase: int, int_shadow: int, vmcb12_gpa: int | None) -> dict[str, int]:
    """Return every field that is not 0 of the 64-bit save area; to be asked before the SMI.

    `vmcb12_gpa` is None unless L2 is interrupted.
    """
    regs, sregs, debug = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs()
    area = {f"gprs.{index}": getattr(regs, name) for index, name in enumerate(SMRAM_GPRS)}
    area |= {name: getattr(sregs, name) for name in ("cr0", "cr3", "cr4", "efer")}
    area |= {"rip": regs.rip, "rflags": regs.rflags, "dr6": debug.dr6, "dr7": debug.dr7}
    area |= {"smbase": smbase, "smm_revison": SMM_REVISION_64, "int_shadow": int_shadow}
    for name, segment in _segments(sregs):
        area |= {
            f"{name}.selector": segment.selector,
            f"{name}.attributes": flags_of(segment) >> 8,
            f"{name}.limit": segment.limit,
            f"{name}.base": segment.base,
        }
    area |= _tables(sregs)
    if vmcb12_gpa is not None:
        area |= {"svm_guest_flag": 1, "svm_guest_vmcb_gpa": vmcb12_gpa}
    return area


def area_32(vcpu: Vcpu, *, smbase: int, int_shadow: int) -> dict[str, int]:
    """Return every field that is not 0 of the legacy save area; to be asked before the SMI."""
    regs, sregs, debug = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs()
    area = {f"gprs.{index}": getattr(regs, name) for index, name in enumerate(GPRS_32)}
    area |= {name: getattr(sregs, name) for name in ("cr0", "cr3", "cr4")}
    area |= {"eip": regs.rip, "eflags": regs.rflags, "dr6": debug.dr6, "dr7": debug.dr7}
    area |= {"smbase": smbase, "smm_revision": SMM_REVISION_32, "int_shadow": int_shadow}
    for name, segment in _segments(sregs):
        area |= {
            f"{name}_sel": segment.selector,
            f"{name}.flags": flags_of(segment),
            f"{name}.limit": segment.limit,
            f"{name}.base": segment.base,
        }
    return {name: value & _LOW_HALF for name, value in (area | _tables(sregs)).items()}


def fields_of(area: kvm_smram_state_64 | kvm_smram_state_32) -> dict[str, int]:
    """Return every number of a save area, reserved ones too, by names as `cs.base`, `gprs.3`."""
    return dict(_walk(area, ""))


def difference(area: kvm_smram_state_64 | kvm_smram_state_32, expected: Fields) -> list[str]:
    """Return a line for each field that is not as expected; what is not told must be 0."""
    seen = fields_of(area)
    unknown = [f"no field {name}" for name in expected if name not in seen]
    return unknown + [
        f"{name}: {value:#x}, not {expected.get(name, 0):#x}"
        for name, value in seen.items()
        if value != expected.get(name, 0)
    ]


def _segments(sregs: Any) -> Iterator[tuple[str, kvm_segment]]:
    yield from ((name, getattr(sregs, name)) for name in _SEGMENTS)
    yield "ldtr", sregs.ldt


def _tables(sregs: Any) -> dict[str, int]:
    tables = {"gdtr": sregs.gdt, "idtr": sregs.idt}
    limits = {f"{name}.limit": table.limit for name, table in tables.items()}
    return limits | {f"{name}.base": table.base for name, table in tables.items()}


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, int]]:
    for name, _ in value._fields_:
        yield from _numbers(getattr(value, name), prefix + name)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, ctypes.Structure):
        yield from _walk(value, f"{name}.")
    elif isinstance(value, int):
        yield name, value
    else:
        for index, each in enumerate(value):
            yield from _numbers(each, f"{name}.{index}")
