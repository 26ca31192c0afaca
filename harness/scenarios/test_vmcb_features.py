"""State in the VMCB that belongs to a feature: g_pat, LBR, virtual NMI, shadow stacks.

APM vol. 2, 15.25.4 Nested Paging and VMRUN/#VMEXIT, 15.23 Last Branch Record Virtualization,
15.21.10 NMI Virtualization, 15.5.1 Basic Operation, 18 Shadow Stacks, appendix B.
"""

from __future__ import annotations

from typing import Final

from harness.facts import nested_svm, npt
from harness.proxy.guest_level import PAT_DEFAULT
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy
from harness.proxy.program import NMI, wrmsr
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, expect_no_fault, proxy_machine
from harness.scenarios.offered import lbrv_for_l1, shadow_stacks_for_l1, vnmi_for_l1
from harness.svm.exit_codes import VMEXIT_INVALID
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import Quirks
from kvm_ioctl.capabilities import Cap

HANG_S = 5.0

PAT_L2: Final = 0x0007_0406_0007_0106
"""PAT_DEFAULT with PA1 = WC."""
ILLEGAL_PATS: Final = {
    "type_2": PAT_DEFAULT & ~0xFF00 | 0x0200,
    "type_3": PAT_DEFAULT & ~0xFF00 | 0x0300,
    "type_8": PAT_DEFAULT & ~0xFF00 | 0x0800,
}


def _machine_with_two_pats(context: Context) -> ProxyMachine:
    """Return a machine whose L2 has a PAT of its own, as far as KVM can: by default it has none."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    quirk = Quirks.KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT
    if context.kvm.check_extension(Cap.KVM_CAP_DISABLE_QUIRKS2) & quirk:
        machine.vm.enable_cap(Cap.KVM_CAP_DISABLE_QUIRKS2, args=[quirk])
    return machine


@scenario(needs=[nested_svm, npt], levels=2)
def test_l2_has_the_pat_of_its_vmcb(context: Context) -> None:
    """With nested paging the PAT that L2 reads is its VMCB's g_pat, and L1 keeps its own."""
    l1 = _machine_with_two_pats(context).l1
    before = l1.rdmsr(Msr.MSR_IA32_CR_PAT)
    l2 = l1.launch(vmcb={"g_pat": PAT_L2})
    context.expect("PAT in L2", l2.rdmsr(Msr.MSR_IA32_CR_PAT), PAT_L2, hex)
    l2.configure({})
    context.expect("PAT in L1", l1.rdmsr(Msr.MSR_IA32_CR_PAT), before, hex)


@scenario(needs=[nested_svm, npt], levels=2)
def test_pat_that_l2_writes_is_in_its_vmcb(context: Context) -> None:
    """With nested paging the PAT that L2 writes is in g_pat after #VMEXIT, and L1 keeps its own."""
    l1 = _machine_with_two_pats(context).l1
    before = l1.rdmsr(Msr.MSR_IA32_CR_PAT)
    l2 = l1.launch()
    l2.wrmsr(Msr.MSR_IA32_CR_PAT, PAT_L2)
    l2.configure({})
    context.expect("g_pat after #VMEXIT", l2.vmcb["g_pat"], PAT_L2, hex)
    context.expect("PAT in L1", l1.rdmsr(Msr.MSR_IA32_CR_PAT), before, hex)


@scenario(needs=[nested_svm, npt], axes={"pat": tuple(ILLEGAL_PATS)}, levels=2)
def test_illegal_g_pat_is_refused(context: Context, pat: str) -> None:
    """VMRUN with nested paging and a memory type in g_pat that is none is VMEXIT_INVALID."""
    machine = _machine_with_two_pats(context)
    l2 = machine.l1.launch(vmcb={"g_pat": ILLEGAL_PATS[pat]})
    expect_exit(context, l2.enter(), VMEXIT_INVALID)


@scenario(needs=[nested_svm], levels=2)
def test_g_pat_without_nested_paging_is_ignored(context: Context) -> None:
    """Without nested paging VMRUN looks at no g_pat: L2 runs, with the PAT of L1."""
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    before = l1.rdmsr(Msr.MSR_IA32_CR_PAT)
    l2 = l1.launch(npt=False, vmcb={"g_pat": ILLEGAL_PATS["type_2"]})
    context.expect("PAT in L2", l2.rdmsr(Msr.MSR_IA32_CR_PAT), before, hex)


# LBR virtualization


_LBR: Final = 1
"""DEBUGCTL.LBR."""


@scenario(needs=[nested_svm, lbrv_for_l1], levels=2)
def test_l2_has_the_dbgctl_of_its_vmcb(context: Context) -> None:
    """With LBR_CTL_ENABLE L2's DEBUGCTL is its VMCB's, its branches are there after #VMEXIT."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"virt_ext.LBR_CTL_ENABLE": 1, "dbgctl": _LBR})
    context.expect("DEBUGCTL in L2", l2.rdmsr(Msr.MSR_IA32_DEBUGCTLMSR) & _LBR, _LBR, hex)
    l2.configure({})
    context.expect("DEBUGCTL.LBR in L1", machine.l1.rdmsr(Msr.MSR_IA32_DEBUGCTLMSR) & _LBR, 0)
    context.expect("br_from was written", l2.vmcb["br_from"] != 0, True)
    context.expect("br_to was written", l2.vmcb["br_to"] != 0, True)


@scenario(needs=[nested_svm], levels=2)
def test_dbgctl_without_lbr_virtualization_is_ignored(context: Context) -> None:
    """Without LBR_CTL_ENABLE neither VMRUN nor #VMEXIT touches dbgctl and the branch fields."""
    fields = {"dbgctl": _LBR, "br_from": 0x1111, "br_to": 0x2222, "last_excp_from": 0x3333}
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb=fields)
    context.expect("DEBUGCTL.LBR in L2", l2.rdmsr(Msr.MSR_IA32_DEBUGCTLMSR) & _LBR, 0)
    l2.configure({})
    for name, value in fields.items():
        context.expect(f"{name} after #VMEXIT", l2.vmcb[name], value, hex)


# Virtual NMIs


@scenario(needs=[nested_svm, vnmi_for_l1], levels=2)
def test_virtual_nmi_is_taken_once(context: Context) -> None:
    """With V_NMI_ENABLE, V_NMI is an NMI in L2, and V_NMI and V_NMI_MASK are 0 once it is done."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.nmi": 1, "int_ctl.V_NMI_ENABLE": 1})
    l2.set_policy(NMI, Policy.COUNT)
    l2.ping()
    l2.configure({"int_ctl.V_NMI": 1})
    l2.ping()
    context.expect("NMIs in L2", l2.counted(NMI), 1)
    l2.configure({})
    for name in ("V_NMI", "V_NMI_MASK"):
        context.expect(f"{name} after #VMEXIT", l2.vmcb[f"int_ctl.{name}"], 0)


@scenario(needs=[nested_svm, vnmi_for_l1], levels=2)
def test_virtual_nmi_without_nmi_intercept_is_refused(context: Context) -> None:
    """VMRUN with V_NMI_ENABLE and no intercept of NMIs is VMEXIT_INVALID."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"int_ctl.V_NMI_ENABLE": 1})
    expect_exit(context, l2.enter(), VMEXIT_INVALID)


@scenario(needs=[nested_svm], levels=2)
def test_v_nmi_without_its_enable_bit_does_nothing(context: Context) -> None:
    """With V_NMI_ENABLE=0 a V_NMI is no NMI for L2."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.nmi": 1, "int_ctl.V_NMI": 1})
    l2.set_policy(NMI, Policy.COUNT)
    for _ in range(2):
        context.expect("L2 answers", l2.ping(), True)
        l2.configure({})
    context.expect("NMIs in L2", l2.counted(NMI), 0)


# Shadow stacks


_SH_STK_EN: Final = 1
"""S_CET: shadow stacks of the supervisor; without CR4.CET it has no effect."""


@scenario(needs=[nested_svm, shadow_stacks_for_l1], levels=2)
def test_l2_has_the_s_cet_of_its_vmcb(context: Context) -> None:
    """S_CET of L2 is its VMCB's, L2's writes are there after #VMEXIT, and L1 keeps its own."""
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    before = l1.rdmsr(Msr.MSR_IA32_S_CET)
    l2 = l1.launch(vmcb={"s_cet": _SH_STK_EN})
    context.expect("S_CET in L2", l2.rdmsr(Msr.MSR_IA32_S_CET), _SH_STK_EN, hex)
    expect_no_fault(context, "L2's write", l2.fault_of(wrmsr(Msr.MSR_IA32_S_CET, 0)))
    l2.configure({})
    context.expect("s_cet after #VMEXIT", l2.vmcb["s_cet"], 0, hex)
    context.expect("S_CET in L1", l1.rdmsr(Msr.MSR_IA32_S_CET), before, hex)
