"""What #VMEXIT writes into the VMCB, what it must not write, and the L1 that it comes back to.

APM vol. 2, 15.6 #VMEXIT, 15.5.1 Basic Operation (what VMRUN loads and saves), 15.5.2 VMSAVE and
VMLOAD Instructions, appendix B. The kernel: `nested_svm_vmexit`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import GDT_USER_CS64, GDT_USER_DS
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.ops import EnterFlag, Op, instruction
from harness.proxy.program import (
    rdmsr,
    read_cr,
    read_dr,
    vmmcall,
    vmrun,
    write_cr,
    write_dr,
    wrmsr,
)
from harness.proxy.vmcb_view import VmcbView
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, gif_of, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer, Msr
from harness.svm.vmcb import vmcb, vmcb_control_area

VMMCALL: Final = bytes.fromhex("0f01d9")

# What L2 changed is in the VMCB


@dataclass(frozen=True)
class Written:
    """A field, what L2 does to it, and what must be found there after the VMMCALL that follows."""

    field: str
    program: Callable[[GuestLevel], list[Op]]
    value: Callable[[GuestLevel], int]


def _table(l2: GuestLevel, name: str, limit: int) -> list[Op]:
    """Return the program that gives a descriptor table another limit."""
    at = Gpa(l2.scratch)
    l2.cpu.machine.memory.write(at, limit.to_bytes(2, "little"))
    base = l2.vmcb[f"save.{'gdtr' if name == 'LGDT' else 'idtr'}.base"]
    l2.cpu.machine.memory.write_int(Gpa(at + 2), 8, base)
    return [instruction(name)(rbx=at)]


NULL_DS: Final = bytes.fromhex("31c08ed80f01d9b8100000008ed8")
"""xor eax, eax; mov ds, eax; vmmcall; mov eax, 0x10; mov ds, eax."""
NULL_ES: Final = bytes.fromhex("31c08ec00f01d9b8100000008ec0")
SET_CARRY: Final = bytes.fromhex("f90f01d9")
SET_DIRECTION: Final = bytes.fromhex("fd0f01d9fc")
STORE_RSP: Final = bytes.fromhex("4889e34883ec400f01d94883c440")
"""mov rbx, rsp; sub rsp, 0x40; vmmcall; add rsp, 0x40."""

SCE_EFER: Final = Efer.SCE.mask

WRITTEN: Final = {
    row.field: row
    for row in (
        Written("rax", lambda l2: [vmmcall(0x1234_5678_9ABC_DEF0)], lambda _: 0x123456789ABCDEF0),
        Written("cr0", lambda l2: [write_cr(0, l2.context.cr0 | Cr0.TS.mask), vmmcall()],
                lambda l2: l2.context.cr0 | Cr0.TS.mask),
        Written("cr2", lambda l2: [write_cr(2, 0xDEAD_B000), vmmcall()], lambda _: 0xDEAD_B000),
        Written("cr3", lambda l2: [write_cr(3, l2.context.cr3 | 0x18), vmmcall()],
                lambda l2: l2.context.cr3 | 0x18),
        Written("cr4", lambda l2: [write_cr(4, l2.context.cr4 | Cr4.TSD.mask), vmmcall()],
                lambda l2: l2.context.cr4 | Cr4.TSD.mask),
        Written("efer", lambda l2: [wrmsr(Msr.MSR_EFER, l2.vmcb["efer"] | SCE_EFER), vmmcall()],
                lambda l2: l2.vmcb["efer"] | SCE_EFER),
        Written("dr6", lambda l2: [write_dr(6, 0xFFFF_0FF5), vmmcall()], lambda _: 0xFFFF_0FF5),
        Written("dr7", lambda l2: [write_dr(7, 0x700), vmmcall()], lambda _: 0x700),
        Written("save.gdtr.limit", lambda l2: [*_table(l2, "LGDT", 0x7F), vmmcall()],
                lambda _: 0x7F),
        Written("save.idtr.limit", lambda l2: [*_table(l2, "LIDT", 0xEFF), vmmcall()],
                lambda _: 0xEFF),
        Written("save.ds.selector", lambda l2: [l2.exec_op(NULL_DS)], lambda _: 0),
        Written("save.es.selector", lambda l2: [l2.exec_op(NULL_ES)], lambda _: 0),
        Written("save.cs.selector", lambda l2: [vmmcall().user], lambda _: GDT_USER_CS64),
        Written("save.ss.selector", lambda l2: [vmmcall().user], lambda _: GDT_USER_DS),
        Written("cpl", lambda l2: [vmmcall().user], lambda _: 3),
    )
}  # fmt: skip


@scenario(needs=[nested_svm], axes={"field": tuple(WRITTEN)}, levels=2)
def test_vmexit_saves_what_l2_changed(context: Context, field: str) -> None:
    """#VMEXIT writes the guest's state into the VMCB's state save area."""
    row = WRITTEN[field]
    l2 = proxy_machine(context).l1.launch()
    expected = row.value(l2)
    exit_ = l2.run_to_exit(row.program(l2))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    context.expect(field, exit_.vmcb[field], expected, hex)


@scenario(needs=[nested_svm], axes={"flag": ("CF", "DF")}, levels=2)
def test_vmexit_saves_rflags(context: Context, flag: str) -> None:
    """#VMEXIT writes RFLAGS as the guest had it at the instruction that exited."""
    code, bit = {"CF": (SET_CARRY, 0), "DF": (SET_DIRECTION, 10)}[flag]
    l2 = proxy_machine(context).l1.launch()
    exit_ = l2.run_to_exit(l2.exec_op(code))
    context.expect(f"RFLAGS.{flag}", exit_.vmcb["rflags"] >> bit & 1, 1)
    context.expect("RFLAGS bit 1", exit_.vmcb["rflags"] >> 1 & 1, 1)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_saves_rip_and_rsp(context: Context) -> None:
    """#VMEXIT writes RIP of the instruction that exited, not of the next, and the guest's RSP."""
    l2 = proxy_machine(context).l1.launch()
    op = l2.exec_op(STORE_RSP)
    exit_ = l2.run_to_exit(op)
    # EXEC's code is at R8; `mov rbx, rsp` and `sub rsp, 0x40` take seven bytes.
    context.expect("RIP", exit_.vmcb["rip"], op.args[6] + 7, hex)
    context.expect("RSP", exit_.vmcb["rsp"], exit_.gprs.rbx - 0x40, hex)


@scenario(needs=[nested_svm], levels=2)
def test_registers_that_are_not_in_the_vmcb_pass_through(context: Context) -> None:
    """General registers other than RAX and RSP are the guest's after #VMEXIT."""
    l2 = proxy_machine(context).l1.launch()
    exit_ = l2.run_to_exit(vmmcall(1, rbx=2, rcx=3, rdx=4, rsi=5, rdi=6))
    gprs = exit_.gprs
    seen = (gprs.rbx, gprs.rcx, gprs.rdx, gprs.rsi, gprs.rdi)
    context.expect("RBX, RCX, RDX, RSI, RDI", seen, (2, 3, 4, 5, 6))


# What belongs to L1 in the VMCB stays as L1 wrote it

_SENTINELS: Final = {
    "pause_filter_thresh": 0x1234,
    "pause_filter_count": 0x4321,
    "tsc_offset": 0x1_0000,
    "asid": 3,
    "int_vector": 0x55,
    "avic_vapic_bar": 0xFEE0_0000,
    "clean": 0,
    "save.fs.base": 0x1111_0000,
    "save.gs.base": 0x2222_0000,
    "save.ldtr.base": 0x3333_0000,
    "save.tr.base": 0x4444_0000,
    "star": 0x1111_2222_3333_4444,
    "lstar": 0x5555_0000,
    "cstar": 0x6666_0000,
    "sfmask": 0x7777,
    "kernel_gs_base": 0x8888_0000,
    "sysenter_cs": 0x9999,
    "sysenter_esp": 0xAAAA_0000,
    "sysenter_eip": 0xBBBB_0000,
}
"""Values for what VMRUN does not load, and for what it loads and #VMEXIT does not save."""

NOT_WRITTEN: Final[Mapping[str, tuple[str, ...]]] = {
    "intercepts": ("intercepts", "iopm_base_pa", "msrpm_base_pa"),
    "pause_filter": ("pause_filter_thresh", "pause_filter_count"),
    "tlb": ("asid", "tlb_ctl"),
    "other_control": ("tsc_offset", "int_vector", "nested_ctl", "nested_cr3", "virt_ext", "clean",
                      "avic_vapic_bar"),
    "reserved": ("reserved_0x018", "reserved_0x05d", "reserved_0x0c4", "reserved_sw"),
    "vmload_segments": ("fs", "gs", "ldtr", "tr"),
    "vmload_msrs": ("star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs",
                    "sysenter_esp", "sysenter_eip"),
}  # fmt: skip
"""Fields that #VMEXIT must leave alone (APM vol. 2, 15.6; table B-1)."""


def _bytes_of(whole: vmcb, field: str) -> bytes:
    area = whole.control if hasattr(vmcb_control_area, field) else whole.save
    place = getattr(type(area), field)
    return bytes(area.as_bytes()[place.offset : place.offset + place.size])


def _fill_reserved(view: VmcbView, field: str) -> None:
    """Give a reserved field bytes that nobody would write there."""
    place = getattr(vmcb_control_area, field)
    whole = bytearray(view.bytes())
    whole[place.offset : place.offset + place.size] = b"\xa5" * place.size
    view.write(vmcb.from_bytes(bytes(whole[: ctypes.sizeof(vmcb)])))


@scenario(needs=[nested_svm], axes={"fields": tuple(NOT_WRITTEN)}, levels=2)
def test_vmexit_leaves_what_is_l1s(context: Context, fields: str) -> None:
    """#VMEXIT does not write control fields that L1 owns, nor state that VMSAVE is for."""
    l2 = _bare_guest(proxy_machine(context).l1)
    for field in NOT_WRITTEN[fields]:
        if field.startswith("reserved"):
            _fill_reserved(l2.vmcb, field)
    l2.vmcb.update(_SENTINELS)
    before = l2.vmcb.read()
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    after = exit_.vmcb.read()
    for field in NOT_WRITTEN[fields]:
        context.expect(field, _bytes_of(after, field), _bytes_of(before, field), bytes.hex)


@scenario(needs=[nested_svm], axes={"field": ("tlb_ctl", "clean", "asid")}, levels=2)
def test_vmexit_keeps_what_l1_writes_while_l2_runs(context: Context, field: str) -> None:
    """A field that #VMEXIT does not write keeps what L1 wrote there while L2 was running."""
    machine = proxy_machine(context)
    l2 = machine.l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    value = {"tlb_ctl": 1, "clean": 0x3FF, "asid": 5}[field]
    # L2 is current: KVM_RUN came back from inside it.
    l2.vmcb[f"control.{field}"] = value
    exit_ = l2.run_to_exit(vmmcall())
    context.expect(field, exit_.vmcb[f"control.{field}"], value, hex)


def _bare_guest(l1: Level) -> GuestLevel:
    """Return a guest that is one VMMCALL, entered without VMLOAD and VMSAVE around it."""
    l2 = l1.launch(enter_flags=EnterFlag.STGI | EnterFlag.REPORT)
    l2.vmcb["rip"] = l2.instance.put_code(VMMCALL)
    return l2


# What #VMEXIT tells


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_clears_eventinj(context: Context) -> None:
    """#VMEXIT clears EVENTINJ.V: an event is injected once."""
    l2 = proxy_machine(context).l1.launch()
    # Its IDT is not there before it has run.
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    l2.vmcb["rip"] += 3
    l2.vmcb["event_inj"] = 0x8000_0040
    l2.finish()
    exit_ = l2.run_to_exit(vmmcall())
    context.expect("EVENTINJ.V", exit_.vmcb["event_inj.VALID"], 0)
    context.expect("times that L2 took it", l2.counted(0x40), 1)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_without_event_reports_none(context: Context) -> None:
    """An exit that interrupts no event delivery has EXITINTINFO.V=0, whatever was there before."""
    l2 = proxy_machine(context).l1.launch()
    l2.vmcb.update({"control.exit_int_info": 0x8000_0306, "exit_int_info_err": 0x18})
    exit_ = l2.run_to_exit(vmmcall())
    context.expect("EXITINTINFO.V", exit_.exit_int_info.VALID, 0)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_reports_the_interrupt_shadow(context: Context) -> None:
    """An exit in the shadow of STI has INTERRUPT_SHADOW=1, one after it has 0."""
    l2 = proxy_machine(context).l1.launch()
    # sti; vmmcall; nop; vmmcall; cli
    op = l2.exec_op(bytes.fromhex("fb0f01d9900f01d9fa"))
    exit_ = l2.run_to_exit(op)
    context.expect("INTERRUPT_SHADOW after STI", exit_.vmcb["int_state.INTERRUPT_SHADOW"], 1)
    exit_.skip()
    exit_.vmcb["int_state.INTERRUPT_SHADOW"] = 0
    exit_ = l2.resume_to_exit()
    context.expect("INTERRUPT_SHADOW later", exit_.vmcb["int_state.INTERRUPT_SHADOW"], 0)


# L1 after #VMEXIT

HOST_STATE: Final[Mapping[str, Op]] = {
    "CR0": read_cr(0),
    "CR3": read_cr(3),
    "CR4": read_cr(4),
    "EFER": rdmsr(Msr.MSR_EFER),
}

_GUEST_DIFFERS: Final = {"cr0": Cr0.TS.mask, "cr3": 0x18, "cr4": Cr4.TSD.mask, "efer": SCE_EFER}


@scenario(needs=[nested_svm], axes={"npt": (True, False)}, levels=2)
def test_vmexit_restores_l1s_control_registers(context: Context, npt: bool) -> None:
    """After #VMEXIT L1 has its own CR0, CR3, CR4 and EFER, whatever L2's were."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch(npt=npt)
    for field, bit in _GUEST_DIFFERS.items():
        l2.vmcb[field] |= bit
    program = list(HOST_STATE.values())
    before = [result.value for result in l1.run(program)]
    exit_ = l2.run_to_exit(vmmcall())
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    for name, old, seen in zip(HOST_STATE, before, l1.run(program), strict=True):
        context.expect(name, seen.value, old, hex)


@scenario(needs=[nested_svm], axes={"table": ("SGDT", "SIDT")}, levels=2)
def test_vmexit_restores_l1s_tables(context: Context, table: str) -> None:
    """After #VMEXIT L1 has its own GDTR and IDTR."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch()
    l2.vmcb.update({"save.gdtr.limit": 0x6F, "save.idtr.limit": 0xDFF})
    program = [instruction(table)(rbx=l1.scratch), instruction("LOAD8")(rbx=l1.scratch)]
    before = l1.run(program)[1].value
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    context.expect(table, l1.run(program)[1].value, before, hex)


_SELECTORS: Final = {"cs": "8cc8", "ss": "8cd0", "ds": "8cd8", "es": "8cc0"}
"""mov eax, SEGMENT."""


@scenario(needs=[nested_svm], axes={"segment": tuple(_SELECTORS)}, levels=2)
def test_vmexit_restores_l1s_segments(context: Context, segment: str) -> None:
    """After #VMEXIT L1 has its own CS, SS, DS and ES, whatever L2's were."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch()
    op = l1.exec_op(bytes.fromhex(_SELECTORS[segment]))
    before = l1.do(op).values[0] & 0xFFFF
    expect_exit(context, l2.run_to_exit(vmmcall().user), ExitCode.SVM_EXIT_VMMCALL)
    context.expect(segment.upper(), l1.do(op).values[0] & 0xFFFF, before, hex)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_restores_l1s_rax(context: Context) -> None:
    """After #VMEXIT L1's RAX is what it was at VMRUN: the VMCB's address."""
    l1 = proxy_machine(context).l1
    l2 = _bare_guest(l1)
    l2.vmcb["rax"] = 0x1234
    context.expect("RAX", l1.do(vmrun(l2.vmcb.gpa)).values[0], int(l2.vmcb.gpa), hex)


_CARRY_VMRUN: Final = {0: bytes.fromhex("f80f01d89c59"), 1: bytes.fromhex("f90f01d89c59")}
"""clc or stc; vmrun; pushfq; pop rcx."""


@scenario(needs=[nested_svm], axes={"carry": (0, 1)}, levels=2)
def test_vmexit_restores_l1s_rflags(context: Context, carry: int) -> None:
    """After #VMEXIT L1's RFLAGS are those that it had at VMRUN."""
    l1 = proxy_machine(context).l1
    l2 = _bare_guest(l1)
    l2.vmcb["rflags"] = 2 | (1 - carry)
    flags = l1.exec(_CARRY_VMRUN[carry], rax=l2.vmcb.gpa)["rcx"]
    context.expect("RFLAGS.CF", flags & 1, carry)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_disables_l1s_breakpoints(context: Context) -> None:
    """#VMEXIT sets DR7 to its reset value: L1's breakpoints are off."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    l1.make_current()
    # Length and type bits of breakpoint 0 without enabling it: nothing can fire.
    l1.run([write_dr(7, 0xF_0400)])
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    context.expect("DR7", l1.do(read_dr(7)).value, 0x400, hex)


@scenario(needs=[nested_svm], levels=2)
def test_vmexit_clears_gif(context: Context) -> None:
    """VMRUN sets GIF, #VMEXIT clears it."""
    machine = proxy_machine(context)
    l2 = machine.l1.launch(enter_flags=ENTER_DEFAULT & ~EnterFlag.STGI)
    context.expect("L2 answers", l2.ping(), True)
    context.expect("GIF in L2", gif_of(l2), True)
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    context.expect("GIF after #VMEXIT", gif_of(l2), False)
    machine.l1.run([instruction("STGI")()])
    context.expect("GIF after STGI", gif_of(l2), True)


@scenario(needs=[nested_svm], levels=2)
def test_l1_runs_at_its_own_tsc(context: Context) -> None:
    """TSC_OFFSET is L2's only: after #VMEXIT L1's time stamps go on where they were."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch()
    offset = 1 << 50
    l2.vmcb["tsc_offset"] = offset
    context.expect("TSC of L2 is ahead", l2.rdmsr(Msr.MSR_IA32_TSC) >= offset, True)
    context.expect("TSC of L1 is ahead", l1.rdmsr(Msr.MSR_IA32_TSC) >= offset, False)


@scenario(needs=[nested_svm], levels=2)
def test_vmload_state_stays_l2s_until_vmload(context: Context) -> None:
    """VMRUN and #VMEXIT switch no VMLOAD state: L1 sees L2's LSTAR until it executes VMLOAD."""
    l1 = proxy_machine(context).l1
    l2 = l1.launch(enter_flags=EnterFlag.STGI | EnterFlag.REPORT)
    # wrmsr; vmmcall: the guest writes LSTAR and exits.
    l2.vmcb["rip"] = l2.instance.put_code(bytes.fromhex("0f30") + VMMCALL)
    l2.vmcb["rax"] = 0x1234_0000
    l2.set_gprs(rcx=Msr.MSR_LSTAR, rdx=0)
    expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_VMMCALL)
    context.expect("LSTAR in L1", l1.rdmsr(Msr.MSR_LSTAR), 0x1234_0000, hex)
