"""SMIs into L1, L2 and L3: from userspace and from guests, with GIF=0, intercepted, on vCPUs.

APM vol. 2, 10.3 Using SMM, 15.13 Interrupt Intercepts, 15.17 Global Interrupt Flag, 15.22 SMM
Support. Kernel: svm_smi_allowed(), nested_exit_on_smi(), svm_enter_smm().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.facts import nested_svm, smm
from harness.machine.addresses import Gpa
from harness.proxy.apic import Apic, Delivery
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import EnterFlag, Op
from harness.proxy.program import atomic_add, cpuid, nop, outb, simple, store
from harness.proxy.smm import SMI_COMMAND_PORT
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, gif_of, proxy_machine
from harness.scenarios.migration_stops import vmrun_only
from harness.scenarios.smi import events_of
from harness.storm.smi import Smi, count_smis, send_message
from harness.svm.exit_codes import ExitCode, describe

LEVELS: Final = (1, 2, 3)
NPT: Final = (True, False)
_VCPUS: Final = 3
_SMBASE_OFFSET: Final = 0xFF00
"""In the save area, from SMBASE."""


# Where they come from

Source = Callable[[ProxyMachine, Level], list[Op]]
"""Raises an SMI of vCPU 0, or returns the operations by which the level does."""


def _by_ioctl(machine: ProxyMachine, level: Level) -> list[Op]:
    machine.vcpus[0].vcpu.smi()
    return []


def _by_message(machine: ProxyMachine, level: Level) -> list[Op]:
    send_message(machine, Delivery.SMI)
    return []


def _by_itself(machine: ProxyMachine, level: Level) -> list[Op]:
    return Apic(level).ipi(0, 0, Delivery.SMI)


def _by_another_vcpu(machine: ProxyMachine, level: Level) -> list[Op]:
    other = machine.cpus[1].l1
    other.run(Apic(other).ipi(0, 0, Delivery.SMI))
    return []


def _by_port(machine: ProxyMachine, level: Level) -> list[Op]:
    return [outb(SMI_COMMAND_PORT, 1)]


SOURCES: Final[dict[str, Source]] = {
    "KVM_SMI": _by_ioctl,
    "KVM_SIGNAL_MSI": _by_message,
    "ICR_of_itself": _by_itself,
    "ICR_of_another_vCPU": _by_another_vcpu,
    "port_B2h": _by_port,
}


@scenario(
    needs=[nested_svm, smm],
    axes={"source": tuple(SOURCES), "level": LEVELS, "npt": NPT},
    levels=3,
)
def test_smi_is_taken_once_whoever_sends_it(
    context: Context, source: str, level: int, npt: bool
) -> None:
    """An SMI interrupts the level that runs, once, and the save area says which one that is."""
    machine = proxy_machine(context, smm=True, irqchip=True, vcpus=2)
    machine.l1.enable_svm()
    guest = machine.level(level, npt=npt)
    guest.ping()
    seen = count_smis(machine)
    results = guest.run([*SOURCES[source](machine, guest), nop(), store(guest.scratch, 1), nop()])
    context.expect("operations that succeeded", all(result.ok for result in results), True)
    _expect_smis(context, seen, [guest])
    guest.ping()
    context.expect("SMIs later on", len(seen), 1)
    context.expect("L1 alive", machine.l1.ping(), True)


def _expect_smis(context: Context, seen: list[Smi], levels: list[Level]) -> None:
    """Fail the scenario unless the SMIs interrupted these levels, each with SVM enabled."""
    context.expect("levels interrupted", [smi.level for smi in seen], [lv.name for lv in levels])
    flags = [(smi.svm_guest, smi.svme) for smi in seen]
    context.expect("SVM guest, SVME", flags, [(level.depth > 1, True) for level in levels])


# Between VMRUN and L2


@scenario(needs=[nested_svm, smm], axes={"intercepted": (False, True), "npt": NPT}, levels=2)
def test_smi_between_vmrun_and_l2_waits_for_l2(
    context: Context, intercepted: bool, npt: bool
) -> None:
    """An SMI that comes when VMRUN is done and L2 not entered yet is taken in L2, or exits it."""
    machine = proxy_machine(context, smm=True)
    l2 = machine.l1.launch(vmcb={"intercept.cpuid": 1, "intercept.smi": int(intercepted)}, npt=npt)
    l2.run_to_exit(cpuid(0)).skip()
    seen = count_smis(machine)
    vmrun_only(l2)
    machine.vcpus[0].vcpu.smi()
    went_on = l2.go_on()
    if intercepted:
        exit_ = l2.exit
        context.expect("exit", exit_ and exit_.name, describe(ExitCode.SVM_EXIT_SMI))
        _expect_smis(context, seen, [machine.l1])
        went_on = l2.resume()
    else:
        _expect_smis(context, seen, [l2])
    context.expect("L2 goes on", isinstance(went_on, list) and went_on[0].ok, True)
    context.expect("SMIs", len(seen), 1)


# Intercepted, and held by GIF


@scenario(needs=[nested_svm, smm], axes={"level": (2, 3), "stgi": (True, False)}, levels=3)
def test_intercepted_smi_exits_and_is_taken_by_l1(context: Context, level: int, stgi: bool) -> None:
    """An SMI that the host of L2 or L3 intercepts is its #VMEXIT, and is taken in L1 after STGI."""
    machine = proxy_machine(context, smm=True)
    flags = ENTER_DEFAULT if stgi or level == 3 else ENTER_DEFAULT & ~EnterFlag.STGI
    host = machine.level(level - 1, npt=False)
    guest = host.launch(vmcb={"intercept.smi": 1}, npt=False, enter_flags=flags)
    guest.run(nop())
    seen = count_smis(machine)
    machine.vcpus[0].vcpu.smi()
    exit_ = guest.run_to_exit(nop())
    expect_exit(context, exit_, ExitCode.SVM_EXIT_SMI)
    context.expect("host of the exit", exit_.host.name, host.name)
    context.expect("EXITINTINFO.VALID", exit_.exit_int_info.VALID, 0)
    if flags & EnterFlag.STGI:
        _expect_smis(context, seen, [machine.l1])
    else:
        context.expect("GIF", gif_of(machine.l1), False)
        context.expect("SMIs with GIF=0", len(seen), 0)
        context.expect("SMI pending", events_of(machine).smi.pending, 1)
        machine.l1.run([simple("STGI"), nop()])
        _expect_smis(context, seen, [machine.l1])
    context.expect("the guest goes on", guest.finish()[0].ok, True)
    context.expect("SMIs", len(seen), 1)


@scenario(
    needs=[nested_svm, smm],
    axes={"then": ("STGI", "VMRUN", "VMRUN_intercepted"), "after": ("CLGI", "VMEXIT")},
    levels=2,
)
def test_smi_waits_for_gif(context: Context, then: str, after: str) -> None:
    """An SMI that comes with GIF=0 waits for STGI, or for VMRUN, which sets GIF as well."""
    machine = proxy_machine(context, smm=True)
    l1 = machine.l1
    fields = {"intercept.cpuid": 1, "intercept.smi": int(then == "VMRUN_intercepted")}
    l2 = l1.launch(vmcb=fields, npt=False, enter_flags=ENTER_DEFAULT & ~EnterFlag.STGI)
    l2.run_to_exit(cpuid(0)).skip()
    if after == "CLGI":
        l1.run([simple("STGI"), simple("CLGI")])
    seen = count_smis(machine)
    machine.vcpus[0].vcpu.smi()
    for _ in range(2):
        context.expect("L1 runs on", l1.ping(), True)
    context.expect("SMIs with GIF=0", (len(seen), events_of(machine).smi.pending), (0, 1))
    if then == "STGI":
        l1.run([simple("STGI"), nop()])
        _expect_smis(context, seen, [l1])
    elif then == "VMRUN":
        l2.finish()
        _expect_smis(context, seen, [l2])
    else:
        expect_exit(context, l2.resume_to_exit(), ExitCode.SVM_EXIT_SMI)
        context.expect("SMIs with GIF=0 again", len(seen), 0)
        l1.run([simple("STGI"), nop()])
        _expect_smis(context, seen, [l1])
        l2.finish()
    context.expect("SMI still pending", events_of(machine).smi.pending, 0)


# Several vCPUs


@scenario(needs=[nested_svm, smm], axes={"level": (1, 2)}, levels=2)
def test_each_vcpu_has_its_own_smram(context: Context, level: int) -> None:
    """SMIs of vCPUs that run at the same time each have their own SMBASE, save area and handler."""
    machine = proxy_machine(context, smm=True, vcpus=_VCPUS)
    for cpu in machine.cpus:
        cpu.l1.enable_svm()
    guests = [machine.level(level, npt=False, vcpu=index) for index in range(_VCPUS)]
    counts = [count_smis(machine, index) for index in range(_VCPUS)]
    program = [outb(SMI_COMMAND_PORT, 1), atomic_add(machine.l1.scratch, 1)]
    rounds = 20
    threads = [
        machine.in_thread(guest, lambda mine: [mine.run(program) for _ in range(rounds)])
        for guest in guests
    ]
    for thread in threads:
        thread.join(machine.timeout_s)
    for guest, seen in zip(guests, counts, strict=True):
        _expect_smis(context, seen, [guest] * rounds)
    bases = [cpu.smm.read_smram(_SMBASE_OFFSET, 4) for cpu in machine.cpus]
    context.expect("SMBASE saved", bases, [cpu.smm.smbase for cpu in machine.cpus])
    total = machine.memory.read_int(Gpa(machine.l1.scratch), 8)
    context.expect("operations done", total, rounds * _VCPUS)
