"""Puts a vCPU where L1's proxy starts."""

from __future__ import annotations

from harness.proxy.instance import GDT_LIMIT, IDT_LIMIT, TSS_LIMIT, Context
from harness.proxy.layout import GDT_CS64, GDT_DS, GDT_TSS
from harness.svm.msrs import Efer
from kvm_ioctl.asm_kvm import kvm_regs, kvm_segment, kvm_sregs
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.linux_kvm import MpState, kvm_mp_state

_BUSY_TSS64 = 11


def enter_l1(vcpu: Vcpu, context: Context, *, irqchip: bool, svme: bool = False) -> None:
    """Give a vCPU the state that a proxy is entered in.

    Args:
        vcpu: it runs no guest and is not in SMM.
        context: the state, of L1's instance.
        irqchip: the VM has local APICs in the kernel.
        svme: EFER.SVME.

    Raises KvmError: KVM refused something.

    """
    sregs = entry_sregs(vcpu.get_sregs(), context)
    sregs.efer = Efer(sregs.efer).replace(SVME=int(svme))
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=context.rip, rsp=context.rsp, rdi=context.rdi, rflags=2))
    if irqchip:
        # With a local APIC in the kernel all but vCPU 0 wait for a SIPI.
        vcpu.set_mp_state(kvm_mp_state(mp_state=MpState.KVM_MP_STATE_RUNNABLE))


def entry_sregs(sregs: kvm_sregs, context: Context) -> kvm_sregs:
    """Return a vCPU's sregs with a context in them; what it does not speak of stays."""
    sregs = sregs.copy()
    sregs.cs = _segment(GDT_CS64, kind=11, l=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _segment(GDT_DS, kind=3, db=1))
    sregs.tr = kvm_segment(
        base=context.tss_base, limit=TSS_LIMIT, selector=GDT_TSS, type=_BUSY_TSS64, present=1
    )
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt.base, sregs.gdt.limit = context.gdt_base, GDT_LIMIT
    sregs.idt.base, sregs.idt.limit = context.idt_base, IDT_LIMIT
    sregs.cr0, sregs.cr3, sregs.cr4 = context.cr0, context.cr3, context.cr4
    sregs.efer = context.efer
    return sregs


def _segment(selector: int, *, kind: int, **flags: int) -> kvm_segment:
    return kvm_segment(
        limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, s=1, g=1, **flags
    )
