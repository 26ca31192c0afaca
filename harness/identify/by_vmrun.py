"""Experiments with VMRUN and #VMEXIT.

Sources: nested_svm_vmrun(), nested_svm_vmexit(),
nested_vmcb02_prepare_save(), svm_get_nested_state_pages().
"""

from __future__ import annotations

from harness.facts import HostView
from harness.identify.finding import Findings, either, experiment, unseen
from harness.identify.lab import (
    GIF_SET,
    GUEST_MODE,
    HANG,
    IN_L1,
    IN_L2,
    INTERNAL_ERROR,
    LATER_IN_L2,
    MSRPM,
    NOWHERE,
    SHUTDOWN,
    STOP_IN_L2,
    STOP_LATER_IN_L2,
    VMMCALL,
    WRMSR,
    Lab,
    exit_name,
)
from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.machine.memory import PAGE_SIZE
from harness.model.layout import DR6_RESET
from harness.svm.exit_codes import VMEXIT_INVALID
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr4, Efer, Msr
from harness.svm.vmcb import VMCB_SIZE, Clean, EventInj, SegAttrib
from kvm_ioctl.asm_kvm import VcpuEventFlags, kvm_vcpu_events
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm

_MARK = 0x55
_NARROW_BITS = 36
_TABLES = Gpa(0x13_0000)
_PRESENT = 1
_LARGE_PAGE = 0xE7
_STGI = bytes.fromhex("0f01dc")
_ON = ("1", "Y")


@experiment("vmrun_needs_hsave")
def vmrun_without_hsave(kvm: Kvm) -> Findings:
    """Execute VMRUN while VM_HSAVE_PA is 0."""
    with Lab(kvm) as lab:
        lab.vcpu.set_msrs({Msr.MSR_VM_HSAVE_PA: 0})
        lab.write_template()
        answers = {IN_L2: False, "#GP": True}
        yield either(
            "vmrun_needs_hsave", lab.vmrun(STOP_IN_L2), answers, "VMRUN with VM_HSAVE_PA=0"
        )


@experiment("vmrun_checks_rax", "vmrun_unmappable")
def vmrun_of_odd_addresses(kvm: Kvm) -> Findings:
    """Execute VMRUN of an address beyond MAXPHYADDR that has memory, and of one that has none."""
    with Lab(kvm, cpuid=CpuidPolicy(physical_address_bits=_NARROW_BITS)) as lab:
        lab.write_template()
        if (legal := lab.vmrun(STOP_IN_L2)) != IN_L2:
            yield unseen("vmrun_checks_rax", f"VMRUN of a legal vmcb12: {legal}")
            return
    with Lab(kvm, cpuid=CpuidPolicy(physical_address_bits=_NARROW_BITS)) as lab:
        high = Gpa(1 << _NARROW_BITS)
        lab.machine.memory.add(high, VMCB_SIZE)
        lab.machine.memory.write_struct(high, lab.write_template())
        seen = lab.vmrun(STOP_IN_L2, high)
        done = f"VMRUN of a vmcb12 with memory beyond MAXPHYADDR ({_NARROW_BITS} bits)"
        yield either("vmrun_checks_rax", seen, {IN_L2: False, "#GP": True}, done)
    with Lab(kvm) as lab:
        answers = {"#GP": "gp", INTERNAL_ERROR: "internal error"}
        seen = lab.vmrun(STOP_IN_L2, NOWHERE)
        yield either("vmrun_unmappable", seen, answers, "VMRUN of an address without memory")


@experiment("vmrun_refused_gif", "vmrun_refused_exit_code", "event_inj_after_exit")
def refused_vmrun(kvm: Kvm) -> Findings:
    """Execute VMRUN of a vmcb12 with ASID 0, and with an EVENTINJ that would be legal."""
    event = EventInj.of(VALID=1, TYPE=0, VEC=0x40)
    with Lab(kvm) as lab:
        made = lab.write_template()
        made.control.asid, made.control.event_inj = 0, event
        lab.vmcb12 = made
        where, gif, after = lab.vmrun(STOP_IN_L2), lab.gif, lab.vmcb12.control
    knobs = ("vmrun_refused_gif", "vmrun_refused_exit_code", "event_inj_after_exit")
    if where != IN_L1:
        yield from (unseen(knob, f"VMRUN with ASID 0: {where}") for knob in knobs)
        return
    done = "VMRUN with ASID 0"
    yield either(knobs[0], f"GIF={int(gif)}", {"GIF=1": "kept", "GIF=0": "cleared"}, done)
    codes = {f"exit code {VMEXIT_INVALID & 0xFFFF_FFFF:#x}": "32 bits",
             f"exit code {VMEXIT_INVALID:#x}": "64 bits"}  # fmt: skip
    yield either(knobs[1], f"exit code {after.exit_code:#x}", codes, done)
    injections = {f"EVENTINJ={event:#x}": "written", "EVENTINJ=0x0": "cleared"}
    yield either(knobs[2], f"EVENTINJ={after.event_inj:#x}", injections,
                 f"{done} and EVENTINJ={event:#x}")  # fmt: skip


@experiment("tlb_ctl_after_exit", "pause_filter_after_exit")
def written_back(kvm: Kvm) -> Findings:
    """Change fields of vmcb12 in memory while L2 runs, and see which #VMEXIT writes."""
    knobs = {"tlb_ctl_after_exit": ("tlb_ctl",),
             "pause_filter_after_exit": ("pause_filter_count", "pause_filter_thresh")}  # fmt: skip
    with Lab(kvm) as lab:
        lab.write_template()
        lab.vmrun(STOP_IN_L2 + VMMCALL)
        running = lab.vmcb12
        for name in (name for names in knobs.values() for name in names):
            setattr(running.control, name, _MARK)
        lab.vmcb12 = running
        where, after = lab.run(), lab.vmcb12.control
    for knob, names in knobs.items():
        values = {getattr(after, name) for name in names}
        seen = "as changed" if values == {_MARK} else f"written: {sorted(values)}"
        done = f"{' and '.join(names)} changed in memory while L2 runs, after VMMCALL ({where})"
        yield either(knob, seen, {"as changed": "kept", "written: [0]": "written"}, done)


@experiment("vmexit_unmappable")
def vmexit_without_vmcb12(kvm: Kvm) -> Findings:
    """Take vmcb12's memory away while L2 runs, then let L2 execute an intercepted VMMCALL."""
    with Lab(kvm) as lab:
        lab.write_template()
        lab.vmrun(STOP_IN_L2 + VMMCALL + STOP_LATER_IN_L2)
        lab.machine.memory.remove(lab.vmcb12_slot)
        where, still = lab.run(), lab.guest_mode
    seen = f"{where}, {'L2' if still else 'L1'} is current"
    answers = {f"#GP, {'L2'} is current": "stays in L2", f"{HANG}, L2 is current": "stays in L2",
               f"{SHUTDOWN}, L1 is current": "shutdown"}  # fmt: skip
    yield either("vmexit_unmappable", seen, answers, "VMMCALL in L2 without memory at vmcb12")


@experiment("svme_clear_in_l2")
def svme_cleared_by_l2(kvm: Kvm) -> Findings:
    """Let L2 clear EFER.SVME with a WRMSR that L1 does not intercept."""
    with Lab(kvm) as lab:
        made = lab.write_template()
        efer = Efer(made.save.efer).replace(SVME=0)
        load = b"\xb9" + int(Msr.MSR_EFER).to_bytes(4, "little")
        load += b"\xb8" + int(efer).to_bytes(4, "little") + b"\x31\xd2"
        lab.vmrun(STOP_IN_L2 + load + WRMSR + STOP_LATER_IN_L2)
        where = lab.run()
        svme = Efer(lab.vcpu.get_sregs().efer).SVME
        seen = f"{where}, {'L2' if lab.guest_mode else 'L1'} is current, SVME={svme}"
    done = "WRMSR of EFER.SVME=0 in L2"
    answers = {f"{SHUTDOWN}, L1 is current, SVME=0": "shutdown"}
    for how in (LATER_IN_L2, HANG, "#GP", "#UD", "#PF"):
        answers[f"{how}, L1 is current, SVME=0"] = "back to L1"
    yield either("svme_clear_in_l2", seen, answers, done)


@experiment("triple_fault_in_l2")
def triple_fault(kvm: Kvm) -> Findings:
    """Have KVM raise a triple fault in L2, with L1 intercepting SHUTDOWN."""
    knob = "triple_fault_in_l2"
    if not kvm.check_extension(Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        yield unseen(knob, "there is no KVM_CAP_X86_TRIPLE_FAULT_EVENT to ask for one")
        return
    with Lab(kvm) as lab:
        lab.machine.vm.enable_cap(Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT, args=(1,))
        lab.write_template()
        lab.vmrun(STOP_IN_L2)
        lab.set_events(_triple_fault)
        where = lab.run()
        exited = exit_name(lab.vmcb12.control.exit_code)
    seen = f"{where}, {exited}" if where == IN_L1 else where
    answers = {SHUTDOWN: "userspace", f"{IN_L1}, SVM_EXIT_SHUTDOWN": "intercept"}
    yield either(knob, seen, answers, "a triple fault by KVM_SET_VCPU_EVENTS, SHUTDOWN intercepted")


def _triple_fault(events: kvm_vcpu_events) -> None:
    events.flags |= VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    events.triple_fault.pending = 1


@experiment("clean_bits")
def clean_bits(kvm: Kvm) -> Findings:
    """Change GDTR and CR4 between two VMRUNs of one vmcb12, said to be clean."""
    with Lab(kvm) as lab:
        made = lab.write_template()
        lab.vmrun(VMMCALL)
        changed = made.copy()
        changed.control.clean = Clean.of(DT=1, CR=1)
        changed.save.gdtr.limit -= 8
        changed.save.cr4 = Cr4(changed.save.cr4).replace(TSD=1)
        lab.vmcb12 = changed
        lab.vmrun(VMMCALL)
        after = lab.vmcb12.save
    kept = {
        "GDTR": after.gdtr.limit == made.save.gdtr.limit,
        "CR4": after.cr4 == made.save.cr4,
    }
    stale = [name for name, old in kept.items() if old]
    seen = f"L2 has the old {' and '.join(stale)}" if stale else "L2 has the new ones"
    answers = {"L2 has the new ones": "ignored", "L2 has the old GDTR": "vmcb02",
               "L2 has the old GDTR and CR4": "cache"}  # fmt: skip
    yield either("clean_bits", seen, answers, "VMRUN with a changed GDTR and CR4 said to be clean")


@experiment("pages_request")
def msrpm_without_memory(kvm: Kvm) -> Findings:
    """Run twice after KVM_SET_NESTED_STATE with an MSRPM that has no memory."""
    with Lab(kvm) as lab:
        data = lab.write_template()
        data.control.set_intercept(Intercept.INTERCEPT_MSR_PROT)
        lab.machine.memory.remove(lab.msrpm_slot)
        lab.put_l2_code(STOP_IN_L2)
        lab.start_at_l2_code()
        error = lab.try_set_nested(GUEST_MODE | GIF_SET, data)
        seen = f"{lab.run()}, then {lab.run()}" if error == "taken" else error
    done = f"two KVM_RUN after KVM_SET_NESTED_STATE with MSR_PROT and no memory at {MSRPM:#x}"
    answers = {f"{INTERNAL_ERROR}, then {IN_L2}": "once",
               f"{INTERNAL_ERROR}, then {INTERNAL_ERROR}": "until it succeeds"}  # fmt: skip
    yield either("pages_request", seen, answers, done)


@experiment("stgi_without_svme")
def stgi(kvm: Kvm) -> Findings:
    """Execute STGI while EFER.SVME is 0; and again after KVM_SET_NESTED_STATE has set GIF."""
    knob, vgif = "stgi_without_svme", HostView().param("kvm_amd", "vgif")
    if vgif not in _ON:
        yield unseen(knob, f"kvm_amd has vgif={vgif}, and intercepts STGI for that")
        return
    with Lab(kvm, svme=False) as lab:
        first = lab.execute(_STGI)
        lab.try_set_nested(GIF_SET)
        then = lab.execute(_STGI)
    answers = {
        f"{IN_L1}, then {IN_L1}": "executes",
        f"#UD, then {IN_L1}": "#UD once",
        "#UD, then #UD": "#UD",
    }
    done = f"STGI with EFER.SVME=0 (vgif={vgif}), and after KVM_SET_NESTED_STATE of GIF"
    yield either(knob, f"{first}, then {then}", answers, done)


@experiment("vmmcall_in_l2")
def vmmcall(kvm: Kvm) -> Findings:
    """Let L2 execute a VMMCALL that L1 does not intercept."""
    with Lab(kvm) as lab:
        made = lab.template()
        made.control.set_intercept(Intercept.INTERCEPT_VMMCALL, False)
        lab.vmcb12 = made
        seen = lab.vmrun(VMMCALL + STOP_LATER_IN_L2)
    answers = {HANG: "repeated", "#UD": "#UD"}
    yield either("vmmcall_in_l2", seen, answers, "VMMCALL in L2, not intercepted")


@experiment("l1_state")
def forced_leave(kvm: Kvm) -> Findings:
    """Leave guest mode by KVM_SET_NESTED_STATE, and look at a segment that L2 had otherwise."""
    with Lab(kvm) as lab:
        made = lab.write_template()
        made.save.es.limit = _MARK
        lab.vmcb12 = made
        where = lab.vmrun(STOP_IN_L2)
        error = lab.try_set_nested(GIF_SET)
        limit = lab.vcpu.get_sregs().es.limit
    whose = "L2's" if limit == _MARK else "its own"
    seen = f"L1 has {whose} ES" if (where, error) == (IN_L2, "taken") else f"{where}, {error}"
    answers = {"L1 has L2's ES": "hsave page", "L1 has its own ES": "vmcb01"}
    yield either("l1_state", seen, answers, "guest mode left by KVM_SET_NESTED_STATE of GIF_SET")


@experiment("vmrun_forces_fixed_bits")
def fixed_bits(kvm: Kvm) -> Findings:
    """Enter L2 with a DR6 of 0, most of whose bits are always 1."""
    with Lab(kvm) as lab:
        made = lab.write_template()
        made.save.dr6 = 0
        lab.vmcb12 = made
        where, dr6 = lab.vmrun(STOP_IN_L2), lab.vcpu.get_debugregs().dr6
    seen = f"DR6={dr6:#x}" if where == IN_L2 else where
    answers = {"DR6=0x0": False, f"DR6={DR6_RESET:#x}": True}
    yield either("vmrun_forces_fixed_bits", seen, answers, "VMRUN with DR6=0 in vmcb12")


@experiment("lma_without_lme")
def long_mode_active_but_not_enabled(kvm: Kvm) -> Findings:
    """Enter L2 with EFER.LMA and no LME; its tables serve for both kinds of paging."""
    with Lab(kvm) as lab:
        memory = lab.machine.memory
        # The first entry leads on, whether it is of a PML4 or of four PDPTEs; what it leads to is
        # a page of 1 GiB or of 2 MiB at 0.
        memory.write_int(_TABLES, 8, _TABLES + PAGE_SIZE | _PRESENT)
        memory.write_int(Gpa(_TABLES + PAGE_SIZE), 8, _LARGE_PAGE)
        made = lab.write_template()
        made.save.cr3 = _TABLES
        made.save.efer = Efer(made.save.efer).replace(LME=0, LMA=1)
        made.save.cs.attrib = SegAttrib(made.save.cs.attrib).replace(L=0, DB=1)
        lab.vmcb12 = made
        where, efer = lab.vmrun(STOP_IN_L2), Efer(lab.vcpu.get_sregs().efer)
    seen = f"LMA={efer.LMA} in L2" if where == IN_L2 else where
    answers = {"LMA=1 in L2": "kept", "LMA=0 in L2": "cleared"}
    yield either("lma_without_lme", seen, answers, "VMRUN with EFER.LMA and no LME in vmcb12")
