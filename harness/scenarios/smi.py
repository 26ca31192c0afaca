"""SMIs in scenarios: how to get through them, and a twin that never saw one.

An SMI is invisible to what it interrupts: after RSM everything but SMRAM is as if nothing had been.
`expect_unnoticed` has two machines live through the same, one of them with SMIs, and compares what
they saw, their memory and their state. APM vol. 2, 10.3 Using SMM; kernel: enter_smm(),
emulator_leave_smm(), svm_enter_smm(), svm_leave_smm().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from harness.errors import ScenarioFailure
from harness.migrate.difference import EXCUSED, state_differences
from harness.migrate.state import capture
from harness.proxy.cpu import Cpu
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import simple
from harness.proxy.smm import SmmLevel
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.twins import MEMORY_MIB
from harness.storm.smi import COUNTS, Smi, count_smis, levels_hit, memory_outside_smm, set_mce
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import RunFlags, kvm_vcpu_events
from kvm_ioctl.linux_kvm import GuestDebug

_SHOWN: Final = 12
_MOST_STEPS: Final = 20_000
"""Far more than a proxy executes for one operation."""
SINGLE_STEPS: Final = GuestDebug.KVM_GUESTDBG_ENABLE | GuestDebug.KVM_GUESTDBG_SINGLESTEP
"""For KVM_SET_GUEST_DEBUG."""


def events_of(machine: ProxyMachine, vcpu: int = 0) -> kvm_vcpu_events:
    """Return a vCPU's KVM_GET_VCPU_EVENTS."""
    return machine.vcpus[vcpu].vcpu.get_vcpu_events()


def step_over_rsm(handler: SmmLevel) -> None:
    """Let the handler execute RSM, by single steps, and stop before the instruction that follows.

    Raises ScenarioFailure: the vCPU does not leave SMM.
    """
    handler.instance.send([simple("RSM")])
    machine, runner = handler.cpu.machine, handler.cpu.runner
    runner.vcpu.set_guest_debug(SINGLE_STEPS)
    try:
        for _ in range(_MOST_STEPS):
            runner.step(machine.timeout_s)
            if not runner.vcpu.run.flags & RunFlags.KVM_RUN_X86_SMM:
                return
    finally:
        runner.vcpu.set_guest_debug(0)
    raise ScenarioFailure(f"still in SMM after {_MOST_STEPS} steps")


# Twins

Log = Callable[[str, object], None]
Journey = Callable[[ProxyMachine, Log], None]
Disturbance = Callable[[ProxyMachine], None]


def smi_before_every_run(machine: ProxyMachine) -> None:
    """Have an SMI pending whenever vCPU 0 enters KVM_RUN, but while it is in SMM."""

    def before_run(cpu: Cpu) -> None:
        # Not by who reported last: what RSM went back to may have left KVM_RUN without a report.
        in_smm = cpu.runner.vcpu.run.flags & RunFlags.KVM_RUN_X86_SMM
        if cpu.current is not None and not in_smm:
            cpu.runner.vcpu.smi()

    machine.cpus[0].before_run = before_run


def expect_unnoticed(
    context: Context,
    journey: Journey,
    disturb: Disturbance = smi_before_every_run,
    *,
    excused: Iterable[str] = (),
    **options: int,
) -> list[Smi]:
    """Fail the scenario unless a machine with SMIs ends as its twin that never saw one.

    Args:
        context: of the scenario.
        journey: what both live through; it logs what must be the same.
        disturb: prepares one of them to be interrupted.
        excused: expressions for state that may differ besides `COUNTS` and `EXCUSED`.
        options: of the machines, see `ProxyMachine`.

    Returns:
        The SMIs, in order.

    """
    given = {"memory_mib": MEMORY_MIB, "smm": True, **options}
    calm, log = _start(context, given), list[tuple[str, object]]()
    journey(calm, _into(log))
    _end(calm)
    disturbed, disturbed_log = _start(context, given), list[tuple[str, object]]()
    smis = count_smis(disturbed)
    disturb(disturbed)
    try:
        journey(disturbed, _into(disturbed_log))
    except ScenarioFailure as e:
        raise ScenarioFailure(f"after {len(smis)} SMIs, the last {smis[-1:]}: {e}") from e
    _end(disturbed)
    context.note("SMIs", count=len(smis), levels=levels_hit(smis))
    counted = disturbed.vcpus[0].vcpu.get_msrs([Msr.MSR_SMI_COUNT])[Msr.MSR_SMI_COUNT]
    context.expect("any SMI at all", counted > 0, True)
    for mine, theirs in zip(log, disturbed_log, strict=False):
        context.expect(f"{mine[0]} with SMIs", theirs, mine)
    context.expect("entries of the log", len(disturbed_log), len(log))
    _expect_same(context, calm, disturbed, (*EXCUSED, *COUNTS, *excused))
    context.expect("MSR_SMI_COUNT", counted, len(smis))
    return smis


def _into(log: list[tuple[str, object]]) -> Log:
    return lambda what, seen: log.append((what, str(seen)))


def _start(context: Context, options: Mapping[str, int]) -> ProxyMachine:
    """Return a machine; its CR4 is the claim of `smi_leaves_control_registers_of_l1`."""
    machine = proxy_machine(context, **options)
    set_mce(machine.l1)
    return machine


def _end(machine: ProxyMachine) -> None:
    """Let what is pending be taken, and all levels be left."""
    machine.cpus[0].before_run = None
    for _ in range(2):
        machine.l1.ping()


def _expect_same(
    context: Context, calm: ProxyMachine, disturbed: ProxyMachine, excused: Iterable[str]
) -> None:
    hsave = calm.vcpus[0].vcpu.get_msrs([Msr.MSR_VM_HSAVE_PA])[Msr.MSR_VM_HSAVE_PA]
    found = [
        *memory_outside_smm(calm, disturbed, hsave),
        *state_differences(capture(calm), capture(disturbed), tuple(excused)),
    ]
    shown = "; ".join(map(str, found[:_SHOWN]))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    context.expect("difference between the twins (without SMIs, with)", shown + more, "", str)
