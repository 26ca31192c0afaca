"""Event injection: delivered once, whatever is intercepted or masked, and reported if it fails.

APM vol. 2, 15.20 Event Injection, 15.7.2 Intercepts During IDT Interrupt Delivery, 8.2 Vectors.
The kernel: `nested_vmcb02_prepare_control`, `nested_save_pending_event_to_vmcb12`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from harness.facts import nested_svm, npt
from harness.proxy.guest_level import GuestLevel
from harness.proxy.ops import Policy, instruction
from harness.proxy.paging import PAGE
from harness.proxy.program import (
    AC,
    BP,
    BR,
    DB,
    DE,
    DF,
    GP,
    MF,
    NM,
    NP,
    OF,
    PF,
    SS,
    TS,
    UD,
    XF,
    Result,
    simple,
    vmmcall,
)
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.vmcb import EventInj

ERROR_CODE: Final = 0x5678


class EventType(IntEnum):
    """EVENTINJ.TYPE and EXITINTINFO.TYPE."""

    INTR = 0
    NMI = 2
    EXEPT = 3
    SOFT = 4


def _event(type_: EventType, vector: int, *, error: bool = False) -> EventInj:
    return EventInj.of(VALID=1, TYPE=type_, VEC=vector, VALID_ERR=int(error))


EVENTS: Final[Mapping[str, EventInj]] = {
    "INTR_20h": _event(EventType.INTR, 0x20),
    "INTR_FFh": _event(EventType.INTR, 0xFF),
    "NMI": _event(EventType.NMI, 2),
    "DE": _event(EventType.EXEPT, DE),
    "DB": _event(EventType.EXEPT, DB),
    "BP": _event(EventType.EXEPT, BP),
    "OF": _event(EventType.EXEPT, OF),
    "BR": _event(EventType.EXEPT, BR),
    "UD": _event(EventType.EXEPT, UD),
    "NM": _event(EventType.EXEPT, NM),
    "DF": _event(EventType.EXEPT, DF, error=True),
    "TS": _event(EventType.EXEPT, TS, error=True),
    "NP": _event(EventType.EXEPT, NP, error=True),
    "SS": _event(EventType.EXEPT, SS, error=True),
    "GP": _event(EventType.EXEPT, GP, error=True),
    "PF": _event(EventType.EXEPT, PF, error=True),
    "MF": _event(EventType.EXEPT, MF),
    "AC": _event(EventType.EXEPT, AC, error=True),
    "XF": _event(EventType.EXEPT, XF),
    "SOFT_80h": _event(EventType.SOFT, 0x80),
    "SOFT_03h": _event(EventType.SOFT, BP),
}
"""One of every kind that the manual has, and what an exception pushes."""

SOME: Final = ("INTR_20h", "NMI", "UD", "GP", "PF", "SOFT_80h")


def _waiting(context: Context, **vmcb: int) -> VmExit:
    """Return the exit of a guest that stands after a VMMCALL, in an operation, ready to go on."""
    fields = {name.replace("__", "."): value for name, value in vmcb.items()}
    l2 = proxy_machine(context).l1.launch(vmcb=fields)
    _walk_delivery(l2)
    exit_ = l2.run_to_exit(vmmcall())
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    exit_.skip()
    return exit_


def _walk_delivery(l2: GuestLevel) -> None:
    """Touch all that delivery touches, so that KVM has it mapped: what follows faults nowhere."""
    l2.do(simple("UD2"))
    l2.instance.clear_vectors()


def _inject(exit_: VmExit, event: EventInj, error_code: int = ERROR_CODE) -> None:
    # Its handler ends the operation and says what it found on its stack.
    exit_.guest.set_policy(event.VEC, Policy.FAULT)
    exit_.vmcb.update({"event_inj": event, "event_inj_err": error_code})


@dataclass(frozen=True)
class Taken:
    """An event as L2's handler found it."""

    vector: int
    error_code: int
    rip: int

    def __str__(self) -> str:
        return f"vector {self.vector:#x}, error code {self.error_code:#x}, RIP {self.rip:#x}"


def _taken(result: Result) -> Taken | None:
    fault = result.fault
    return None if fault is None else Taken(fault.vector, fault.error_code, fault.rip)


def _expect_taken(context: Context, result: Result, event: EventInj, rip: int) -> None:
    error_code = ERROR_CODE if event.VALID_ERR else 0
    context.expect("event", _taken(result), Taken(event.VEC, error_code, rip), str)


@scenario(needs=[nested_svm], axes={"event": tuple(EVENTS)}, levels=2)
def test_injected_event_is_delivered(context: Context, event: str) -> None:
    """VMRUN delivers EVENTINJ before L2's first instruction, with its error code if it has one."""
    exit_ = _waiting(context)
    rip = exit_.vmcb["rip"]
    _inject(exit_, EVENTS[event])
    results = exit_.guest.finish()
    _expect_taken(context, results[0], EVENTS[event], rip)
    context.expect("times it was taken", exit_.guest.counted(EVENTS[event].VEC), 1)


_INTERCEPTS: Final = {
    "INTR_20h": "intercept.intr",
    "NMI": "intercept.nmi",
    "UD": "intercept.excp.6",
    "GP": "intercept.excp.13",
    "PF": "intercept.excp.14",
    "BP": "intercept.excp.3",
    "SOFT_80h": "intercept.intn",
}


@scenario(needs=[nested_svm], axes={"event": tuple(_INTERCEPTS)}, levels=2)
def test_injected_event_is_not_intercepted(context: Context, event: str) -> None:
    """An injected event is delivered to L2 even if L1 intercepts its kind."""
    exit_ = _waiting(context)
    rip = exit_.vmcb["rip"]
    exit_.vmcb[_INTERCEPTS[event]] = 1
    _inject(exit_, EVENTS[event])
    _expect_taken(context, exit_.guest.finish()[0], EVENTS[event], rip)


_MASKS: Final[Mapping[str, Mapping[str, int]]] = {
    "RFLAGS.IF=0": {"rflags": 2},
    "interrupt_shadow": {"rflags": 0x202, "int_state": 1},
    "V_TPR=15": {"rflags": 0x202, "int_ctl.V_TPR": 15},
    "V_INTR_MASKING": {"rflags": 2, "int_ctl.V_INTR_MASKING": 1},
}


@scenario(needs=[nested_svm], axes={"mask": tuple(_MASKS)}, levels=2)
def test_injected_interrupt_ignores_masks(context: Context, mask: str) -> None:
    """An injected INTR is delivered whatever RFLAGS.IF, the shadow and the TPR say."""
    exit_ = _waiting(context)
    rip = exit_.vmcb["rip"]
    exit_.vmcb.update(_MASKS[mask])
    _inject(exit_, EVENTS["INTR_20h"])
    _expect_taken(context, exit_.guest.finish()[0], EVENTS["INTR_20h"], rip)


@scenario(needs=[nested_svm], axes={"event": SOME}, levels=2)
def test_event_without_valid_is_not_injected(context: Context, event: str) -> None:
    """EVENTINJ with V=0 does nothing."""
    exit_ = _waiting(context)
    _inject(exit_, EVENTS[event].replace(VALID=0))
    context.expect("exception in L2", _taken(exit_.guest.finish()[0]), None, str)


@scenario(needs=[nested_svm], levels=2)
def test_injected_page_fault_keeps_cr2(context: Context) -> None:
    """An injected #PF takes CR2 from the VMCB: injection does not write it."""
    exit_ = _waiting(context)
    exit_.vmcb["cr2"] = 0x1234_5000
    _inject(exit_, EVENTS["PF"])
    fault = exit_.guest.finish()[0].fault
    context.expect("CR2 in L2's handler", fault.cr2 if fault else None, 0x1234_5000)


@scenario(needs=[nested_svm], axes={"event": ("INTR_20h", "NMI", "SOFT_80h")}, levels=2)
def test_events_are_injected_one_per_vmrun(context: Context, event: str) -> None:
    """An event is delivered once per VMRUN that carries it, twenty times in a row."""
    wanted = EVENTS[event]
    l2 = proxy_machine(context).l1.launch()
    _walk_delivery(l2)
    l2.set_policy(wanted.VEC, Policy.COUNT)
    for _ in range(20):
        exit_ = l2.run_to_exit(vmmcall())
        exit_.skip()
        exit_.vmcb["event_inj"] = wanted
        l2.finish()
    context.expect("times it was taken", l2.counted(wanted.VEC), 20)


# Delivery that does not succeed


def _expect_reported(context: Context, exit_: VmExit, event: EventInj) -> None:
    info = exit_.exit_int_info
    if event.TYPE == EventType.NMI:
        # "If TYPE is 2 (NMI), VECTOR is ignored" (15.20).
        info = info.replace(VEC=event.VEC)
    context.expect("EXITINTINFO", info, event)
    if event.VALID_ERR:
        context.expect("its error code", exit_.vmcb["exit_int_info_err"], ERROR_CODE, hex)


@scenario(needs=[nested_svm], axes={"event": SOME}, levels=2)
def test_delivery_that_faults_is_reported(context: Context, event: str) -> None:
    """If delivery raises an exception that L1 intercepts, EXITINTINFO is what was injected."""
    exit_ = _waiting(context, intercept__excp__13=1)
    # No vector has a gate below this limit: delivery raises #GP (vector * 8 + IDT + EXT).
    exit_.vmcb["save.idtr.limit"] = 0
    _inject(exit_, EVENTS[event])
    failed = exit_.guest.resume_to_exit()
    expect_exit(context, failed, ExitCode.SVM_EXIT_EXCP_BASE + GP)
    _expect_reported(context, failed, EVENTS[event])


@scenario(needs=[nested_svm], axes={"event": SOME}, levels=2)
def test_error_code_of_failed_delivery_has_ext(context: Context, event: str) -> None:
    """The #GP of a failed delivery names the gate; EXT is set unless it was INT n of software."""
    exit_ = _waiting(context, intercept__excp__13=1)
    exit_.vmcb["save.idtr.limit"] = 0
    _inject(exit_, EVENTS[event])
    failed = exit_.guest.resume_to_exit()
    expect_exit(context, failed, ExitCode.SVM_EXIT_EXCP_BASE + GP)
    ext = int(EVENTS[event].TYPE != EventType.SOFT)
    context.expect("EXITINFO1", failed.exit_info_1, EVENTS[event].VEC << 3 | 2 | ext, hex)


@scenario(needs=[nested_svm, npt], axes={"event": (*SOME, "BP")}, levels=2)
def test_delivery_that_exits_can_be_repeated(context: Context, event: str) -> None:
    """A nested page fault in delivery reports the event; injected again, it is taken once."""
    exit_ = _waiting(context)
    l2, rip = exit_.guest, exit_.vmcb["rip"]
    idt = l2.context.idt_base // PAGE * PAGE
    _unmap(l2, idt)
    _inject(exit_, EVENTS[event])
    failed = l2.resume_to_exit()
    expect_exit(context, failed, ExitCode.SVM_EXIT_NPF)
    _expect_reported(context, failed, EVENTS[event])
    context.expect("RIP", failed.vmcb["rip"], rip, hex)
    _map(l2, idt)
    info, error = failed.exit_int_info, failed.vmcb["exit_int_info_err"]
    failed.vmcb.update({"event_inj": info, "event_inj_err": error})
    _expect_taken(context, l2.finish()[0], EVENTS[event], rip)
    context.expect("times it was taken", l2.counted(EVENTS[event].VEC), 1)


def _unmap(l2: GuestLevel, gpa: int) -> None:
    assert l2.npt is not None
    l2.npt.unmap(gpa)
    l2.vmcb["tlb_ctl"] = 1


def _map(l2: GuestLevel, gpa: int) -> None:
    assert l2.npt is not None
    l2.npt.map(gpa, gpa)


OWN_EVENTS: Final[Mapping[str, tuple[str, EventInj]]] = {
    "UD2": ("UD2", _event(EventType.EXEPT, UD)),
    "INT_80h": ("INT80", _event(EventType.SOFT, 0x80)),
    "INT3": ("INT3", _event(EventType.EXEPT, BP)),
    "DIV": ("DIV", _event(EventType.EXEPT, DE)),
}
"""Instructions of L2 that raise an event, and how EXITINTINFO reports it."""


@scenario(needs=[nested_svm, npt], axes={"own": tuple(OWN_EVENTS)}, levels=2)
def test_exit_in_delivery_of_l2s_own_event_reports_it(context: Context, own: str) -> None:
    """A nested page fault in delivery of an event that L2 raised itself reports that event."""
    name, event = OWN_EVENTS[own]
    l2 = proxy_machine(context).l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    l2.host.make_current()
    _unmap(l2, l2.context.idt_base // PAGE * PAGE)
    exit_ = l2.run_to_exit(instruction(name)())
    expect_exit(context, exit_, ExitCode.SVM_EXIT_NPF)
    context.expect("EXITINTINFO", exit_.exit_int_info, event)


@scenario(needs=[nested_svm], axes={"first": ("DE", "UD")}, levels=2)
def test_faults_in_delivery_become_df(context: Context, first: str) -> None:
    """Two faults in delivery that L1 does not intercept become #DF, which it can intercept."""
    exit_ = _waiting(context, intercept__excp__8=1, intercept__shutdown=1)
    exit_.vmcb["save.idtr.limit"] = 0
    _inject(exit_, EVENTS[first])
    failed = exit_.guest.resume_to_exit()
    expect_exit(context, failed, ExitCode.SVM_EXIT_EXCP_BASE + DF)
    context.expect("EXITINFO1", failed.exit_info_1, 0, hex)


@scenario(needs=[nested_svm], axes={"event": ("DF", "INTR_20h", "GP")}, levels=2)
def test_undeliverable_event_shuts_l2_down(context: Context, event: str) -> None:
    """An event that can be delivered by no means ends in the SHUTDOWN that L1 intercepts."""
    exit_ = _waiting(context, intercept__shutdown=1)
    exit_.vmcb["save.idtr.limit"] = 0
    _inject(exit_, EVENTS[event])
    failed = exit_.guest.resume_to_exit()
    expect_exit(context, failed, ExitCode.SVM_EXIT_SHUTDOWN)
    context.expect("L1 alive", exit_.host.ping(), True)


@scenario(needs=[nested_svm], levels=2)
def test_injected_nmi_can_follow_another(context: Context) -> None:
    """L2 goes on after an injected NMI, and a second one is taken as well."""
    l2 = proxy_machine(context).l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    for count in (1, 2):
        exit_ = l2.run_to_exit(vmmcall())
        exit_.skip()
        exit_.vmcb["event_inj"] = EVENTS["NMI"]
        l2.finish()
        context.expect("NMIs taken", l2.counted(2), count)
    context.expect("L2 answers", l2.do(simple("NOP1")).ok, True)
