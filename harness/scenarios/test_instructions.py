"""Which SVM instructions are legal where, and what MSR_EFER, MSR_VM_CR and MSR_VM_HSAVE_PA take.

APM vol. 3, chapter 4 (the exceptions of each instruction); vol. 2, 15.4 Enabling SVM, 15.5 VMRUN
Instruction, 15.30 SVM Related MSRs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from harness.facts import nested_svm
from harness.machine.cpuid import CpuidPolicy
from harness.proxy.failure import GuestStopped
from harness.proxy.level import Level
from harness.proxy.ops import Op, instruction
from harness.proxy.paging import PAGE
from harness.proxy.program import GP, UD, rdmsr, vector_name, vmmcall, wrmsr
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_fault, expect_no_fault, proxy_machine
from harness.svm.cpuid import AddressSizesEax, Leaf
from harness.svm.msrs import Efer, Msr, VmCr
from kvm_ioctl.exits import InternalErrorExit

PRIVILEGED: Final = ("VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "INVLPGA")
ALL_BUT_VMMCALL: Final = (*PRIVILEGED, "SKINIT")
WITH_VMCB: Final = ("VMRUN", "VMLOAD", "VMSAVE")

GUEST_ADDRESS_BITS: Final = 36
"""A MAXPHYADDR that is smaller than any host's, to tell KVM's check from the CPU's."""


def _operation(l1: Level, name: str) -> Op:
    """Return the instruction with an operand that it would take: a fresh guest's VMCB."""
    return _with_rax(name, l1.launch().vmcb.gpa if name in WITH_VMCB else 0)


def _with_rax(name: str, rax: int) -> Op:
    return instruction(name)(rax=rax)


def _write_svme(l1: Level, svme: bool) -> None:
    efer = Efer(l1.rdmsr(Msr.MSR_EFER))
    l1.wrmsr(Msr.MSR_EFER, efer.replace(SVME=int(svme)))


def _address_bits(l1: Level) -> int:
    return AddressSizesEax(l1.cpuid(Leaf.ADDRESS_SIZES)["rax"]).PHYSICAL


@scenario(needs=[nested_svm], axes={"instruction": ALL_BUT_VMMCALL, "cpl": (0, 3)})
def test_svm_instruction_without_svme_is_undefined(
    context: Context, instruction: str, cpl: int
) -> None:
    """With EFER.SVME=0 an SVM instruction raises #UD, at every CPL."""
    l1 = proxy_machine(context).l1
    op = _operation(l1, instruction)
    _write_svme(l1, False)
    expect_fault(context, instruction, l1.fault_of(op.user if cpl else op), UD)


@scenario(needs=[nested_svm], axes={"instruction": ALL_BUT_VMMCALL})
def test_svm_instruction_without_svm_in_cpuid_is_undefined(
    context: Context, instruction: str
) -> None:
    """A guest whose CPUID has no SVM gets #UD for an SVM instruction, and #GP for EFER.SVME."""
    l1 = proxy_machine(context, cpuid=CpuidPolicy(svm=False)).l1
    efer = Efer(l1.rdmsr(Msr.MSR_EFER)).replace(SVME=1)
    expect_fault(context, "EFER.SVME=1", l1.fault_of(wrmsr(Msr.MSR_EFER, efer)), GP, 0)
    # Nothing can be launched here: any page of memory must do as a VMCB.
    op = _with_rax(instruction, l1.scratch if instruction in WITH_VMCB else 0)
    expect_fault(context, instruction, l1.fault_of(op), UD)


@scenario(needs=[nested_svm], axes={"instruction": PRIVILEGED})
def test_svm_instruction_at_cpl_3_is_refused(context: Context, instruction: str) -> None:
    """With EFER.SVME=1 an SVM instruction at CPL 3 raises #GP(0)."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    op = _operation(l1, instruction)
    expect_fault(context, f"{instruction} at CPL 3", l1.fault_of(op.user), GP, 0)


@scenario(needs=[nested_svm])
def test_skinit_without_skinit_in_cpuid_is_undefined(context: Context) -> None:
    """With EFER.SVME=1, SKINIT raises #UD where CPUID does not offer it (KVM never does)."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    expect_fault(context, "SKINIT", l1.fault_of(_operation(l1, "SKINIT")), UD)


@scenario(needs=[nested_svm], axes={"svme": (False, True), "cpl": (0, 3)})
def test_vmmcall_needs_neither_svme_nor_cpl_0(context: Context, svme: bool, cpl: int) -> None:
    """VMMCALL reaches the hypervisor that intercepts it whatever EFER.SVME and CPL are."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    _write_svme(l1, svme)
    # A hypercall that KVM does not know: it answers an error in RAX, which is not an exception.
    op = vmmcall(0x7FFF)
    expect_no_fault(context, "VMMCALL", l1.fault_of(op.user if cpl else op))


ADDRESSES: Final[Mapping[str, Callable[[int, int], int]]] = {
    "unaligned_8": lambda vmcb, bits: vmcb | 8,
    "unaligned_last_byte": lambda vmcb, bits: vmcb | PAGE - 1,
    "at_maxphyaddr": lambda vmcb, bits: 1 << bits,
    "memory_plus_maxphyaddr": lambda vmcb, bits: vmcb | 1 << bits,
    "bit_63": lambda vmcb, bits: vmcb | 1 << 63,
}
"""Illegal operands, from a legal one and MAXPHYADDR."""


@scenario(needs=[nested_svm], axes={"instruction": WITH_VMCB})
def test_illegal_vmcb_address_is_refused(context: Context, instruction: str) -> None:
    """VMRUN, VMLOAD and VMSAVE with RAX unaligned or beyond MAXPHYADDR raise #GP(0)."""
    policy = CpuidPolicy(physical_address_bits=GUEST_ADDRESS_BITS)
    l1 = proxy_machine(context, cpuid=policy).l1
    legal = l1.launch().vmcb.gpa
    for name, address in ADDRESSES.items():
        op = _with_rax(instruction, address(legal, GUEST_ADDRESS_BITS))
        expect_fault(context, f"{op}, {name}", l1.fault_of(op), GP, 0)


@scenario(needs=[nested_svm], axes={"instruction": WITH_VMCB})
def test_unbacked_vmcb_address_goes_no_further(context: Context, instruction: str) -> None:
    """A legal RAX with no memory behind it ends in #GP or with userspace, in nothing else.

    The APM leaves it open; KVM up to 6.12 raises #GP, later ones give KVM_EXIT_INTERNAL_ERROR.
    """
    machine = proxy_machine(context)
    l1 = machine.l1
    l1.enable_svm()
    try:
        fault = l1.fault_of(_with_rax(instruction, machine.memory_bytes))
    except GuestStopped as stopped:
        seen = type(stopped.event).__name__
        context.note("stopped", event=str(stopped.event))
        context.expect("KVM_RUN came back with", seen, InternalErrorExit.__name__, str)
        return
    context.note("raised", fault=vector_name(fault.vector) if fault else "nothing")
    expect_fault(context, instruction, fault, GP, 0)


@scenario(needs=[nested_svm])
def test_vmrun_without_hsave_is_refused(context: Context) -> None:
    """VMRUN while VM_HSAVE_PA is 0 raises #GP(0)."""
    l1 = proxy_machine(context).l1
    op = _operation(l1, "VMRUN")
    l1.wrmsr(Msr.MSR_VM_HSAVE_PA, 0)
    expect_fault(context, "VMRUN with VM_HSAVE_PA=0", l1.fault_of(op), GP, 0)


@scenario(needs=[nested_svm])
def test_illegal_hsave_address_is_refused(context: Context) -> None:
    """WRMSR of VM_HSAVE_PA unaligned or beyond MAXPHYADDR raises #GP(0) and changes nothing."""
    policy = CpuidPolicy(physical_address_bits=GUEST_ADDRESS_BITS)
    l1 = proxy_machine(context, cpuid=policy).l1
    l1.enable_svm()
    before = l1.rdmsr(Msr.MSR_VM_HSAVE_PA)
    for name, address in ADDRESSES.items():
        op = wrmsr(Msr.MSR_VM_HSAVE_PA, address(before, GUEST_ADDRESS_BITS))
        expect_fault(context, f"{op}, {name}", l1.fault_of(op), GP, 0)
        context.expect("VM_HSAVE_PA afterwards", l1.rdmsr(Msr.MSR_VM_HSAVE_PA), before, hex)


@scenario(needs=[nested_svm], axes={"svme": (False, True)})
def test_hsave_keeps_any_legal_page(context: Context, svme: bool) -> None:
    """VM_HSAVE_PA takes every page below MAXPHYADDR, memory or not, and reads back."""
    l1 = proxy_machine(context).l1
    _write_svme(l1, svme)
    for value in (PAGE, l1.scratch, (1 << _address_bits(l1)) - PAGE):
        l1.wrmsr(Msr.MSR_VM_HSAVE_PA, value)
        context.expect("VM_HSAVE_PA", l1.rdmsr(Msr.MSR_VM_HSAVE_PA), value, hex)


EFER_MBZ: Final = (9, 19, 32, 63)
"""EFER bits that no processor has (APM vol. 2, 3.1.7)."""


@scenario(needs=[nested_svm], axes={"svme": (0, 1)})
def test_reserved_efer_bit_is_refused(context: Context, svme: int) -> None:
    """WRMSR of EFER with a must-be-zero bit raises #GP(0), SVME or not, and changes nothing."""
    l1 = proxy_machine(context).l1
    before = Efer(l1.rdmsr(Msr.MSR_EFER))
    for bit in EFER_MBZ:
        op = wrmsr(Msr.MSR_EFER, before.replace(SVME=svme) | 1 << bit)
        expect_fault(context, f"{op}", l1.fault_of(op), GP, 0)
        context.expect("EFER afterwards", Efer(l1.rdmsr(Msr.MSR_EFER)), before)


@scenario(needs=[nested_svm])
def test_svme_can_be_toggled_and_read_back(context: Context) -> None:
    """EFER.SVME reads as it was written, and VMRUN works again after it was off."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    l1.make_current()
    for svme in (False, True):
        _write_svme(l1, svme)
        context.expect("EFER.SVME", Efer(l1.rdmsr(Msr.MSR_EFER)).SVME, int(svme))
    context.expect("L2 answers again", l2.ping(), True)


@scenario(needs=[nested_svm])
def test_reserved_vm_cr_bit_is_refused(context: Context) -> None:
    """WRMSR of VM_CR with a must-be-zero bit raises #GP(0) and changes nothing."""
    l1 = proxy_machine(context).l1
    before = VmCr(l1.rdmsr(Msr.MSR_VM_CR))
    for bit in (5, 32, 63):
        op = wrmsr(Msr.MSR_VM_CR, before | 1 << bit)
        expect_fault(context, f"{op}", l1.fault_of(op), GP, 0)
        context.expect("VM_CR afterwards", VmCr(l1.rdmsr(Msr.MSR_VM_CR)), before)


@scenario(needs=[nested_svm])
def test_svmdis_while_svme_is_refused(context: Context) -> None:
    """Setting VM_CR.SVMDIS while EFER.SVME=1 raises #GP(0)."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    op = wrmsr(Msr.MSR_VM_CR, VmCr.of(SVMDIS=1))
    expect_fault(context, "VM_CR.SVMDIS=1", l1.fault_of(op), GP, 0)


@scenario(needs=[nested_svm])
def test_refused_svmdis_changes_nothing(context: Context) -> None:
    """A write of VM_CR that raises #GP leaves VM_CR as it was."""
    l1 = proxy_machine(context).l1
    l1.enable_svm()
    before = VmCr(l1.rdmsr(Msr.MSR_VM_CR))
    fault = l1.fault_of(wrmsr(Msr.MSR_VM_CR, VmCr.of(SVMDIS=1)))
    expect_fault(context, "VM_CR.SVMDIS=1", fault, GP, 0)
    context.expect("VM_CR afterwards", VmCr(l1.rdmsr(Msr.MSR_VM_CR)), before)


@scenario(needs=[nested_svm])
def test_svmdis_forbids_svme(context: Context) -> None:
    """With VM_CR.SVMDIS=1, EFER.SVME is a must-be-zero bit: setting it raises #GP(0)."""
    l1 = proxy_machine(context).l1
    l1.wrmsr(Msr.MSR_VM_CR, VmCr.of(SVMDIS=1))
    op = wrmsr(Msr.MSR_EFER, Efer(l1.rdmsr(Msr.MSR_EFER)).replace(SVME=1))
    expect_fault(context, "EFER.SVME=1 under SVMDIS", l1.fault_of(op), GP, 0)


VM_CR_LOCKED: Final = {
    "lock_only": VmCr.of(LOCK=1),
    "lock_and_svmdis": VmCr.of(LOCK=1, SVMDIS=1),
}


@scenario(needs=[nested_svm], axes={"locked": tuple(VM_CR_LOCKED)})
def test_locked_vm_cr_ignores_writes(context: Context, locked: str) -> None:
    """With VM_CR.LOCK=1, writes of LOCK and SVMDIS are ignored without an exception."""
    l1 = proxy_machine(context).l1
    value = VM_CR_LOCKED[locked]
    l1.wrmsr(Msr.MSR_VM_CR, value)
    other = value.replace(LOCK=0, SVMDIS=1 - value.SVMDIS)
    results = l1.run([wrmsr(Msr.MSR_VM_CR, other), rdmsr(Msr.MSR_VM_CR)])
    expect_no_fault(context, "the second write of VM_CR", results[0].fault)
    context.expect("VM_CR", VmCr(results[1].value), value)
