"""What VMRUN has taken from vmcb12 counts until #VMEXIT, whatever memory says meanwhile.

APM vol. 2, 15.5 VMRUN Instruction, 15.6 #VMEXIT: VMRUN loads the VMCB; L1, or a CPU beside it, may
write to it in memory while L2 runs. The kernel: `nested_copy_vmcb_control_to_cache` (5.10:
`load_nested_vmcb_control`), `svm_get_nested_state`. What is read twice within one VMRUN is for
`nsvm race`; clean bits are in `test_clean_bits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from harness.facts import nested_svm, npt
from harness.proxy.guest_level import GuestLevel
from harness.proxy.ops import Op
from harness.proxy.permissions import Iopm, Msrpm
from harness.proxy.program import inb, nop, rdmsr, rdtsc, simple
from harness.proxy.vmcb_view import place_of
from harness.proxy.vmexit import UnexpectedVmExit, VmExit
from harness.scenarios.case import LIFECYCLES, scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.test_clean_bits import GROUPS
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode, describe
from harness.svm.msrs import Msr
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE

NO_EXIT: Final = "no exit"
_PORT = 0x80


@dataclass(frozen=True)
class Rewrite:
    """A change of vmcb12 while L2 runs, and an operation of L2 that tells what counts."""

    change: Callable[[GuestLevel], Mapping[str, int]]
    op: Op
    before: str
    """How the operation ends by what VMRUN found in vmcb12."""
    after: str
    """How it ends, or VMRUN itself does, after the next one."""
    launched: Mapping[str, int] = field(default_factory=dict)


def _set(name: str, value: int) -> Callable[[GuestLevel], Mapping[str, int]]:
    return lambda l2: {name: value}


def _other_msrpm(l2: GuestLevel) -> Mapping[str, int]:
    machine = l2.cpu.machine
    other = Msrpm(machine.memory, machine.pages.take(MSRPM_SIZE))
    other.intercept(Msr.MSR_LSTAR)
    return {"msrpm_base_pa": other.gpa}


def _other_iopm(l2: GuestLevel) -> Mapping[str, int]:
    machine = l2.cpu.machine
    other = Iopm(machine.memory, machine.pages.take(IOPM_SIZE))
    other.intercept(_PORT)
    return {"iopm_base_pa": other.gpa}


def _empty_npt(l2: GuestLevel) -> Mapping[str, int]:
    return {"nested_cr3": l2.cpu.machine.pages.take()}


_INVALID: Final = describe(VMEXIT_INVALID)
_PUSHF: Final = describe(ExitCode.SVM_EXIT_PUSHF)
_RDTSC: Final = describe(ExitCode.SVM_EXIT_RDTSC)
_MSR: Final = describe(ExitCode.SVM_EXIT_MSR)
_IOIO: Final = describe(ExitCode.SVM_EXIT_IOIO)
_NPF: Final = describe(ExitCode.SVM_EXIT_NPF)
_READ_LSTAR: Final = rdmsr(Msr.MSR_LSTAR)

REWRITES: Final[Mapping[str, Rewrite]] = {
    "intercept_set": Rewrite(_set("intercept.pushf", 1), simple("PUSHF"), NO_EXIT, _PUSHF),
    "intercept_cleared": Rewrite(
        _set("intercept.rdtsc", 0), rdtsc(), _RDTSC, NO_EXIT, {"intercept.rdtsc": 1}
    ),
    "msrpm_base_pa": Rewrite(_other_msrpm, _READ_LSTAR, NO_EXIT, _MSR, {"intercept.msr_prot": 1}),
    "iopm_base_pa": Rewrite(_other_iopm, inb(_PORT), NO_EXIT, _IOIO, {"intercept.ioio_prot": 1}),
    "nested_cr3": Rewrite(_empty_npt, nop(), NO_EXIT, _NPF),
    "asid": Rewrite(_set("asid", 0), nop(), NO_EXIT, _INVALID),
    "vmrun_intercept": Rewrite(_set("intercept.vmrun", 0), nop(), NO_EXIT, _INVALID),
}


def _running(context: Context, vmcb: Mapping[str, int]) -> GuestLevel:
    """Return a guest that is current: KVM_RUN came back from inside it."""
    l2 = proxy_machine(context).l1.launch(vmcb=vmcb)
    context.expect("L2 answers", l2.ping(), True)
    return l2


def _ending(l2: GuestLevel, op: Op) -> str:
    """Run an operation; return the exit that it, or VMRUN, ended in, or that there is none."""
    try:
        seen = l2.start(op)
    except UnexpectedVmExit as e:
        return describe(e.exit.exit_code)
    return describe(seen.exit_code) if isinstance(seen, VmExit) else NO_EXIT


@scenario(
    needs=[nested_svm, npt], axes={"what": tuple(REWRITES)}, levels=2, lifecycle=LIFECYCLES
)  # fmt: skip
def test_control_area_written_while_l2_runs_counts_at_the_next_vmrun(
    context: Context, what: str
) -> None:
    """Control fields that are rewritten while L2 runs mean nothing before the next VMRUN."""
    row = REWRITES[what]
    l2 = _running(context, row.launched)
    l2.vmcb.update(row.change(l2))
    if row.before == NO_EXIT:
        context.expect("L2 meanwhile", _ending(l2, row.op), NO_EXIT)
        l2.host.make_current()
    else:
        seen = l2.run_to_exit(row.op)
        context.expect("L2 meanwhile", describe(seen.exit_code), row.before)
        seen.skip()
        l2.finish()
    context.expect("L2 after the next VMRUN", _ending(l2, row.op), row.after)


@scenario(needs=[nested_svm], axes={"group": tuple(GROUPS)}, levels=2)
def test_state_written_while_l2_runs_is_not_seen(context: Context, group: str) -> None:
    """L2's registers, TSC and V_TPR stay what they are while vmcb12 is rewritten.

    #VMEXIT then writes over what was written to the save area and to V_TPR: that is never seen.
    """
    row = GROUPS[group]
    l2 = _running(context, {"int_ctl.V_INTR_MASKING": 1})
    before = l2.exec(row.code)["rbx"]
    l2.vmcb[row.field] = row.new(l2.vmcb[row.field])
    new = row.seen(l2.vmcb[row.field])
    context.expect(f"{row.field} in L2 meanwhile", l2.exec(row.code)["rbx"], before, hex)
    l2.host.make_current()
    later = new if row.field == "tsc_offset" else before
    context.expect(f"{row.field} after the next VMRUN", l2.exec(row.code)["rbx"], later, hex)


EVENTS: Final[Mapping[str, Mapping[str, int]]] = {
    "EVENTINJ": {"event_inj": 0x8000_0040},
    "V_IRQ": {"int_vector": 0x40, "int_ctl.V_INTR_PRIO": 15, "int_ctl.V_IRQ": 1},
}
_STI_NOP_CLI: Final = bytes.fromhex("fb9090fa")


@scenario(needs=[nested_svm], axes={"event": tuple(EVENTS)}, levels=2, lifecycle=LIFECYCLES)
def test_event_written_while_l2_runs_is_not_injected(context: Context, event: str) -> None:
    """An event that is written to vmcb12 while L2 runs does not come, #VMEXIT writes over it."""
    l2 = _running(context, {})
    l2.vmcb.update(EVENTS[event])
    l2.exec(_STI_NOP_CLI)
    context.expect("events meanwhile", l2.counted(0x40), 0)
    l2.host.make_current()
    l2.exec(_STI_NOP_CLI)
    context.expect("events after the next VMRUN", l2.counted(0x40), 0)


# What userspace is told


CONTROL: Final[Mapping[str, int]] = {
    "intercept.cpuid": 1,
    "intercept.excp.3": 1,
    "intercept.cr0_read": 1,
    "intercept.dr7_write": 1,
    "intercept.vmmcall": 0,
    "msrpm_base_pa": 0x0010_0000,
    "iopm_base_pa": 0x0010_0000,
    "tsc_offset": 0x1234_5678,
    "asid": 7,
    "nested_cr3": 0x0010_0000,
}
"""Fields of the control area with other values than a guest is launched with."""


@scenario(needs=[nested_svm, npt], axes={"field": tuple(CONTROL)}, levels=2, lifecycle=LIFECYCLES)
def test_nested_state_is_what_vmrun_took(context: Context, field: str) -> None:
    """KVM_GET_NESTED_STATE returns the control area of the last VMRUN, not what memory has now."""
    l2 = _running(context, {"intercept.msr_prot": 1, "intercept.ioio_prot": 1})
    old, new = l2.vmcb[field], CONTROL[field]
    context.expect(f"{field} is rewritten", old != new, True)
    l2.vmcb[field] = new
    state = bytes(l2.cpu.runner.vcpu.get_nested_state().data)
    place = place_of(field)
    value = int.from_bytes(state[place.offset : place.offset + place.size], "little")
    context.expect(f"{field} in the state", value >> place.shift & place.mask, old, hex)
    context.expect(f"{field} in memory", l2.vmcb[field], new, hex)
    context.expect("L2 answers", l2.ping(), True)
