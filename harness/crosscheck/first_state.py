"""The state in which a bench's vCPU starts: its CPUID, and 64-bit mode by ioctls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from harness.model import layout
from harness.svm.cpuid import Leaf
from harness.svm.vmcb import SegAttrib
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2, kvm_dtable, kvm_segment
from kvm_ioctl.handles import Vcpu

_IN_VMCB: Final = ("es", "cs", "ss", "ds")

FEATURES: Final[Mapping[str, tuple[Leaf, str, int]]] = {
    "svm": (Leaf.EXTENDED_FEATURES, "ecx", 2),
    "lm": (Leaf.EXTENDED_FEATURES, "edx", 29),
    "nx": (Leaf.EXTENDED_FEATURES, "edx", 20),
    "npt": (Leaf.SVM, "edx", 0),
    "nrips": (Leaf.SVM, "edx", 3),
}
"""What `SetCpuid` can take away: leaf, register, bit (APM vol. 3, appendix E.4)."""


def enter_long_mode(vcpu: Vcpu) -> None:
    """Bring a vCPU to where the layout says that L1 starts.

    Raises KvmError: KVM refused that.
    """
    first = layout.l1_save()
    sregs = vcpu.get_sregs()
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        setattr(sregs, name, _segment(first, name if name in _IN_VMCB else "ds"))
    sregs.tr = kvm_segment(
        selector=layout.TSS_SELECTOR, base=layout.TSS_GPA, limit=0x67, type=11, present=1
    )
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt = kvm_dtable(base=first["gdtr.base"], limit=first["gdtr.limit"])
    sregs.idt = kvm_dtable(base=first["idtr.base"], limit=first["idtr.limit"])
    for name in ("cr0", "cr3", "cr4", "efer"):
        setattr(sregs, name, first[name])
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = first["rip"], first["rsp"], first["rflags"]
    vcpu.set_regs(regs)


def without(
    entries: Iterable[kvm_cpuid_entry2], hidden: Iterable[str]
) -> Iterable[kvm_cpuid_entry2]:
    """Return CPUID leaves with the bits of some features cleared."""
    masks: dict[tuple[Leaf, str], int] = {}
    for feature in hidden:
        leaf, register, bit = FEATURES[feature]
        masks[leaf, register] = masks.get((leaf, register), 0) | 1 << bit
    for entry in entries:
        for (leaf, register), mask in masks.items():
            if entry.function == leaf:
                setattr(entry, register, getattr(entry, register) & ~mask)
        yield entry


def _segment(fields: Any, name: str) -> kvm_segment:
    segment: kvm_segment = kvm_segment(
        selector=fields[f"{name}.selector"],
        base=fields[f"{name}.base"],
        limit=fields[f"{name}.limit"],
    )
    set_attributes(segment, fields[f"{name}.attrib"])
    return segment


def set_attributes(segment: kvm_segment, attrib: int) -> None:
    """Set what a VMCB packs into `attrib`."""
    bits = SegAttrib(attrib)
    segment.type, segment.s, segment.dpl, segment.present = bits.TYPE, bits.S, bits.DPL, bits.P
    segment.avl, segment.l, segment.db, segment.g = bits.AVL, bits.L, bits.DB, bits.G
