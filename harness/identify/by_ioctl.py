"""Experiments that need no guest code: what ioctls take, and what they give back.

Sources: svm_set_nested_state(), svm_get_nested_state(), __set_sregs_common(), svm_set_efer().
"""

from __future__ import annotations

from collections.abc import Callable

from harness.identify.finding import Finding, Findings, either, experiment, unseen
from harness.identify.lab import GIF_SET, GUEST_MODE, RUN_PENDING, Lab, taken
from harness.machine.cpuid import CpuidPolicy, find_leaf
from harness.svm.cpuid import Leaf
from harness.svm.msrs import Efer
from harness.svm.vmcb import EventInj, IntCtl, NestedCtl, vmcb
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm, Vcpu

_ILLEGAL_GPA = 1 << 60
_NEXT_RIP = 0x1234
_NPT_EDX = 1
"""CPUID 8000_000A EDX[0], NP."""


def _gif(on: bool) -> str:
    return f"GIF={int(on)}"


@experiment("gif_on_svme_clear", "efer_unchanged")
def svme_cleared(kvm: Kvm) -> Findings:
    """Clear EFER.SVME with GIF=0, and once more."""
    done = "KVM_SET_NESTED_STATE made GIF 0, KVM_SET_SREGS cleared EFER.SVME"
    with Lab(kvm) as lab:
        lab.try_set_nested(0)
        lab.set_svme(False)
        seen = _gif(lab.gif)
        yield either("gif_on_svme_clear", seen, {"GIF=1": "set", "GIF=0": "kept"}, done)
        if lab.gif:
            yield unseen(
                "efer_unchanged", "GIF is 1 and guest mode left whenever EFER.SVME is 0: no trace"
            )
            return
        lab.set_svme(False)
        seen = _gif(lab.gif)
        answers = {"GIF=1": "leave", "GIF=0": "nothing"}
        yield either("efer_unchanged", seen, answers, f"{done} twice")


@experiment("sregs_checks_efer")
def sregs_without_svm(kvm: Kvm) -> Findings:
    """Set EFER.SVME of a vCPU whose CPUID has no SVM."""
    with Lab(kvm, cpuid=CpuidPolicy(svm=False), svme=False) as lab:
        sregs = lab.vcpu.get_sregs()
        sregs.efer = Efer(sregs.efer).replace(SVME=1)
        seen = taken(lab.vcpu.try_call(Vcpu.KVM_SET_SREGS, sregs))
        done = "KVM_SET_SREGS of EFER.SVME without SVM in CPUID"
        yield either("sregs_checks_efer", seen, {"taken": False, "EINVAL": True}, done)


@experiment("sregs_checks_cr0")
def sregs_with_a_high_cr0(kvm: Kvm) -> Findings:
    """Set a CR0 that no CPU takes."""
    with Lab(kvm) as lab:
        sregs = lab.vcpu.get_sregs()
        sregs.cr0 |= 1 << 32
        seen = taken(lab.vcpu.try_call(Vcpu.KVM_SET_SREGS, sregs))
    answers = {"taken": False, "EINVAL": True}
    yield either("sregs_checks_cr0", seen, answers, "KVM_SET_SREGS of CR0 bit 32")


@experiment("set_state_without_svme")
def nested_state_without_svme(kvm: Kvm) -> Findings:
    """Give no flags at all while EFER.SVME is 0."""
    with Lab(kvm, svme=False) as lab:
        answers = {"EINVAL": "only GIF_SET", "taken": "0 or GIF_SET"}
        done = "KVM_SET_NESTED_STATE of flags 0 with EFER.SVME=0"
        yield either("set_state_without_svme", lab.try_set_nested(0), answers, done)


@experiment("set_state_restores_run_pending", "set_state_gif_in_gm")
def nested_state_flags(kvm: Kvm) -> Findings:
    """Read back flags that were given together with GUEST_MODE."""
    for knob, flags, bit, answers in (
        ("set_state_restores_run_pending", GUEST_MODE | RUN_PENDING | GIF_SET, RUN_PENDING,
         {"RUN_PENDING=0": False, "RUN_PENDING=1": True}),
        ("set_state_gif_in_gm", GUEST_MODE, GIF_SET,
         {"GIF_SET=0": "honoured", "GIF_SET=1": "ignored"}),
    ):  # fmt: skip
        with Lab(kvm) as lab:
            name = bit.name.removeprefix("KVM_STATE_NESTED_") if bit.name else ""
            error = lab.try_set_nested(flags)
            seen = f"{name}={int(bool(lab.flags() & bit))}" if error == "taken" else error
            done = f"KVM_SET_NESTED_STATE of flags {flags:#x}, then KVM_GET_NESTED_STATE"
            yield either(knob, seen, dict(answers), done)


def _judged(kvm: Kvm, knob: str, done: str, change: Callable[[vmcb], object]) -> Finding:
    """Return whether KVM_SET_NESTED_STATE takes a template with a change: False if it does."""
    with Lab(kvm) as lab:
        if (error := lab.try_set_nested(GUEST_MODE | GIF_SET)) != "taken":
            return unseen(knob, f"KVM_SET_NESTED_STATE of a legal state: {error}")
    with Lab(kvm) as lab:
        data = lab.template()
        change(data)
        seen = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
    done = f"KVM_SET_NESTED_STATE with {done}"
    return either(knob, seen, {"taken": False, "EINVAL": True}, done)


def _setter(area: str, **fields: int) -> Callable[[vmcb], None]:
    def change(data: vmcb) -> None:
        for name, value in fields.items():
            setattr(getattr(data, area), name, value)

    return change


@experiment("checks_nested_cr3", "checks_bitmap_addresses", "checks_v_nmi", "checks_event_inj")
def control_checks(kvm: Kvm) -> Findings:
    """Give control areas with one illegal field."""
    for knob, done, change in (
        ("checks_nested_cr3", f"NP_ENABLE and nCR3 {_ILLEGAL_GPA:#x}",
         _setter("control", nested_ctl=NestedCtl.of(NP_ENABLE=1), nested_cr3=_ILLEGAL_GPA)),
        ("checks_bitmap_addresses", f"the MSRPM at {_ILLEGAL_GPA:#x}",
         _setter("control", msrpm_base_pa=_ILLEGAL_GPA)),
        ("checks_v_nmi", "V_NMI_ENABLE and no NMI intercept",
         _setter("control", int_ctl=IntCtl.of(V_NMI_ENABLE=1))),
        ("checks_event_inj", "EVENTINJ of type 1, which is reserved",
         _setter("control", event_inj=EventInj.of(VALID=1, TYPE=1, VEC=0x40))),
    ):  # fmt: skip
        yield _judged(kvm, knob, done, change)


@experiment("set_state_checks_save")
def saved_l1_state(kvm: Kvm) -> Findings:
    """Give save areas of L1 that VMRUN would not take."""
    knob = "set_state_checks_save"
    cr4 = _judged(kvm, knob, "CR4 bit 63 in L1's save area", _setter("save", cr4=1 << 63 | 0x20))
    if cr4.value is not True:
        strictness = None if cr4.value is None else "cr0.PG and efer.SVME"
        yield Finding(knob, strictness, cr4.evidence)
        return
    efer = Efer.of(SVME=1, LMA=1)
    lma = _judged(kvm, knob, "LMA and no LME in L1's save area", _setter("save", efer=efer))
    strictness = {False: "as VMRUN", True: "as VMRUN and LMA", None: None}[lma.value]
    yield Finding(knob, strictness, f"{cr4.evidence}; {lma.evidence}")


@experiment("set_state_checks_cr3")
def current_cr3(kvm: Kvm) -> Findings:
    """Let the current CR3 become illegal by a smaller MAXPHYADDR, then enter guest mode."""
    with Lab(kvm, cpuid=CpuidPolicy(physical_address_bits=40)) as lab:
        data, sregs = lab.template(), lab.vcpu.get_sregs()
        sregs.cr3 |= 1 << 38
        lab.vcpu.set_sregs(sregs)
        narrow = CpuidPolicy(physical_address_bits=36).entries(kvm.supported_cpuid(), 0, 1)
        lab.vcpu.set_cpuid2(narrow)
        seen = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
        done = "KVM_SET_NESTED_STATE with a current CR3 beyond MAXPHYADDR"
        yield either("set_state_checks_cr3", seen, {"taken": False, "EINVAL": True}, done)


@experiment("control_sanitised")
def reserved_control_bits(kvm: Kvm) -> Findings:
    """Read back an int_vector with reserved bits."""
    with Lab(kvm) as lab:
        data = lab.template()
        data.control.int_vector = 0xFF40
        error = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
        seen = f"{lab.nested_vmcb().control.int_vector:#x}" if error == "taken" else error
        done = "KVM_SET_NESTED_STATE with int_vector 0xff40, read back"
        yield either("control_sanitised", seen, {"0xff40": False, "0x40": True}, done)


@experiment("next_rip_cached")
def next_rip(kvm: Kvm) -> Findings:
    """Read back a next_rip."""
    with Lab(kvm) as lab:
        data = lab.template()
        data.control.next_rip = _NEXT_RIP
        error = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
        seen = f"{lab.nested_vmcb().control.next_rip:#x}" if error == "taken" else error
        done = f"KVM_SET_NESTED_STATE with next_rip {_NEXT_RIP:#x}, read back"
        yield either("next_rip_cached", seen, {"0x0": False, f"{_NEXT_RIP:#x}": True}, done)


def _hide_npt(entries: list[kvm_cpuid_entry2]) -> None:
    if (entry := find_leaf(entries, Leaf.SVM)) is not None:
        entry.edx &= ~_NPT_EDX


@experiment("np_without_cpuid")
def nested_paging_without_cpuid(kvm: Kvm) -> Findings:
    """Ask for nested paging with a CPUID that has none."""
    with Lab(kvm, cpuid=CpuidPolicy(edit=_hide_npt)) as lab:
        data = lab.template()
        data.control.nested_ctl = NestedCtl.of(NP_ENABLE=1)
        error = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
        np = NestedCtl(lab.nested_vmcb().control.nested_ctl).NP_ENABLE if error == "taken" else 0
        seen = f"NP_ENABLE={np}" if error == "taken" else error
        answers = {"NP_ENABLE=1": "allowed", "NP_ENABLE=0": "cleared"}
        done = "KVM_SET_NESTED_STATE with NP_ENABLE and no NPT in CPUID, read back"
        yield either("np_without_cpuid", seen, answers, done)
