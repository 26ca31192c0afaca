"""What can be seen of a bench between two operations, by the names of `Outcome.seen`."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Final

from harness.crosscheck.fields import SMRAM, VMCB, FieldMap
from harness.model import layout
from harness.svm.msrs import Msr
from harness.svm.smram import SMRAM_GPRS, SMRAM_STATE_OFFSET
from harness.svm.vmcb import VMCB_SIZE, SegAttrib
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_nested_state, kvm_segment
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.request import KvmError

_HEADER_BYTES: Final = 128
_NESTED_BYTES: Final = 4224
_GUEST_MODE: Final = NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
_RUN_PENDING: Final = NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING
_GIF_SET: Final = NestedStateFlags.KVM_STATE_NESTED_GIF_SET
_SMRAM_BYTES: Final = 512


class Observer:
    """Reads a vCPU and its guest's memory; changes nothing."""

    def __init__(self, vcpu: Vcpu, ram: mmap.mmap, smram: mmap.mmap) -> None:
        self._vcpu = vcpu
        self._blob = bytearray(_NESTED_BYTES)
        self._nested: kvm_nested_state = kvm_nested_state.over(self._blob)
        self._memory = [
            _Watched(VMCB, f"{name}.", _page_reader(ram, layout.SLOTS[name].gpa))
            for name in ("vmcb_a", "vmcb_b", "hsave")
        ]
        self._memory.append(
            _Watched(
                SMRAM,
                "smram.",
                lambda: smram[SMRAM_STATE_OFFSET : SMRAM_STATE_OFFSET + _SMRAM_BYTES],
            )
        )

    def seen(self) -> dict[str, Any]:
        """Return all that can be seen; of a vCPU that answers nothing, the guest's memory."""
        seen: dict[str, Any] = {}
        for look in (self._nested_state, self._registers, self._events):
            try:
                seen |= look()
            except KvmError:
                # A dead VM answers EIO; then this is not seen.
                continue
        for watched in self._memory:
            seen |= watched.fields()
        return seen

    def takes_smi(self) -> bool:
        """Tell whether the next KVM_RUN takes a pending SMI before anything else."""
        smi = self._vcpu.get_vcpu_events().smi
        if not smi.pending or smi.smm:
            return False
        try:
            return bool(self._nested_state()["gif"])
        except KvmError:
            # Without nested state there is no GIF that could hold it.
            return True

    def _nested_state(self) -> dict[str, Any]:
        state = self._nested
        state.size = _NESTED_BYTES
        self._vcpu.call(self._vcpu.KVM_GET_NESTED_STATE, state)
        flags = state.flags
        seen: dict[str, Any] = {
            "gif": bool(flags & _GIF_SET),
            "guest_mode": bool(flags & _GUEST_MODE),
            "run_pending": bool(flags & _RUN_PENDING),
            "vmcb_pa": state.hdr.svm.vmcb_pa,
            "nested.flags": flags,
            "nested.format": state.format,
            "nested.size": state.size,
        }
        if flags & _GUEST_MODE:
            seen |= VMCB.read(bytes(self._blob[_HEADER_BYTES:]), "nested.")
        return seen

    def _registers(self) -> dict[str, Any]:
        sregs, regs = self._vcpu.get_sregs(), self._vcpu.get_regs()
        return {
            "efer": sregs.efer,
            "cr0": sregs.cr0,
            "cr3": sregs.cr3,
            "cr4": sregs.cr4,
            "rip": regs.rip,
            "rax": regs.rax,
        }

    def _events(self) -> dict[str, Any]:
        smi = self._vcpu.get_vcpu_events().smi
        return {
            "smm": bool(smi.smm),
            "smi_pending": bool(smi.pending),
            "init_pending": bool(smi.latched_init),
        }


def registers_after(vcpu: Vcpu) -> dict[str, int]:
    """Return the registers that RSM loads, as `after.rip`, `after.cs.attributes`, ..."""
    regs, sregs, debug = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs()
    seen = {name: getattr(regs, name) for name in (*SMRAM_GPRS, "rip", "rflags")}
    seen |= {"dr6": debug.dr6, "dr7": debug.dr7}
    seen["smbase"] = vcpu.get_msrs([Msr.MSR_IA32_SMBASE])[Msr.MSR_IA32_SMBASE]
    seen["int_shadow"] = vcpu.get_vcpu_events().interrupt.shadow
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr", "ldt"):
        seen |= _segment("ldtr" if name == "ldt" else name, getattr(sregs, name))
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        seen |= {f"{name}r.base": table.base, f"{name}r.limit": table.limit}
    return {f"after.{name}": value for name, value in seen.items()}


def _segment(name: str, segment: kvm_segment) -> dict[str, int]:
    parts = ("type", "s", "dpl", "present", "avl", "l", "db", "g")
    attrib = SegAttrib.of(**{_IN_ATTRIB[part]: getattr(segment, part) for part in parts})
    return {
        f"{name}.selector": segment.selector,
        f"{name}.base": segment.base,
        f"{name}.limit": segment.limit,
        f"{name}.attrib": int(attrib),
    }


_IN_ATTRIB: Final = {
    "type": "TYPE", "s": "S", "dpl": "DPL", "present": "P",
    "avl": "AVL", "l": "L", "db": "DB", "g": "G",
}  # fmt: skip


class _Watched:
    """A struct in memory, taken apart again only when its bytes have changed."""

    def __init__(self, fields: FieldMap, prefix: str, read: Callable[[], bytes]) -> None:
        self._map, self._prefix, self._read = fields, prefix, read
        self._data: bytes | None = None
        self._fields: dict[str, int] = {}

    def fields(self) -> dict[str, int]:
        data = self._read()
        if data != self._data:
            self._data, self._fields = data, self._map.read(data, self._prefix)
        return self._fields


def _page_reader(ram: mmap.mmap, gpa: int) -> Callable[[], bytes]:
    return lambda: ram[gpa : gpa + VMCB_SIZE]
