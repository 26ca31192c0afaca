"""Shorthands for scenarios with guests: a machine, an L2, and expectations in decoded values."""

from __future__ import annotations

from typing import Any, Final

from harness.errors import ScenarioFailure
from harness.migrate.errors import Refused
from harness.migrate.move import move
from harness.proxy.cpu import Cpu
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import Fault, vector_name
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import RESTORED
from harness.scenarios.context import Context
from harness.svm.exit_codes import describe
from kvm_ioctl.asm_kvm import NestedStateFlags

TIMEOUT_S: Final = 10.0
"""How long one program may run; a vCPU that takes longer hangs."""


def proxy_machine(context: Context, **options: Any) -> ProxyMachine:
    """Return a machine that is closed when the scenario ends; options as `ProxyMachine`'s."""
    machine = context.enter(ProxyMachine(context.kvm, **({"timeout_s": TIMEOUT_S} | options)))
    assert isinstance(machine, ProxyMachine)
    if context.lifecycle == RESTORED:
        for cpu in machine.cpus:
            cpu.before_run = _restore
    return machine


def _restore(cpu: Cpu) -> None:
    """Save the machine and go on with it in another VM."""
    try:
        move(cpu.machine)
    except Refused as e:
        # It was KVM itself that gave what it refuses.
        raise ScenarioFailure(f"the machine cannot be restored: {e}") from e


def show_fault(fault: Fault | None) -> str:
    """Return an exception in words."""
    return "no exception" if fault is None else str(fault)


def expect_no_fault(context: Context, what: str, fault: Fault | None) -> None:
    """Fail the scenario if an operation raised an exception."""
    context.expect(f"exception of {what}", show_fault(fault), "no exception", str)


def expect_fault(
    context: Context, what: str, fault: Fault | None, vector: int, error_code: int | None = None
) -> None:
    """Fail the scenario unless an operation raised this exception, with this error code if any."""
    seen = "no exception" if fault is None else vector_name(fault.vector)
    context.expect(f"exception of {what}", seen, vector_name(vector), str)
    if fault is not None and error_code is not None:
        context.expect(f"error code of {what}", fault.error_code, error_code, hex)


def expect_exit(context: Context, exit_: VmExit, exit_code: int, what: str = "exit code") -> None:
    """Fail the scenario unless a #VMEXIT has this code, all 64 bits of it."""
    context.expect(what, exit_.exit_code, exit_code, describe)


def gif_of(level: Level) -> bool:
    """Return the GIF of the vCPU that a level is on, as KVM_GET_NESTED_STATE has it."""
    flags = level.cpu.runner.vcpu.get_nested_state().flags
    return bool(flags & NestedStateFlags.KVM_STATE_NESTED_GIF_SET)
