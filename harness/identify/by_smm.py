"""Experiments with SMIs and RSM.

Sources: svm_enter_smm(), svm_leave_smm(), enter_smm(), rsm_load_state_64(), em_rsm().
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from harness.identify.finding import Finding, Findings, either, experiment, unseen
from harness.identify.lab import (
    GUEST_MODE,
    HSAVE,
    IN_L1,
    IN_L2,
    IN_SMM,
    INTERNAL_ERROR,
    LATER_IN_L2,
    RUN_PENDING,
    SHUTDOWN,
    STOP_IN_L2,
    STOP_LATER_IN_L2,
    VMCB12,
    VMMCALL,
    Lab,
)
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Efer
from harness.svm.smram import kvm_smram_state_64
from harness.svm.vmcb import vmcb
from kvm_ioctl.asm_kvm import InterruptShadow, VcpuEventFlags, kvm_vcpu_events
from kvm_ioctl.handles import Kvm, KvmError

_STALE = 0x1234
_SW = 0xF000_0000
"""SVM_EXIT_SW, for software's own use (APM vol. 2, appendix C)."""
_CR4_RESERVED = 1 << 31
_EFER_RESERVED = 1 << 9

_FAILURES = (SHUTDOWN, INTERNAL_ERROR)

Tamper = Callable[[kvm_smram_state_64], None]


def _smi_in_l2(lab: Lab, change: Callable[[vmcb], None] | None = None) -> str:
    """Let L2 run until its stop, and an SMI interrupt it there; return where that led."""
    made = lab.template()
    if change is not None:
        change(made)
    lab.vmcb12 = made
    if (where := lab.vmrun(STOP_IN_L2 + STOP_LATER_IN_L2 + VMMCALL)) != IN_L2:
        return where
    running = lab.vmcb12
    running.control.exit_code = _STALE
    lab.vmcb12 = running
    return lab.smi()


def _rsm(lab: Lab, tamper: Tamper) -> str:
    """Change the save area and let the handler return; return where that led."""
    area = lab.save_area
    tamper(area)
    lab.save_area = area
    return lab.run()


@experiment("smi_in_l2_exit_code", "smi_in_l2_gif", "l1_state_in_smm")
def smi_in_l2(kvm: Kvm) -> Findings:
    """Look at vmcb12, at GIF and at the host save page while the handler runs."""
    with Lab(kvm, smm=True) as lab:
        memory = lab.machine.memory
        before = memory.read(HSAVE, 4096)
        where = _smi_in_l2(lab)
        code, gif = lab.vmcb12.control.exit_code, lab.gif
        page = "changed" if memory.read(HSAVE, 4096) != before else "unchanged"
    knobs = ("smi_in_l2_exit_code", "smi_in_l2_gif", "l1_state_in_smm")
    if where != IN_SMM:
        yield from (unseen(knob, f"an SMI in L2: {where}") for knob in knobs)
        return
    done = "an SMI in L2, seen in its handler"
    # What is not written for the SMI is that of whatever exit was last, L0's own ones included.
    own = "0xf0000000" if code == _SW else "stale"
    yield Finding(knobs[0], own, f"{done}: exit code {code:#x}")
    yield either(knobs[1], f"GIF={int(gif)}", {"GIF=1": "set", "GIF=0": "cleared"}, done)
    pages = {"the page is changed": "VM_HSAVE_PA", "the page is unchanged": "kernel"}
    yield either(knobs[2], f"the page is {page}", pages, f"{done}, at VM_HSAVE_PA")


@experiment("intr_shadow_in_smram")
def shadow(kvm: Kvm) -> Findings:
    """Take an SMI in an interrupt shadow."""
    with Lab(kvm, smm=True) as lab:

        def set_shadow(events: kvm_vcpu_events) -> None:
            events.flags |= VcpuEventFlags.KVM_VCPUEVENT_VALID_SHADOW
            events.interrupt.shadow = InterruptShadow.KVM_X86_SHADOW_INT_STI

        lab.execute(b"")
        lab.set_events(set_shadow)
        where, byte = lab.smi(), lab.save_area.int_shadow
        seen = "not in SMRAM" if byte == 0 else "in SMRAM"
        done = f"an SMI in an interrupt shadow ({where}, byte {byte:#x})"
        answers = {"not in SMRAM": False, "in SMRAM": True} if where == IN_SMM else {}
        yield either("intr_shadow_in_smram", seen, answers, done)


@experiment("smm_checks")
def what_rsm_asks(kvm: Kvm) -> Findings:
    """Return to L2 with less and less wrong in the save area and in vmcb12."""
    evidence: list[str] = []
    value: str | None

    def enters_l2(done: str, tamper: Tamper, asid: int = 1) -> bool | None:
        with Lab(kvm, smm=True) as lab:
            if (where := _smi_in_l2(lab)) != IN_SMM:
                evidence.append(f"an SMI in L2: {where}")
                return None
            made = lab.vmcb12
            made.control.asid = asid
            lab.vmcb12 = made
            seen = _rsm(lab, tamper)
            entered = lab.guest_mode or seen == IN_L1
        evidence.append(f"RSM with {done}: {seen}")
        return entered

    if enters_l2("EFER 0 in the save area", _efer(0)):
        forged = _forged_return(kvm)
        evidence.append(f"RSM into L2 before EFER.SVME was ever set: {forged}")
        value = "lenient" if forged in (IN_L2, LATER_IN_L2) else "allocated"
    elif enters_l2("EFER without SVME", _efer(Efer.of(LME=1, LMA=1))):
        value = "nonzero efer"
    else:
        illegal = enters_l2("ASID 0 in vmcb12", lambda area: None, asid=0)
        value = {True: "svme", False: "svme and vmcb12", None: None}[illegal]
    legal = enters_l2("nothing wrong", lambda area: None)
    yield Finding("smm_checks", value if legal else None, "; ".join(evidence))


def _efer(value: int) -> Tamper:
    def change(area: kvm_smram_state_64) -> None:
        area.efer = value

    return change


def _forged_return(kvm: Kvm) -> str:
    with Lab(kvm, smm=True, svme=False) as lab:
        lab.vmcb12 = lab.template()
        lab.execute(b"")
        if (where := lab.smi()) != IN_SMM:
            return where

        def forge(area: kvm_smram_state_64) -> None:
            area.svm_guest_flag, area.svm_guest_vmcb_gpa = 1, VMCB12
            area.efer = Efer(area.efer).replace(SVME=1)

        return _rsm(lab, forge)


@experiment("rsm_checks", "rsm_failure")
def tampered_state(kvm: Kvm) -> Findings:
    """Return to L1 with a DR6, an EFER or a CR4 that the guest must not have."""

    def outcome(tamper: Tamper) -> str:
        with Lab(kvm, smm=True) as lab:
            lab.execute(b"")
            where = lab.smi()
            return _rsm(lab, tamper) if where == IN_SMM else f"an SMI in L1: {where}"

    def dr6(area: kvm_smram_state_64) -> None:
        area.dr6 |= 1 << 32

    def efer(area: kvm_smram_state_64) -> None:
        area.efer |= _EFER_RESERVED

    def cr4(area: kvm_smram_state_64) -> None:
        area.cr4 |= _CR4_RESERVED

    with_dr6, with_efer, with_cr4 = outcome(dr6), outcome(efer), outcome(cr4)
    evidence = f"RSM with DR6 bit 32: {with_dr6}; with EFER bit 9: {with_efer}"
    fails = with_dr6 in _FAILURES, with_efer in _FAILURES
    strictness = {
        (False, False): "lenient",
        (False, True): "strict",
        (True, True): "strict with DR",
    }.get(fails)
    yield Finding("rsm_checks", strictness, evidence)
    answers = {SHUTDOWN: "shutdown", INTERNAL_ERROR: "internal error"}
    yield either("rsm_failure", with_cr4, answers, "RSM with CR4 bit 31")


@experiment("rsm_failure_in_guest_mode")
def failed_return_to_l2(kvm: Kvm) -> Findings:
    """Return to L2 with a CR4 that it must not have, SHUTDOWN intercepted by L1."""
    with Lab(kvm, smm=True) as lab:
        if (where := _smi_in_l2(lab)) != IN_SMM:
            yield unseen("rsm_failure_in_guest_mode", f"an SMI in L2: {where}")
            return

        def cr4(area: kvm_smram_state_64) -> None:
            area.cr4 |= _CR4_RESERVED

        where = _rsm(lab, cr4)
        exited = lab.vmcb12.control.exit_code == ExitCode.SVM_EXIT_SHUTDOWN
        seen = "#VMEXIT SHUTDOWN" if where == IN_L1 and exited else where
        if lab.guest_mode:
            seen = "L2 goes on"
    answers = {SHUTDOWN: "leaves", "#VMEXIT SHUTDOWN": "in L2", "L2 goes on": "in L2"}
    done = f"RSM into L2 with CR4 bit 31, SHUTDOWN intercepted ({where})"
    yield either("rsm_failure_in_guest_mode", seen, answers, done)


@experiment("rsm_sets_run_pending")
def return_without_entry(kvm: Kvm) -> Findings:
    """Return to L2 while the MSRPM has no memory, which stops KVM_RUN before L2 is entered."""
    with Lab(kvm, smm=True) as lab:

        def intercept_msrs(made: vmcb) -> None:
            made.control.set_intercept(Intercept.INTERCEPT_MSR_PROT)

        if (where := _smi_in_l2(lab, intercept_msrs)) != IN_SMM:
            yield unseen("rsm_sets_run_pending", f"an SMI in L2: {where}")
            return
        lab.machine.memory.remove(lab.msrpm_slot)
        where, flags = lab.run(), lab.flags()
    done = "RSM into L2 with MSR_PROT and no memory at the MSRPM"
    pending = int(bool(flags & RUN_PENDING))
    seen = f"{where}, RUN_PENDING={pending}, GUEST_MODE={int(bool(flags & GUEST_MODE))}"
    answers = {
        f"{INTERNAL_ERROR}, RUN_PENDING=1, GUEST_MODE=1": True,
        f"{INTERNAL_ERROR}, RUN_PENDING=0, GUEST_MODE=1": False,
        # Nothing was pending, so L2 was entered at once.
        f"{LATER_IN_L2}, RUN_PENDING=0, GUEST_MODE=1": False,
    }
    yield either("rsm_sets_run_pending", seen, answers, done)


@experiment("enter_smm_failure")
def smi_without_smram(kvm: Kvm) -> Findings:
    """Raise an SMI in a VM that has no memory in the address space of SMM."""
    with Lab(kvm) as lab:
        lab.execute(b"")
        where = lab.smi()
        try:
            smm = f"SMM={lab.vcpu.get_vcpu_events().smi.smm}"
        except KvmError as e:
            smm = "the VM is dead" if e.errno == errno.EIO else str(e)
    done = f"an SMI without SMRAM ({where})"
    answers = {"SMM=1": "ignored", "the VM is dead": "vm dead"}
    yield either("enter_smm_failure", smm, answers, done)
