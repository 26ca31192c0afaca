"""Experiments with VMRUN of illegal save areas, and who refuses them: KVM, or only the CPU.

Source: __nested_vmcb_check_save().
"""

from __future__ import annotations

from collections.abc import Callable

from harness.identify.finding import Finding, Findings, experiment, unseen
from harness.identify.lab import IN_L1, VMMCALL, Lab, exit_name
from harness.machine.cpuid import CpuidPolicy, find_leaf
from harness.svm.cpuid import ExtendedFeaturesEdx, Leaf
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode
from harness.svm.msrs import Efer
from harness.svm.vmcb import SegAttrib, vmcb
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm


def _hide_nx(entries: list[kvm_cpuid_entry2]) -> None:
    if (entry := find_leaf(entries, Leaf.EXTENDED_FEATURES)) is not None:
        entry.edx = ExtendedFeaturesEdx(entry.edx).replace(NX=0)


def _save_check(
    kvm: Kvm, knob: str, done: str, change: Callable[[vmcb], None], cpuid: CpuidPolicy | None = None
) -> Finding:
    """Return whether KVM itself refuses a vmcb12, whatever the CPU then makes of it.

    Both give the exit code -1. After the CPU's there is a whole #VMEXIT, which leaves marks.
    """
    with Lab(kvm, cpuid=cpuid) as lab:
        made = lab.write_template()
        _mark(made)
        lab.vmcb12 = made
        legal = lab.vmrun(VMMCALL)
        if _is_marked(lab.vmcb12) or lab.vmcb12.control.exit_code != ExitCode.SVM_EXIT_VMMCALL:
            return unseen(knob, f"VMRUN of a legal vmcb12: {legal}")
        change(made)
        lab.vmcb12 = made
        where, after = lab.vmrun(VMMCALL), lab.vmcb12
    code = after.control.exit_code
    if where != IN_L1:
        seen = where
    elif code & 0xFFFF_FFFF != VMEXIT_INVALID & 0xFFFF_FFFF:
        seen = f"entered, {exit_name(code)}"
    else:
        seen = f"refused by {'KVM' if _is_marked(after) else 'the CPU'}"
    return Finding(knob, seen == "refused by KVM", f"VMRUN with {done}: {seen}")


def _mark(made: vmcb) -> None:
    """Leave out bits that are always 1: a #VMEXIT brings them, from KVM or (5.10) from the CPU."""
    made.save.rflags = made.save.dr7 = 0


def _is_marked(after: vmcb) -> bool:
    return (after.save.rflags, after.save.dr7) == (0, 0)


def _cr0_high(made: vmcb) -> None:
    made.save.cr0 |= 1 << 32


def _cs_l_d(made: vmcb) -> None:
    made.save.cs.attrib = SegAttrib(made.save.cs.attrib).replace(L=1, DB=1)


def _efer_nx(made: vmcb) -> None:
    made.save.efer = Efer(made.save.efer).replace(NX=1)


@experiment("checks_cr0_high", "checks_cs_l_d", "checks_efer_bits")
def save_checks(kvm: Kvm) -> Findings:
    """Execute VMRUN of save areas with one illegal field."""
    yield _save_check(kvm, "checks_cr0_high", "CR0 bit 32", _cr0_high)
    yield _save_check(kvm, "checks_cs_l_d", "CS.L and CS.D", _cs_l_d)
    without_nx = CpuidPolicy(edit=_hide_nx)
    yield _save_check(kvm, "checks_efer_bits", "EFER.NX, no NX in CPUID", _efer_nx, without_nx)
