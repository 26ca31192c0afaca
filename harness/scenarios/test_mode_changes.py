"""L2 changes its own mode: paging, long mode, CR3, EFER.NXE; vmcb12 has it all after #VMEXIT.

APM vol. 2, 3.1 System-Control Registers, 5 Page Translation and Protection, 14.6 Enabling and
Activating Long Mode, 14.7 Leaving Long Mode, 15.6 #VMEXIT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.layout import GDT_CS32, GDT_CS64, GDT_DS
from harness.proxy.level import Level
from harness.proxy.ops import instruction
from harness.proxy.paging import PAGE, Pte
from harness.proxy.program import PF, load, store, write_cr
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, expect_fault, expect_no_fault, proxy_machine
from harness.scenarios.modes import ALIAS, MODES, STORED
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer, Msr

HANG_S = 5.0
NPT: Final = (True, False)
_VMMCALL = instruction("VMMCALL").code
_RDMSR_EFER = b"\xb9" + struct.pack("<I", Msr.MSR_EFER) + b"\x0f\x32"
_WRMSR = b"\x0f\x30"
_P, _W, _RSV, _ID = 1, 2, 8, 16
"""Bits of a #PF error code (APM vol. 2, 8.4.2 Page-Fault Error Code)."""


def _write_cr(number: int, value: int) -> bytes:
    """Return mov $value, %eax; mov %eax, %crN of 32-bit code."""
    return b"\xb8" + struct.pack("<I", value) + bytes((0x0F, 0x22, 0xC0 | number << 3))


def _write_efer(value: int) -> bytes:
    """Return the write of EFER's low half, of 32-bit code."""
    return _RDMSR_EFER + b"\xb8" + struct.pack("<I", value) + _WRMSR


def _to_protected(_: Mapping[str, int], __: int) -> bytes:
    return _write_cr(0, Cr0.of(ET=1, PE=1))


def _to_real(wanted: Mapping[str, int], _: int) -> bytes:
    """PE off; the code goes on with the hidden part of the CS that it has, 32-bit and flat."""
    return _write_cr(0, wanted["cr0"])


def _from_real(_: Mapping[str, int], at: int) -> bytes:
    """PE on, a far jump and a flat DS: 16-bit code."""
    # mov %cr0, %eax; or $1, %eax; mov %eax, %cr0; ljmpl
    head = bytes.fromhex("0f20c0 6683c801 0f22c0 66ea")
    jump = struct.pack("<IH", at + len(head) + 6, GDT_CS32)
    # mov $GDT_DS, %eax; mov %eax, %ds: 32-bit code
    return head + jump + b"\xb8" + struct.pack("<I", GDT_DS) + b"\x8e\xd8"


def _to_paging(wanted: Mapping[str, int], _: int) -> bytes:
    return b"".join(_write_cr(number, wanted[f"cr{number}"]) for number in (4, 3, 0))


def _to_compatibility(wanted: Mapping[str, int], at: int) -> bytes:
    """LME, then paging makes it active. CS stays 32-bit: compatibility mode.

    PAE goes before LME: QEMU up to 7.2 at least hangs its machine in a #VMEXIT with EFER.LME=1,
    CR0.PG=0 and CR4.PAE=0 (do_vmexit() loads the host's CR0 while the guest's EFER and CR4 count).
    """
    lme = _write_efer(wanted["efer"] & ~Efer.LMA.mask)
    return _write_cr(4, wanted["cr4"]) + lme + _to_paging(wanted, at)


def _to_64_bit(wanted: Mapping[str, int], at: int) -> bytes:
    head = _to_compatibility(wanted, at) + b"\xea"
    return head + struct.pack("<IH", at + len(head) + 6, GDT_CS64)


def _leave_long_mode(wanted: Mapping[str, int], at: int) -> bytes:
    return _to_protected(wanted, at) + _write_efer(wanted["efer"])


def _leave_pae(wanted: Mapping[str, int], at: int) -> bytes:
    """PAE off and two-level tables on, with paging off in between."""
    return _to_protected(wanted, at) + _to_paging(wanted, at)


Build = Callable[[Mapping[str, int], int], bytes]
"""Makes the code that brings a state about, at an address."""


@dataclass(frozen=True)
class Change:
    """From one mode to another by code of L2's."""

    before: str
    after: str
    code: Build
    store_of: str = ""
    """The mode whose store instruction fits the CS afterwards, if not `after`."""


CHANGES: Final = {
    "real_to_protected": Change("real", "protected", _from_real),
    "protected_to_real": Change("protected", "real", _to_real, "protected"),
    "enable_legacy_paging": Change("protected", "legacy_paging", _to_paging),
    "enable_pae_paging": Change("protected", "pae_paging", _to_paging),
    "enable_long_mode": Change("protected", "compatibility", _to_compatibility),
    "enter_64_bit_code": Change("protected", "long", _to_64_bit),
    "disable_legacy_paging": Change("legacy_paging", "protected", _to_protected),
    "disable_pae_paging": Change("pae_paging", "protected", _to_protected),
    "disable_long_mode": Change("compatibility", "protected", _leave_long_mode),
    "pae_to_legacy_paging": Change("pae_paging", "legacy_paging", _leave_pae),
}
_STATE = ("cr0", "cr3", "cr4", "efer")


@scenario(needs=[nested_svm], axes={"change": tuple(CHANGES), "npt": NPT}, levels=2)
def test_l2_changes_its_mode(context: Context, change: str, npt: bool) -> None:
    """L2 enters or leaves paging or long mode by itself; vmcb12 has the new state after #VMEXIT."""
    how = CHANGES[change]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt)
    before, wanted = _state(l2, how.before), _state(l2, how.after)
    if not MODES[how.after].paging:
        # Nothing has to write them to leave paging.
        wanted |= {name: before[name] for name in ("cr3", "cr4")}
    at = l2.instance.code_gva
    mode = MODES[how.store_of or how.after]
    address = l2.scratch + 0x10
    body = how.code(wanted, at) + mode.store(address + (ALIAS if mode.paging else 0)) + _VMMCALL
    at = l2.instance.put_code(body)
    l2.vmcb.update({**MODES[how.before].state(l2), **before})
    l2.vmcb.update({"cs.base": at, "rip": 0} if MODES[how.before].real else {"rip": at})
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    seen = machine.memory.read_int(Gpa(address), 4)
    context.expect("what L2 stored in its new mode", seen, STORED, hex)
    for name in _STATE:
        context.expect(f"{name} after #VMEXIT", exit_.vmcb[name], wanted[name], hex)
    context.expect("L1 alive", machine.l1.ping(), True)


def _state(level: Level, mode: str) -> dict[str, int]:
    state = MODES[mode].state(level)
    return {name: int(state[name]) for name in _STATE}


# Changes inside 64-bit mode, by L2's proxy


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2)
def test_mov_to_cr3_switches_address_spaces(context: Context, npt: bool) -> None:
    """After MOV to CR3, PCID off, L2 sees the new tables' pages, every time; vmcb12 has CR3."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt)
    gva, pages = l2.scratch, (l2.scratch + PAGE, l2.scratch + 2 * PAGE)
    spaces = (l2.tables, machine.page_tables())
    for number, (tables, page) in enumerate(zip(spaces, pages, strict=True)):
        tables.map(gva, page)
        machine.memory.write_int(Gpa(page), 8, _value(number))
    switches = [number % 2 for number in range(1, 12)]
    results = l2.run([op for n in switches for op in (write_cr(3, spaces[n].root), load(gva))])
    for number, result in zip(switches, results[1::2], strict=True):
        context.expect(f"what is at {gva:#x}", result.value, _value(number), hex)
    last = spaces[switches[-1]].root
    context.expect("CR3 in L2", l2.read_cr(3), last, hex)
    l2.configure({})
    context.expect("CR3 after #VMEXIT", l2.vmcb["cr3"], last, hex)


def _value(number: int) -> int:
    return 0xA110_0000 + number


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2)
def test_l2_changes_efer_nxe(context: Context, npt: bool) -> None:
    """A page with NX set is reserved while L2's EFER.NXE=0, and no code while it is 1."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(npt=npt)
    gva = l2.scratch + PAGE
    l2.tables.protect(gva, set_=Pte.NX)
    efer = Efer(l2.rdmsr(Msr.MSR_EFER))
    fetch = l2.exec_op(b"\xff\xe3", user=False, rbx=gva)  # jmp *%rbx
    for nx in (0, 1, 0, 1):
        l2.wrmsr(Msr.MSR_EFER, efer.replace(NX=nx))
        fault = l2.fault_of(load(gva))
        if nx:
            expect_no_fault(context, "a load with NXE=1", fault)
            expect_fault(context, "a fetch with NXE=1", l2.fault_of(fetch), PF, _P | _ID)
        else:
            expect_fault(context, "a load with NXE=0", fault, PF)
            context.expect("RSV of its error code", bool(fault and fault.error_code & _RSV), True)
        l2.configure({})
        context.expect("EFER after #VMEXIT", Efer(l2.vmcb["efer"]), efer.replace(NX=nx))


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2)
def test_l2_changes_cr0_wp(context: Context, npt: bool) -> None:
    """A supervisor write of L2 to a read-only page is #PF with CR0.WP=1, and succeeds with WP=0."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(npt=npt)
    gva = l2.scratch + PAGE
    l2.tables.protect(gva, clear=Pte.W)
    cr0 = Cr0(l2.read_cr(0))
    for wp in (0, 1, 0, 1):
        l2.write_cr(0, cr0.replace(WP=wp))
        fault = l2.fault_of(store(gva, wp))
        if wp:
            expect_fault(context, "the write with WP=1", fault, PF, _P | _W)
        else:
            expect_no_fault(context, "the write with WP=0", fault)
        l2.configure({})
        context.expect("CR0 after #VMEXIT", Cr0(l2.vmcb["cr0"]), cr0.replace(WP=wp))


CR4_BITS: Final = ("VME", "TSD", "DE", "PSE", "MCE", "PGE", "PCE")
"""Bits of CR4 that every CPU with SVM has and that change nothing for a proxy."""


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2)
def test_l2_changes_cr4(context: Context, npt: bool) -> None:
    """Every bit of CR4 that L2 toggles reads back in L2 and is in vmcb12 after #VMEXIT."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(npt=npt)
    cr4 = Cr4(l2.read_cr(4))
    for name in CR4_BITS:
        wanted = cr4.replace(**{name: 1 - getattr(cr4, name)})
        l2.write_cr(4, wanted)
        context.expect(f"CR4 in L2 after {name}", Cr4(l2.read_cr(4)), wanted)
        l2.configure({})
        context.expect(f"CR4 after #VMEXIT and {name}", Cr4(l2.vmcb["cr4"]), wanted)
