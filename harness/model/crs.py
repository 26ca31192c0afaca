"""What KVM takes for a legal control register, and what the layout's code can run with."""

from __future__ import annotations

from typing import Final

from harness.model import layout
from harness.model.facts import CpuFacts
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.smram import DEFAULT_SMBASE
from harness.svm.vmcb import NestedCtl, SegAttrib

_HIGH_HALF: Final = 0xFFFF_FFFF_0000_0000
_HARMLESS_CR4: Final = Cr4.of(
    VME=1, PVI=1, TSD=1, DE=1, PSE=1, PAE=1, MCE=1, PGE=1, PCE=1, OSFXSR=1, OSXMMEXCPT=1
)
_HARMFUL_RFLAGS: Final = 0x3_4300
"""TF, IF, NT, RF and VM."""
_CODE: Final = SegAttrib.of(P=1, L=1, S=1, TYPE=8)
_CODE_32: Final = SegAttrib.of(P=1, DB=1, S=1, TYPE=8)
_FLAT_LIMIT: Final = 0xFFFF_FFFF


def is_legal_cr0(cr0: int) -> bool:
    """Tell whether CR0 may be set (`kvm_is_valid_cr0()`)."""
    bits = Cr0(cr0)
    if cr0 & _HIGH_HALF:
        return False
    return not (bits.NW and not bits.CD) and not (bits.PG and not bits.PE)


def is_legal_cr3(cr3: int, facts: CpuFacts) -> bool:
    """Tell whether CR3 may be set (`kvm_vcpu_is_legal_cr3()`)."""
    return facts.is_legal_gpa(cr3)


def is_legal_cr4(cr4: int, facts: CpuFacts) -> bool:
    """Tell whether CR4 may be set (`kvm_is_valid_cr4()`)."""
    return not cr4 & facts.cr4_reserved


def is_legal_sregs(s: State, regs: dict[str, int]) -> bool:
    """Tell whether KVM_SET_SREGS takes registers.

    Source: `kvm_is_valid_sregs()`.
    """
    efer, cr0 = Efer(regs["efer"]), Cr0(regs["cr0"])
    if efer.LME and cr0.PG:
        if not Cr4(regs["cr4"]).PAE or not efer.LMA or not is_legal_cr3(regs["cr3"], s.facts):
            return False
    elif efer.LMA or SegAttrib(regs["cs.attrib"]).L:
        return False
    if s.knobs.sregs_checks_cr0 and not is_legal_cr0(regs["cr0"]):
        return False
    if s.knobs.sregs_checks_efer and not s.facts.guest_may_have_efer(regs["efer"]):
        return False
    return is_legal_cr4(regs["cr4"], s.facts)


def load_cr0(s: State, cr0: int) -> None:
    """Load CR0; where that switches paging, EFER.LMA follows (`svm_set_cr0()`)."""
    before, after, efer = Cr0(s.regs["cr0"]), Cr0(cr0), Efer(s.regs["efer"])
    if efer.LME and before.PG != after.PG:
        s.regs["efer"] = int(efer.replace(LMA=after.PG))
    s.regs["cr0"] = cr0


def in_real_mode(s: State) -> bool:
    """Tell whether the vCPU executes the 16-bit code that lies at SMBASE."""
    return not Cr0(s.regs["cr0"]).PE


def can_execute(s: State) -> bool:
    """Tell whether the layout's code runs as it should in the current context."""
    regs = s.regs
    if in_real_mode(s):
        there = s.memory.is_present("smram") or not s.smm
        return there and not s.guest_mode and regs["cs.base"] == DEFAULT_SMBASE
    cs = regs["cs.attrib"]
    if Cr0(regs["cr0"]).PG:
        serves = _pages_serve(s) and cs & _CODE == _CODE and not SegAttrib(cs).DB
    else:
        serves = _is_flat_32(s)
    return serves and (
        regs["cpl"] == 0 and not regs["rflags"] & _HARMFUL_RFLAGS and not regs["dr7"] & 0xFF
    )


def _pages_serve(s: State) -> bool:
    regs, efer, cr0 = s.regs, Efer(s.regs["efer"]), Cr0(s.regs["cr0"])
    if not (efer.LME and efer.LMA and cr0.PG and cr0.PE) or cr0.CD or cr0.NW:
        return False
    if regs["cr4"] & ~int(_HARMLESS_CR4) or not Cr4(regs["cr4"]).PAE:
        return False
    if regs["cr3"] != UNKNOWN and regs["cr3"] & ~0xFFF != layout.PML4_GPA:
        return False
    if s.guest_mode and NestedCtl(s.control["nested_ctl"]).NP_ENABLE:
        # The mode of nested paging is that of L1's own.
        host = Efer(s.l1.get("efer", 0)).LMA and Cr4(s.l1.get("cr4", 0)).PAE
        return bool(host) and s.control["nested_cr3"] & ~0xFFF == layout.NESTED_PML4_GPA
    return True


def _is_flat_32(s: State) -> bool:
    """Tell whether this is 32-bit code in a flat segment: reports and NOP are the same there."""
    regs = s.regs
    flat = regs["cs.base"] == 0 and regs["cs.limit"] == _FLAT_LIMIT
    mode = regs["cs.attrib"] & (_CODE_32 | SegAttrib.L.mask) == _CODE_32
    return flat and mode and not s.guest_mode and not Cr4(regs["cr4"]).PCIDE


def can_take_exceptions(s: State) -> bool:
    """Tell whether an exception reaches the layout's handler."""
    if in_real_mode(s):
        # The SMM handler's LIDT has been executed by then.
        return True
    regs = s.regs
    return (
        s.long_mode
        and regs["idtr.base"] == layout.IDT_GPA
        and regs["idtr.limit"] >= layout.IDT_LIMIT
        and regs["gdtr.base"] == layout.GDT_GPA
        and regs["gdtr.limit"] >= layout.GDT_LIMIT
    )
