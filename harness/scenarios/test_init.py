"""INIT that comes in L2: the vCPU is reset, and L2 is no more.

APM vol. 2, 14.1.3 Processor Initialization State. Kernel: kvm_apic_accept_events(),
kvm_vcpu_reset(), kvm_leave_nested().
"""

from __future__ import annotations

import contextlib
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.apic import Apic, Delivery
from harness.proxy.failure import GuestStopped
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import loop, nop
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.migration_stops import wait_mp_state
from kvm_ioctl.linux_kvm import MpState

_VECTOR: Final = 0x9F
_START: Final = Gpa(_VECTOR << 12)
"""Where a vCPU starts after a SIPI with that vector."""
_HLT: Final = b"\xf4"
_FOR_LONG: Final = 1 << 32
_END_S: Final = 10.0


@scenario(needs=[nested_svm], axes={"npt": (False, True)}, levels=2, unsafe=True)
def test_init_in_l2_starts_the_vcpu_anew(context: Context, npt: bool) -> None:
    """INIT and SIPI from L1 reset a vCPU in L2, whatever L2's nested page tables have there."""
    machine = proxy_machine(context, irqchip=True, vcpus=2)
    machine.memory.write(_START, _HLT)
    # Until a vCPU writes to its APIC, KVM's map of APIC IDs does not have it.
    Apic(machine.cpus[1].l1).enable()
    sender = Apic(machine.l1)
    sender.enable()
    guest = machine.cpus[1].l1.launch(npt=npt)
    guest.ping()
    if guest.npt is not None:
        guest.npt.unmap(_START)
    thread = machine.in_thread(guest, _run_until_init)
    try:
        _send(machine, sender, Delivery.INIT, MpState.KVM_MP_STATE_INIT_RECEIVED)
        _send(machine, sender, Delivery.STARTUP, MpState.KVM_MP_STATE_HALTED)
    finally:
        thread.stop(_END_S)
    context.expect("vCPU 0 lives", machine.l1.ping(), True)


def _run_until_init(guest: Level) -> None:
    with contextlib.suppress(GuestStopped):
        guest.run([loop(_FOR_LONG, [nop()])])


def _send(machine: ProxyMachine, sender: Apic, what: Delivery, wanted: MpState) -> None:
    machine.l1.run(sender.ipi(1, _VECTOR if what is Delivery.STARTUP else 0, what))
    wait_mp_state(machine, wanted, 1)
