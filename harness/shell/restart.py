"""Gets a machine back to where its proxies take programs, whatever they were in the midst of."""

from __future__ import annotations

from collections.abc import Iterator

from harness.proxy.cpu import Cpu
from harness.proxy.guest_level import GuestLevel
from harness.proxy.l1_entry import enter_l1
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from kvm_ioctl.asm_kvm import (
    NestedFormat,
    NestedStateFlags,
    VcpuEventFlags,
    kvm_vcpu_events,
)
from kvm_ioctl.capabilities import Cap

_START_S = 10.0


def restart(machine: ProxyMachine) -> list[str]:
    """Start the levels again that are in the midst of something; return their names.

    Memory stays as it is. Of a guest's VMCB the control area stays, so intercepts and permission
    maps do; its save area is as launched.

    Raises ProxyFailure: L1 does not come up again.
    Raises KvmError: KVM refused something.
    """
    return [level.name for cpu in machine.cpus for level in _restart_cpu(machine, cpu)]


def _restart_cpu(machine: ProxyMachine, cpu: Cpu) -> list[Level]:
    if cpu.current is None:
        return []
    guests = list(_guests_under_way(cpu))
    _reset_vcpu(machine, cpu)
    # Nothing runs any more that would have to be left.
    cpu.current = None
    for level in cpu.levels():
        level.entered = None
    for guest in guests:
        _reset_guest(guest)
    cpu.wait_report(_START_S)
    return [cpu.l1, *guests]


def _guests_under_way(cpu: Cpu) -> Iterator[GuestLevel]:
    """Yield the guests whose state is not in their VMCB: it was lost with the vCPU's."""
    for level in cpu.levels():
        if not isinstance(level, GuestLevel):
            continue
        current = cpu.current is not None and level.hosts(cpu.current)
        # One without a program is no proxy: its VMCB is as whoever entered it has made it.
        entered = level.host.entered is level and not level.instance.idle
        if current or entered:
            yield level


def _reset_guest(guest: GuestLevel) -> None:
    if guest.nesting is not None:
        # The control area as its host asked for it.
        guest.nesting.gif.set()
    control = guest.vmcb.control
    control.event_inj = control.int_state = 0
    guest.reset()
    block = guest.vmcb.read()
    block.control = control
    guest.vmcb.write(block)


def _reset_vcpu(machine: ProxyMachine, cpu: Cpu) -> None:
    """Put a vCPU where L1 starts: out of SMM, out of any guest, nothing pending."""
    vcpu = cpu.runner.vcpu
    flags = VcpuEventFlags.KVM_VCPUEVENT_VALID_SMM | VcpuEventFlags.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_vcpu_events(kvm_vcpu_events(flags=flags))
    if machine.vm.check_extension(Cap.KVM_CAP_NESTED_STATE):
        _leave_guest_mode(cpu)
    enter_l1(vcpu, cpu.l1.context, irqchip=machine.irqchip, svme=cpu.l1.uses_svm)


def _leave_guest_mode(cpu: Cpu) -> None:
    state = cpu.runner.vcpu.get_nested_state()
    if state.format == NestedFormat.KVM_STATE_NESTED_FORMAT_SVM:
        # Without GUEST_MODE, KVM_SET_NESTED_STATE makes L1 current (svm_set_nested_state).
        state.flags = NestedStateFlags.KVM_STATE_NESTED_GIF_SET
        cpu.runner.vcpu.set_nested_state(state)
