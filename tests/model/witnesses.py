"""For every knob, sequences of operations on which its values differ."""

from dataclasses import dataclass, field

from harness.model import layout
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.model.operations import (
    Execute,
    GetNestedState,
    Init,
    Instruction,
    Resume,
    SetCpuid,
    SetMsr,
    SetNestedState,
    SetSlot,
    SetSmm,
    SetSregs,
    Smi,
    StepRsm,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Msr
from harness.svm.vmcb import Clean, EventInj, IntCtl, NestedCtl

GM, RUN_PENDING, GIF = 1, 2, 0x100
OFF, SVME = int(layout.EFER_ON), int(layout.EFER_ON.replace(SVME=1))
A, B = layout.VMCB_A_GPA, layout.VMCB_B_GPA
TEMPLATE = layout.template_vmcb12()
BEYOND = 1 << 45

EFER_ON = SetMsr(Msr.MSR_EFER, SVME)
EFER_OFF = SetMsr(Msr.MSR_EFER, OFF)
ON = (SetMsr(Msr.MSR_VM_HSAVE_PA, layout.HSAVE_GPA), EFER_ON)


def do(instruction, **registers):
    return Execute(Instruction[instruction], **registers)


def vmrun(gpa=A):
    return do("VMRUN", rax=gpa)


def wrmsr(value):
    return do("WRMSR", rcx=Msr.MSR_EFER, rax=value & 0xFFFF_FFFF, rdx=value >> 32)


def intercepting(*intercepts):
    """Changes of a control area that make it intercept these, beside the template's."""
    changes = {}
    for each in intercepts:
        name = f"control.intercepts.{int(each.word)}"
        changes[name] = changes.get(name, TEMPLATE.get(name, 0)) | each.mask
    return changes


def l2(**changes):
    """Enter L2, by a vmcb12 with some fields changed (`save__cr0` is save.cr0)."""
    return l2_with({name.replace("__", "."): value for name, value in changes.items()})


def l2_with(changes):
    return (*ON, WriteVmcb("a", changes), vmrun())


AGAIN = (WriteVmcb("a", {"save.rip": layout.IDLE_L2}), vmrun())
SMI_IN_L1 = (*ON, Smi(), Resume())
SMI_IN_L2 = (Smi(), Resume())
MSR_PROT = intercepting(Intercept.INTERCEPT_MSR_PROT)
SHUTDOWN = intercepting(Intercept.INTERCEPT_SHUTDOWN)


@dataclass(frozen=True)
class Witness:
    """Sequences; the values of the knob are put into this setting, on this CPU."""

    sequences: tuple
    setting: str = "6.1"
    facts: dict = field(default_factory=dict)
    also: dict = field(default_factory=dict)

    def outcomes(self, knob, value):
        knobs = SETTINGS[self.setting].but(**self.also, **{knob: value})
        return [run(knobs, CpuFacts(**self.facts), each) for each in self.sequences]


def run(knobs, facts, operations):
    model = Model(knobs, facts)
    return [model.apply(operation) for operation in operations]


def one(*operations, **more):
    return Witness((operations,), **more)


KEPT = {"vmrun_refused_gif": "kept"}
"""Tells a refusal by KVM's checks, which leaves GIF, from one by the CPU, a #VMEXIT."""

WITNESSES = {
    "allocation": one(GetNestedState(), EFER_ON),
    "gif_on_svme_clear": one(*ON, do("CLGI"), EFER_OFF),
    "svme_clear_in_l2": one(*l2(), wrmsr(OFF)),
    "efer_unchanged": one(do("CLGI"), EFER_OFF),
    "sregs_checks_cr0": one(SetSregs({"cr0": layout.CR0_ON | 1 << 29})),
    "sregs_checks_efer": one(SetCpuid("svm", False), SetSregs({"efer": SVME})),
    "stgi_without_svme": one(do("NOP"), SetNestedState(GIF, size=128), do("STGI"), do("CLGI")),
    "vmmcall_in_l2": one(*l2_with({"control.intercepts.4": 1}), do("VMMCALL")),
    "clean_bits": Witness(
        (
            (
                *l2(),
                do("VMMCALL"),
                WriteVmcb("a", {"save.gdtr.limit": 0x7F, "control.clean": Clean.DT.mask}),
                *AGAIN,
                do("VMMCALL"),
            ),
            (
                *l2(),
                do("VMMCALL"),
                WriteVmcb("a", {"save.cr2": 0x1000, "control.clean": Clean.CR2.mask}),
                *AGAIN,
                do("VMMCALL"),
            ),
        )
    ),
    "next_rip_cached": one(
        *ON, SetNestedState(GM, vmcb_pa=A, changes={"control.next_rip": 0x1234})
    ),
    "lma_without_lme": one(*l2(save__efer=SVME & ~0x100)),
    "control_sanitised": one(*l2(control__int_vector=0x1_0020)),
    "l1_state": one(*l2()),
    "vmrun_forces_fixed_bits": one(*l2(save__dr7=0), do("VMMCALL")),
    "vmrun_needs_hsave": one(EFER_ON, vmrun()),
    "vmrun_checks_rax": one(*ON, vmrun(A + 8), facts={"cpu_checks_rax": False}),
    "vmrun_unmappable": one(*ON, vmrun(layout.NO_MEMORY_GPA)),
    "vmrun_refused_gif": one(*l2(control__asid=0)),
    "vmrun_refused_exit_code": one(*l2(control__asid=0)),
    "event_inj_after_exit": one(*l2(control__asid=0, control__event_inj=0x300)),
    "tlb_ctl_after_exit": one(*l2(), WriteVmcb("a", {"control.tlb_ctl": 1}), do("VMMCALL")),
    "pause_filter_after_exit": one(
        *l2(), WriteVmcb("a", {"control.pause_filter_count": 1}), do("VMMCALL")
    ),
    "vmexit_unmappable": one(*l2(), SetSlot("vmcb_a", False), do("VMMCALL")),
    "triple_fault_in_l2": one(
        *l2_with(SHUTDOWN), *SMI_IN_L2, WriteSaveArea({"dr6": 1 << 40}), do("RSM")
    ),
    "checks_cr0_high": one(*l2(save__cr0=layout.CR0_ON | 1 << 40), also=KEPT),
    "checks_cs_l_d": one(*l2_with({"save.cs.attrib": 0xE9B}), also=KEPT),
    "checks_efer_bits": one(*l2(save__efer=SVME | 1 << 1), also=KEPT),
    "checks_nested_cr3": one(
        *l2(control__nested_ctl=NestedCtl.NP_ENABLE.mask, control__nested_cr3=BEYOND)
    ),
    "checks_bitmap_addresses": one(*l2(control__msrpm_base_pa=BEYOND)),
    "checks_v_nmi": one(*l2(control__int_ctl=IntCtl.V_NMI_ENABLE.mask)),
    "checks_event_inj": one(*l2(control__event_inj=EventInj.of(VALID=1, TYPE=1)), also=KEPT),
    "np_without_cpuid": one(
        SetCpuid("npt", False), *l2(control__nested_ctl=NestedCtl.NP_ENABLE.mask)
    ),
    "set_state_restores_run_pending": one(*ON, SetNestedState(GM | RUN_PENDING | GIF, vmcb_pa=A)),
    "set_state_gif_in_gm": one(*ON, SetNestedState(GM, vmcb_pa=A)),
    "set_state_without_svme": one(SetNestedState(0)),
    "set_state_checks_save": Witness(
        (
            (*ON, SetNestedState(GM, vmcb_pa=A, changes={"save.cr0": layout.CR0_ON & ~1})),
            (*ON, SetNestedState(GM, vmcb_pa=A, changes={"save.efer": SVME & ~0x100})),
        )
    ),
    "set_state_checks_cr3": one(
        *(Smi(), Resume(), SetSmm(False), SetMsr(Msr.MSR_EFER, 1 << 12)),
        *(SetSregs({"cr3": BEYOND}), SetNestedState(GM, vmcb_pa=A)),
    ),
    "pages_request": one(
        *(*ON, SetSlot("msrpm", False)),
        *(SetNestedState(GM | GIF, vmcb_pa=A, changes=MSR_PROT), Resume(), Resume()),
    ),
    "nested_state_with_nested_0": one(GetNestedState(), facts={"nested": False}),
    "smm_checks": Witness(
        (
            (*l2(), *SMI_IN_L2, WriteSaveArea({"efer": OFF}), do("RSM")),
            (*l2(), *SMI_IN_L2, WriteSaveArea({"efer": 0}), do("RSM")),
            (*l2(), *SMI_IN_L2, WriteVmcb("a", {"control.asid": 0}), do("RSM")),
            (
                *SMI_IN_L2,
                WriteSaveArea({"svm_guest_flag": 1, "svm_guest_vmcb_gpa": A, "efer": SVME}),
                do("RSM"),
            ),
        )
    ),
    "rsm_checks": Witness(
        (
            (*SMI_IN_L2, WriteSaveArea({"efer": OFF | 2}), do("RSM")),
            (*SMI_IN_L2, WriteSaveArea({"dr6": 1 << 40}), do("RSM")),
        )
    ),
    "rsm_reads_control": one(
        *l2(), *SMI_IN_L2, WriteVmcb("a", {"control.tsc_offset": 0x1234}), do("RSM")
    ),
    "intercepted_smi_without_gif": one(
        EFER_ON,
        do("CLGI"),
        Smi(),
        SetNestedState(GM, vmcb_pa=A, changes=intercepting(Intercept.INTERCEPT_SMI)),
        do("NOP"),
    ),
    "rsm_cr_high": one(*SMI_IN_L2, WriteSaveArea({"cr0": layout.CR0_ON | 1 << 40}), do("RSM")),
    "rsm_rflags": one(*SMI_IN_L1, WriteSaveArea({"rflags": 1 << 40}), StepRsm()),
    "rsm_limits": one(*SMI_IN_L1, WriteSaveArea({"ds.limit": 0x7FFF_FFFF}), StepRsm()),
    "rsm_cr3": one(*SMI_IN_L1, WriteSaveArea({"cr3": 1 << 51}), StepRsm()),
    "rsm_updates_mode": one(*SMI_IN_L1, WriteSaveArea({"cs.attributes": 0}), StepRsm()),
    "pg_in_64_bit_mode": one(
        *l2(), *SMI_IN_L2, WriteSaveArea({"cr0": layout.CR0_ON & ~(1 << 31)}), StepRsm()
    ),
    "rsm_failure": one(*SMI_IN_L2, WriteSaveArea({"efer": 2}), do("RSM")),
    "rsm_failure_in_guest_mode": one(
        *l2_with(SHUTDOWN), *SMI_IN_L2, WriteSaveArea({"dr6": 1 << 40}), do("RSM")
    ),
    "rsm_sets_run_pending": one(*l2_with(MSR_PROT), *SMI_IN_L2, SetSlot("msrpm", False), do("RSM")),
    "l1_state_in_smm": one(*l2(), *SMI_IN_L2),
    "smi_in_l2_exit_code": one(*l2(), *SMI_IN_L2),
    "smi_in_l2_gif": one(*l2(), *SMI_IN_L2),
    "reset_leaves_nested": one(*l2(control__nested_ctl=NestedCtl.NP_ENABLE.mask), Init(), Resume()),
    "enter_smm_failure": one(*l2(), SetSlot("hsave", False), *SMI_IN_L2),
    "intr_shadow_in_smram": one(
        *(*ON, SetNestedState(GM | GIF, vmcb_pa=A, changes={"control.int_state": 1}), *SMI_IN_L2)
    ),
}
