"""Ways to bring a machine to a certain stop, the same for both twins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import Fact, HostView, kvm_device
from harness.migrate.shape import wants_whole_events
from harness.proxy.failure import GuestStopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import Program, Result
from harness.proxy.vmexit import VmExit
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_vcpu_events
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.exits import DebugExit
from kvm_ioctl.handles import Kvm
from kvm_ioctl.linux_kvm import GuestDebug, MpState

STOP_PORT: Final = 0x99
"""A port of nobody; code that writes to it can be stopped there."""

RFLAGS_IF: Final = 1 << 9

_MOST_STEPS: Final = 2000
_HALT_S: Final = 20.0
_POLL_S: Final = 0.02
_STEP: Final = GuestDebug.KVM_GUESTDBG_ENABLE | GuestDebug.KVM_GUESTDBG_SINGLESTEP


def triple_fault_event(host: HostView) -> Fact:
    """A pending triple fault can be read and written (KVM_CAP_X86_TRIPLE_FAULT_EVENT)."""
    device = kvm_device(host)
    if not device.holds:
        return device
    with Kvm() as kvm:
        value = kvm.check_extension(Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    return Fact(bool(value), f"KVM_CAP_X86_TRIPLE_FAULT_EVENT={value}", "a kernel since 6.1")


def change_events(machine: ProxyMachine, change: Callable[[kvm_vcpu_events], None]) -> None:
    """Change vCPU 0's pending events by KVM_SET_VCPU_EVENTS; its last I/O is completed first."""
    wants_whole_events(machine.vm)
    runner = machine.vcpus[0]
    runner.finish_io()
    events = runner.vcpu.get_vcpu_events()
    change(events)
    runner.vcpu.set_vcpu_events(events)


def nested_flags(machine: ProxyMachine) -> NestedStateFlags:
    """Return the flags that KVM_GET_NESTED_STATE has for vCPU 0."""
    return NestedStateFlags(machine.vcpus[0].vcpu.get_nested_state().flags)


def step_until(machine: ProxyMachine, there: Callable[[], bool]) -> None:
    """Run vCPU 0 instruction by instruction until it is there.

    Raises ScenarioFailure: it does not get there.
    """
    runner = machine.vcpus[0]
    runner.finish_io()
    runner.vcpu.set_guest_debug(_STEP)
    try:
        for _ in range(_MOST_STEPS):
            if there():
                return
            exit_ = runner.step(machine.timeout_s)
            if not isinstance(exit_, DebugExit):
                raise ScenarioFailure(f"single steps ended in {exit_}")
    finally:
        runner.vcpu.set_guest_debug(0)
    raise ScenarioFailure(f"not there after {_MOST_STEPS} single steps")


def vmrun_only(level: GuestLevel) -> None:
    """Resume a level from its exit, but stop right after VMRUN, before its first instruction.

    Asked for an interrupt window, KVM_RUN comes back as soon as interrupts are possible: for L1
    with IF=0 they first are when VMRUN was emulated, and hardware has not entered the guest by
    then (vcpu_run(), svm_interrupt_allowed()). Single steps do not stop there on 7.3,
    where VMRUN does not end in kvm_skip_emulated_instruction(). The level's
    RFLAGS.IF is 1 from then on. Go on with `level.go_on()`.

    Raises ScenarioFailure: KVM_STATE_NESTED_RUN_PENDING was not seen, or there is no exit.
    """
    exit_, level.exit = level.exit, None
    if exit_ is None:
        raise ScenarioFailure(f"{level.name} has no exit to resume from")
    # With IF=0 the window does not open for L2 either (svm_interrupt_blocked()).
    exit_.vmcb["rflags"] |= RFLAGS_IF
    exit_.host.make_current()
    exit_.host.submit_entry(exit_.guest)
    machine, runner = level.cpu.machine, level.cpu.runner
    runner.vcpu.run.request_interrupt_window = 1
    try:
        seen = runner.step(machine.timeout_s)
    finally:
        runner.vcpu.run.request_interrupt_window = 0
    if not nested_flags(machine) & NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING:
        raise ScenarioFailure(f"VMRUN ended in {seen}, KVM_STATE_NESTED_RUN_PENDING is not set")


def step_to(guest: Level, rip: int) -> None:
    """Step until vCPU 0 is at an address; the level must have its program already."""
    vcpu = guest.cpu.runner.vcpu
    step_until(guest.cpu.machine, lambda: vcpu.get_regs().rip == rip)


def wait_halted(machine: ProxyMachine, vcpu: int = 0) -> None:
    """Wait until a vCPU that runs in a thread has halted.

    Raises ScenarioFailure: it does not.
    """
    wait_mp_state(machine, MpState.KVM_MP_STATE_HALTED, vcpu)


def wait_mp_state(machine: ProxyMachine, wanted: MpState, vcpu: int = 0) -> None:
    """Wait until a vCPU that runs in a thread is in a state.

    Raises ScenarioFailure: it does not get there.
    """
    deadline = time.monotonic() + _HALT_S
    while time.monotonic() < deadline:
        with machine.paused():
            state = machine.vcpus[vcpu].vcpu.get_mp_state().mp_state
        if state == wanted:
            return
        time.sleep(_POLL_S)
    raise ScenarioFailure(f"vCPU {vcpu}: no {wanted.name} within {_HALT_S:g} s")


def run_to_port(machine: ProxyMachine) -> str:
    """Run vCPU 0 until it writes to a port of nobody; return what it wrote where."""
    return str(machine.vcpus[0].run(machine.timeout_s))


def outcome(guest: Level, program: Program) -> list[Result] | VmExit | str:
    """Run a program and return its results, the exit, or what KVM_RUN came back with."""
    try:
        return guest.start(program)
    except GuestStopped as e:
        return str(e.event)
