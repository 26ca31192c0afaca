"""The global interrupt flag: what sets and clears it, and what it holds back.

APM vol. 2, 15.17 Global Interrupt Flag, STGI and CLGI Instructions; 15.33.2 Virtual GIF. The
kernel: `svm_set_gif`, `svm_interrupt_blocked`, `svm_nmi_blocked`.
"""

from __future__ import annotations

from typing import Final

from harness.facts import nested_svm, smm
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import Eoi
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import EnterFlag, Op, Policy
from harness.proxy.program import (
    UD,
    load,
    simple,
    store,
    vmmcall,
)
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, expect_fault, gif_of, proxy_machine
from harness.scenarios.offered import vgif_for_l1
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Efer, Msr
from harness.svm.vmcb import IntCtl

VECTOR: Final = 0x61
NMI: Final = 2

XAPIC: Final = 0xFEE0_0000
XAPIC_SPIV: Final = XAPIC + 0xF0
XAPIC_ICR: Final = XAPIC + 0x300
SPIV_ENABLED: Final = 0x1FF
"""Spurious vector FFh, APIC on."""
ICR_SELF: Final = 0x4_0000
"""Shorthand: to itself, fixed delivery."""


def _self_ipi(vector: int) -> list[Op]:
    """Return the operations that send this CPU an interrupt through its local APIC."""
    return [store(XAPIC_SPIV, SPIV_ENABLED, 4), store(XAPIC_ICR, ICR_SELF | vector, 4)]


def _apic_machine(context: Context) -> ProxyMachine:
    machine = proxy_machine(context, irqchip=True)
    machine.l1.instance.set_eoi(Eoi.XAPIC)
    return machine


def _set_gif(level: Level, gif: bool) -> None:
    level.do(simple("STGI" if gif else "CLGI")).regs  # noqa: B018 - raises GuestFault


@scenario(needs=[nested_svm])
def test_stgi_and_clgi_set_and_clear_gif(context: Context) -> None:
    """GIF is 1 after reset, CLGI clears and STGI sets it, as often as one likes."""
    l1 = proxy_machine(context).l1
    context.expect("GIF at reset", gif_of(l1), True)
    l1.enable_svm()
    for gif in (False, False, True, True, False):
        _set_gif(l1, gif)
        context.expect("GIF", gif_of(l1), gif)


@scenario(needs=[nested_svm], axes={"gif": (False, True)})
def test_svme_cleared_leaves_gif(context: Context, gif: bool) -> None:
    """Clearing EFER.SVME does not change GIF."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    _set_gif(l1, gif)
    l1.wrmsr(Msr.MSR_EFER, Efer(l1.rdmsr(Msr.MSR_EFER)).replace(SVME=0))
    context.expect("GIF", gif_of(l1), gif)


@scenario(needs=[nested_svm], axes={"gif": (False, True)}, levels=2)
def test_vmrun_sets_gif(context: Context, gif: bool) -> None:
    """L2 runs with GIF=1 and #VMEXIT clears it, whatever GIF was at VMRUN."""
    flags = (ENTER_DEFAULT | (EnterFlag(0) if gif else EnterFlag.CLGI)) & ~EnterFlag.STGI
    l2 = proxy_machine(context).l1.launch(enter_flags=flags)
    context.expect("L2 answers", l2.ping(), True)
    context.expect("GIF in L2", gif_of(l2), True)
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    context.expect("GIF in L1", gif_of(l2), False)


@scenario(needs=[nested_svm])
def test_gif_holds_interrupts(context: Context) -> None:
    """With GIF=0 an interrupt stays pending although RFLAGS.IF=1; STGI lets it in."""
    machine = _apic_machine(context)
    l1 = machine.l1
    l1.enable_svm()
    l1.run([simple("CLGI"), simple("STI_NOP"), *_self_ipi(VECTOR), simple("NOP1"), load(XAPIC)])
    context.expect("interrupts taken with GIF=0", l1.counted(VECTOR), 0)
    l1.run([simple("STGI"), simple("NOP1"), simple("CLI")])
    context.expect("interrupts taken after STGI", l1.counted(VECTOR), 1)


@scenario(needs=[nested_svm])
def test_if_still_counts_with_gif(context: Context) -> None:
    """With GIF=1 and RFLAGS.IF=0 an interrupt stays pending: both must be 1."""
    machine = _apic_machine(context)
    l1 = machine.l1
    l1.enable_svm()
    l1.run([simple("CLGI"), *_self_ipi(VECTOR), simple("STGI"), simple("NOP1")])
    context.expect("interrupts taken with IF=0", l1.counted(VECTOR), 0)
    l1.run([simple("STI_NOP"), simple("CLI")])
    context.expect("interrupts taken with IF=1", l1.counted(VECTOR), 1)


@scenario(needs=[nested_svm], axes={"count": (1, 2)})
def test_gif_holds_nmis(context: Context, count: int) -> None:
    """With GIF=0 an NMI is held; STGI lets it in, and not twice."""
    machine = proxy_machine(context)
    l1 = machine.l1
    l1.enable_svm()
    _set_gif(l1, False)
    for _ in range(count):
        machine.vcpus[0].vcpu.nmi()
    context.expect("L1 answers", l1.ping(), True)
    context.expect("NMIs taken with GIF=0", l1.counted(NMI), 0)
    l1.run([simple("STGI"), simple("NOP1"), simple("NOP1")])
    # KVM keeps one more behind the one that waits; with GIF=0 hardware would merge them.
    context.expect("NMIs taken after STGI", 1 <= l1.counted(NMI) <= count, True)


@scenario(needs=[nested_svm, smm])
def test_gif_holds_smis(context: Context) -> None:
    """With GIF=0 an SMI is held; STGI lets it in."""
    machine = proxy_machine(context, smm=True)
    l1 = machine.l1
    l1.enable_svm()
    _set_gif(l1, False)
    machine.vcpus[0].vcpu.smi()
    context.expect("L1 answers", l1.ping(), True)
    context.expect("handler entered with GIF=0", machine.smm.started, False)
    l1.run([simple("STGI"), simple("NOP1")])
    context.expect("handler entered after STGI", machine.smm.started, True)


@scenario(needs=[nested_svm])
def test_gif_does_not_hold_exceptions(context: Context) -> None:
    """Exceptions and software interrupts are taken with GIF=0."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    _set_gif(l1, False)
    expect_fault(context, "UD2", l1.fault_of(simple("UD2")), UD)
    l1.set_policy(0x80, Policy.COUNT)
    l1.do(simple("INT80")).regs  # noqa: B018 - raises GuestFault
    context.expect("INT 80h taken", l1.counted(0x80), 1)


@scenario(needs=[nested_svm], levels=2)
def test_interrupt_waits_for_stgi_after_vmexit(context: Context) -> None:
    """An interrupt that arrives between #VMEXIT and STGI is taken after STGI, in L1."""
    machine = _apic_machine(context)
    l1 = machine.l1
    l2 = l1.launch(enter_flags=ENTER_DEFAULT & ~EnterFlag.STGI)
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    l1.run([*_self_ipi(VECTOR), simple("STI_NOP"), simple("NOP1")])
    context.expect("interrupts taken before STGI", l1.counted(VECTOR), 0)
    l1.run([simple("STGI"), simple("NOP1"), simple("CLI")])
    context.expect("interrupts taken after STGI", l1.counted(VECTOR), 1)


@scenario(needs=[nested_svm], axes={"masking": (False, True)}, levels=2)
def test_pending_interrupt_exits_l2_at_once(context: Context, masking: bool) -> None:
    """VMRUN with an interrupt pending and intercepted exits with INTR before L2 executes."""
    machine = _apic_machine(context)
    l1 = machine.l1
    l2 = l1.launch(vmcb={"intercept.intr": 1, "int_ctl.V_INTR_MASKING": int(masking)})
    l2.vmcb["rip"] = l2.instance.put_code(bytes.fromhex("0f01d9"))
    # V_INTR_MASKING takes the host's IF for physical interrupts, else it is the guest's.
    l2.vmcb["rflags"] = 0x002 if masking else 0x202
    l1.run([simple("CLGI"), *_self_ipi(VECTOR), simple("STI_NOP" if masking else "CLI")])
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_INTR)
    context.expect("RIP", exit_.vmcb["rip"], l2.instance.code_gva, hex)
    l1.run([simple("STI_NOP"), simple("CLI")])
    context.expect("interrupts taken by L1", l1.counted(VECTOR), 1)


@scenario(needs=[nested_svm], levels=2)
def test_pending_nmi_exits_l2_at_once(context: Context) -> None:
    """VMRUN with an NMI pending and intercepted exits with NMI; L1 takes it after STGI."""
    machine = proxy_machine(context)
    l1 = machine.l1
    flags = (ENTER_DEFAULT | EnterFlag.CLGI) & ~EnterFlag.STGI
    l2 = l1.launch(vmcb={"intercept.nmi": 1}, enter_flags=flags)
    l1.run([simple("CLGI")])
    machine.vcpus[0].vcpu.nmi()
    l2.vmcb["rip"] = l2.instance.put_code(bytes.fromhex("0f01d9"))
    expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_NMI)
    context.expect("NMIs taken before STGI", l1.counted(NMI), 0)
    l1.run([simple("STGI"), simple("NOP1")])
    context.expect("NMIs taken after STGI", l1.counted(NMI), 1)


# Virtual GIF


def _vgif_guest(machine: ProxyMachine, *, gif: bool) -> GuestLevel:
    l2 = machine.l1.launch(vmcb={"int_ctl": IntCtl.of(V_GIF_ENABLE=1, V_GIF=int(gif))})
    return l2


@scenario(needs=[nested_svm, vgif_for_l1], axes={"gif": (False, True)}, levels=2)
def test_virtual_gif_is_l2s_own(context: Context, gif: bool) -> None:
    """With V_GIF_ENABLE, STGI and CLGI of L2 change V_GIF in the VMCB and do not exit."""
    l2 = _vgif_guest(proxy_machine(context), gif=not gif)
    exit_ = l2.run_to_exit([simple("STGI" if gif else "CLGI"), vmmcall()])
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    context.expect("V_GIF", exit_.vmcb["int_ctl.V_GIF"], int(gif))
    context.expect("V_GIF_ENABLE", exit_.vmcb["int_ctl.V_GIF_ENABLE"], 1)


@scenario(needs=[nested_svm, vgif_for_l1], axes={"gif": (False, True)}, levels=2)
def test_virtual_gif_survives_a_round_trip(context: Context, gif: bool) -> None:
    """V_GIF that L2 does not change comes back as it was, over exits and entries."""
    l2 = _vgif_guest(proxy_machine(context), gif=gif)
    for _ in range(3):
        exit_ = l2.run_to_exit(vmmcall())
        context.expect("V_GIF", exit_.vmcb["int_ctl.V_GIF"], int(gif))
        exit_.skip()
        l2.finish()


@scenario(needs=[nested_svm, vgif_for_l1], levels=2)
def test_virtual_gif_holds_virtual_interrupts(context: Context) -> None:
    """With V_GIF=0 a virtual interrupt stays pending; L2's STGI lets it in."""
    l2 = _vgif_guest(proxy_machine(context), gif=False)
    # The way to the handler is walked once before. Quirk of the emulated CPU: a virtual interrupt
    # whose delivery takes a nested page fault is reported as an exception of its vector, and the
    # CPU refuses that when KVM injects it again.
    l2.do(l2.int_n(VECTOR)).regs  # noqa: B018 - raises GuestFault
    l2.instance.clear_vectors()
    exit_ = l2.run_to_exit([vmmcall(), simple("STI_NOP"), simple("NOP1")])
    exit_.skip()
    exit_.vmcb.update({
        "int_ctl.V_IRQ": 1, "int_ctl.V_INTR_PRIO": 15, "int_ctl.V_IGN_TPR": 1,
        "int_ctl.V_INTR_MASKING": 1, "int_vector": VECTOR,
    })  # fmt: skip
    l2.finish()
    context.expect("taken with V_GIF=0", l2.counted(VECTOR), 0)
    l2.run([simple("STGI"), simple("NOP1"), simple("CLI")])
    context.expect("taken after L2's STGI", l2.counted(VECTOR), 1)


@scenario(needs=[nested_svm, vgif_for_l1], levels=2)
def test_intercepted_clgi_exits_with_virtual_gif(context: Context) -> None:
    """An intercept of CLGI and STGI wins over virtual GIF."""
    l2 = _vgif_guest(proxy_machine(context), gif=True)
    l2.vmcb.update({"intercept.clgi": 1, "intercept.stgi": 1})
    exit_ = l2.run_to_exit([simple("CLGI"), simple("STGI")])
    expect_exit(context, exit_, ExitCode.SVM_EXIT_CLGI)
    context.expect("V_GIF", exit_.vmcb["int_ctl.V_GIF"], 1)
    exit_.skip()
    expect_exit(context, l2.resume_to_exit(), ExitCode.SVM_EXIT_STGI)


@scenario(needs=[nested_svm, vgif_for_l1], levels=2)
def test_virtual_gif_is_not_l1s_gif(context: Context) -> None:
    """V_GIF=0 of L2 does not hold back what L1 intercepts: its interrupt exits L2."""
    machine = _apic_machine(context)
    l1 = machine.l1
    l2 = _vgif_guest(machine, gif=False)
    l2.vmcb.update({"intercept.intr": 1, "int_ctl.V_INTR_MASKING": 1})
    l2.vmcb["rip"] = l2.instance.put_code(bytes.fromhex("0f01d9"))
    l1.run([simple("CLGI"), *_self_ipi(VECTOR), simple("STI_NOP")])
    expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_INTR)
