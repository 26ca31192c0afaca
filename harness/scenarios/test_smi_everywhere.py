"""An SMI at any exit and at any instruction, beside a twin that never saw one.

APM vol. 2, 10.3 Using SMM, 15.22 SMM Support: after RSM all is as it was, but in SMRAM. Kernel:
enter_smm(), emulator_leave_smm(), svm_enter_smm(), svm_leave_smm().
"""

from __future__ import annotations

from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import nested_svm, smm
from harness.machine.addresses import Gpa
from harness.machine.console import PortOut
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import PROXY_PORT, Report
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import instruction
from harness.proxy.paging import PAGE
from harness.proxy.smm import SmmLevel
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.scenarios.migration_stops import STOP_PORT, run_to_port
from harness.scenarios.smi import (
    SINGLE_STEPS,
    Log,
    expect_unnoticed,
    smi_before_every_run,
)
from harness.storm.smi import count_smis, levels_hit
from harness.storm.workload import Kind, Workload
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4
from kvm_ioctl.exits import IoExit

LEVELS: Final = (1, 2, 3)
NPT: Final = (True, False)
HANG_S: Final = 10.0
_STEPS: Final = 12
_NOPS: Final = 6
_STRIDE: Final = 3
"""Instructions from one SMI to the next; all of them would be a minute."""
_UNUSED: Final = 5 * PAGE
"""In scratch memory: a page that no program here uses."""


# At every exit


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "npt": NPT}, levels=3)
def test_smi_at_every_exit_goes_unnoticed(context: Context, level: int, npt: bool) -> None:
    """Work with an SMI at every KVM_RUN ends as its twin without: transcript, memory and state."""

    def journey(machine: ProxyMachine, log: Log) -> None:
        machine.l1.enable_svm()
        workload = Workload.begin(machine, Kind(level, npt))
        for number in range(_STEPS):
            log(f"step {number}", workload.step())

    expect_unnoticed(context, journey)


def _scribble(machine: ProxyMachine) -> None:
    def handle(_: SmmLevel) -> None:
        at = Gpa(machine.l1.scratch + _UNUSED)
        machine.memory.write_int(at, 8, machine.memory.read_int(at, 8) + 1)

    smi_before_every_run(machine)
    machine.smm.handler = handle


def _change_a_register(machine: ProxyMachine) -> None:
    def handle(handler: SmmLevel) -> None:
        area = handler.save_area
        area.dr6 ^= 1
        handler.write_save_area(area)

    smi_before_every_run(machine)
    machine.smm.handler = handle


MISDEEDS: Final = {
    "writes_memory": (_scribble, "memory at"),
    "changes_DR6": (_change_a_register, "dr6"),
}


@scenario(needs=[nested_svm, smm], axes={"handler": tuple(MISDEEDS)})
def test_handler_that_does_something_is_noticed(context: Context, handler: str) -> None:
    """A handler that changes memory or a register that it must not is seen beside the twin."""
    disturb, says = MISDEEDS[handler]

    def journey(machine: ProxyMachine, log: Log) -> None:
        log("pings", [machine.l1.ping() for _ in range(3)])

    try:
        expect_unnoticed(context, journey, disturb)
    except ScenarioFailure as e:
        context.expect(f"{says!r} is said", says in str(e), True)
    else:
        raise ScenarioFailure("nobody noticed")


@scenario(
    needs=[nested_svm, smm], axes={"level": (1, 2), "register": ("CR0.CD", "CR4.MCE")}, levels=2
)
def test_smi_leaves_control_registers_of_l1(context: Context, level: int, register: str) -> None:
    """CR0 and CR4 of L1 are after an SMI, whichever level it came in, what they were before."""
    machine = proxy_machine(context, smm=True)
    l1 = machine.l1
    l1.enable_svm()
    cd = int(register == "CR0.CD")
    l1.write_cr(0, Cr0(l1.read_cr(0)).replace(CD=cd))
    l1.write_cr(4, Cr4(l1.read_cr(4)).replace(MCE=0))
    before = _control_registers(l1)
    context.expect("CD, MCE before", before, (cd, 0))
    machine.level(level, npt=False).ping()
    machine.inject_smi().rsm()
    seen = _control_registers(l1)
    if register == "CR0.CD":
        context.expect("CR0.CD after", seen[0], before[0])
    else:
        context.expect("CR4.MCE after", seen[1], before[1])


def _control_registers(l1: Level) -> tuple[int, int]:
    return Cr0(l1.read_cr(0)).CD, Cr4(l1.read_cr(4)).MCE


# At every instruction


@scenario(needs=[nested_svm, smm], axes={"begin": ("L1", "L2"), "npt": NPT}, levels=2)
def test_smi_at_any_instruction_of_a_round_trip(context: Context, begin: str, npt: bool) -> None:
    """An SMI at any instruction of L1's way into L2 and back, L2's included, changes nothing."""
    machine = proxy_machine(context, smm=True)
    l2 = machine.l1.launch(vmcb={"intercept.cpuid": 1}, npt=npt)
    stop = bytes((0xE6, STOP_PORT)) if begin == "L2" else b""
    code = l2.exec_op(stop + _NOPS * instruction("NOP1").code + instruction("CPUID").code)
    exit_ = l2.run_to_exit(code)
    start, rip, rsp = code.args[-1], exit_.vmcb["rip"], exit_.vmcb["rsp"]
    seen = count_smis(machine)
    trips = 0
    exit_.vmcb["rip"] = start
    stride = _STRIDE if begin == "L1" else 1
    while _interrupted_trip(l2, stride * trips, from_l2=begin == "L2"):
        trips += 1
        exit_ = l2.exit or exit_
        expect_exit(context, exit_, ExitCode.SVM_EXIT_CPUID, f"exit of trip {trips}")
        context.expect(
            f"RIP, RSP, trip {trips}", (exit_.vmcb["rip"], exit_.vmcb["rsp"]), (rip, rsp)
        )
        context.expect(f"SMIs until trip {trips}", len(seen), trips)
        exit_.vmcb["rip"] = start
    context.note("trips", count=trips, levels=levels_hit(seen))
    context.expect(f"SMIs in {begin}", begin in levels_hit(seen), True)
    (l2.exit or exit_).skip()
    context.expect("L2 goes on", all(result.ok for result in l2.finish()), True)


def _interrupted_trip(l2: GuestLevel, instructions: int, *, from_l2: bool) -> bool:
    """Resume L2 to its next exit, an SMI after so many instructions; False: there are fewer.

    Single steps from L1 on do not stop in L2 on all kernels: those from L2 on begin at its OUT.
    """
    exit_, l2.exit = l2.exit, None
    if exit_ is None:
        raise ScenarioFailure("L2 has no exit to resume from")
    exit_.host.make_current()
    exit_.host.submit_entry(exit_.guest)
    if from_l2:
        run_to_port(l2.cpu.machine)
    runner = l2.cpu.runner
    runner.finish_io()
    runner.vcpu.set_guest_debug(SINGLE_STEPS)
    for _ in range(instructions):
        if isinstance(runner.step(HANG_S), IoExit):
            # That was the report of the exit: the trip is over.
            report = PortOut(PROXY_PORT, 4, l2.host.instance.gpa | Report.DONE)
            runner.put_back([report])
            break
    else:
        runner.vcpu.set_guest_debug(0)
        runner.vcpu.smi()
        l2.go_on()
        return True
    runner.vcpu.set_guest_debug(0)
    l2.go_on()
    return False
