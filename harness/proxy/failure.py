"""What is said of a proxy that did not do as it was told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import ScenarioFailure
from harness.machine.errors import MachineError
from harness.machine.vcpu import Event, event_text
from harness.proxy.program import Fault

if TYPE_CHECKING:
    from harness.proxy.cpu import Cpu
    from harness.proxy.level import Level

_SHOWN_OPS = 6


class ProxyError(MachineError):
    """A level was asked for what it cannot do where it stands."""


class LevelBusy(ProxyError):
    """A level is in the middle of a program that nothing brings to an end any more."""


class ProxyFailure(ScenarioFailure):
    """A level crashed, ran off, or was not the one that was to report."""


class GuestStopped(ProxyFailure):
    """KVM_RUN came back with something that is no report: `event`."""

    def __init__(self, text: str, event: Event) -> None:
        super().__init__(text)
        self.event = event


def describe(cpu: Cpu) -> str:
    """Return where a vCPU stands: registers, levels with their VMCBs and last operations."""
    regs, sregs = cpu.runner.vcpu.get_regs(), cpu.runner.vcpu.get_sregs()
    lines = [
        f"rip={regs.rip:#x} rsp={regs.rsp:#x} rflags={regs.rflags:#x} rax={regs.rax:#x} "
        f"cs={sregs.cs.selector:#x} cr0={sregs.cr0:#x} cr2={sregs.cr2:#x} cr3={sregs.cr3:#x} "
        f"cr4={sregs.cr4:#x} efer={sregs.efer:#x}"
    ]
    for level in cpu.levels():
        mark = "*" if level is cpu.current else " "
        lines.append(f"{mark}{level.name}: {last_operations(level)}")
        if (view := level.vmcb_or_none) is not None:
            lines.append(f"   {view.summary()}")
    return "\n".join(lines)


def last_operations(level: Level) -> str:
    """Return the operation that a level is at, and those before it."""
    instance = level.instance
    if not instance.sent:
        return "has run no program"
    if instance.idle:
        return f"done with {instance.sent[-1]}"
    at = min(instance["current"], len(instance.sent) - 1)
    before = instance.sent[max(0, at - _SHOWN_OPS) : at]
    return (
        f"at operation {at}: {instance.sent[at]}; before: {', '.join(map(str, before)) or 'none'}"
    )


def stopped(cpu: Cpu, event: Event) -> GuestStopped:
    """Return the failure for an event that is no report."""
    return GuestStopped(
        f"vCPU {cpu.runner.index}: {cpu.current_name} did not report, "
        f"got {event_text(event)}\n{describe(cpu)}",
        event,
    )


def crashed(cpu: Cpu) -> ProxyFailure:
    """Return the failure for an exception outside any operation."""
    header = cpu.current.instance.header() if cpu.current else None
    if header is None:
        return ProxyFailure("a proxy crashed")
    fault = header.fault
    text = Fault(fault.vector, fault.error, fault.cr2, fault.rip, fault.cs, fault.rflags, fault.rsp)
    return ProxyFailure(
        f"{cpu.current_name} crashed outside any operation: {text}\n{describe(cpu)}"
    )
