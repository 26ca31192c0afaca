"""L2 in every mode: real, protected, legacy and PAE paging, compatibility and 64-bit mode.

APM vol. 2, 1.3 Operating Modes, 5 Page Translation and Protection, 15.5.1 Basic Operation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.level import CODE64_ATTRIB, DATA_ATTRIB, GuestLevel
from harness.proxy.ops import instruction
from harness.proxy.paging import LARGE_PAGE, PAGE, Pte
from harness.proxy.program import PF
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import SegAttrib

HANG_S = 5.0
ALIAS: Final = 0x4000_0000
"""With paging, memory from 0 up is seen here once more, above all of it."""
UNMAPPED: Final = 0x8000_0000
_VALUE = 0x1234

_CODE16 = SegAttrib.of(P=1, S=1, TYPE=0xB)
_DATA16 = SegAttrib.of(P=1, S=1, TYPE=0x3)
_CODE32 = _CODE16.replace(G=1, DB=1)
_DATA_SEGMENTS = ("ds", "es", "ss")
_FLAT = 0xFFFF_FFFF

_REAL_CR0 = Cr0.of(ET=1)
_PROTECTED_CR0 = Cr0.of(ET=1, PE=1)
_PAGING_CR0 = Cr0.of(ET=1, PE=1, PG=1)
_LEGACY_EFER = Efer.of(SVME=1)
_LONG_EFER = Efer.of(SVME=1, LME=1, LMA=1)

# xor %eax, %eax, then a byte that is DEC but in 64-bit mode, where it is a REX prefix; nop
_WHICH_MODE = bytes.fromhex("31c0 48 90")
_VMMCALL = instruction("VMMCALL").code


def _store16(address: int) -> bytes:
    return b"\xc7\x06" + struct.pack("<HH", address, _VALUE)


def _store32(address: int) -> bytes:
    return b"\xc7\x05" + struct.pack("<II", address, _VALUE)


def _store64(address: int) -> bytes:
    return b"\xc7\x04\x25" + struct.pack("<II", address, _VALUE)


@dataclass(frozen=True)
class Mode:
    """A mode: state for it, its store instruction, and what the code of unclear mode leaves."""

    state: Callable[[GuestLevel], Mapping[str, int]]
    store: Callable[[int], bytes]
    rax: int
    paging: bool = True
    real: bool = False


def _registers(cr0: int, cr4: int, efer: int, cr3: int = 0) -> dict[str, int]:
    return {"cr0": cr0, "cr4": cr4, "efer": efer, "cr3": cr3}


def _segments(code: int, data: int, *, base: int = 0, limit: int = _FLAT) -> dict[str, int]:
    fields = {"cs.attrib": code, "cs.limit": limit}
    for name in _DATA_SEGMENTS:
        fields |= {f"{name}.attrib": data, f"{name}.limit": limit, f"{name}.base": base}
    return fields


def _real(l2: GuestLevel) -> Mapping[str, int]:
    fields = _segments(_CODE16, _DATA16, base=l2.scratch, limit=0xFFFF)
    return fields | _registers(_REAL_CR0, 0, _LEGACY_EFER)


def _protected(l2: GuestLevel) -> Mapping[str, int]:
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PROTECTED_CR0, 0, _LEGACY_EFER)


def _legacy_paging(l2: GuestLevel) -> Mapping[str, int]:
    """Two levels, 4 MiB pages."""
    cr3 = _table(l2, "I", {n: n << 22 | _LARGE for n in range(16)} | {ALIAS >> 22: _LARGE})
    cr4 = Cr4.of(PSE=1)
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PAGING_CR0, cr4, _LEGACY_EFER, cr3)


def _pae_paging(l2: GuestLevel) -> Mapping[str, int]:
    """Three levels, 2 MiB pages."""
    low = _table(l2, "Q", {n: n << 21 | _LARGE for n in range(32)})
    cr3 = _table(l2, "Q", {0: low | Pte.P, ALIAS >> 30: low | Pte.P})
    cr4 = Cr4.of(PAE=1)
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PAGING_CR0, cr4, _LEGACY_EFER, cr3)


def _compatibility(l2: GuestLevel) -> Mapping[str, int]:
    return _segments(_CODE32, DATA_ATTRIB) | _long(l2)


def _long_mode(l2: GuestLevel) -> Mapping[str, int]:
    return _segments(CODE64_ATTRIB, DATA_ATTRIB) | _long(l2)


def _long(l2: GuestLevel) -> dict[str, int]:
    for at in range(0, 4 * LARGE_PAGE, LARGE_PAGE):
        l2.tables.map(ALIAS + at, at, size=LARGE_PAGE)
    return _registers(_PAGING_CR0, Cr4.of(PAE=1), _LONG_EFER, l2.tables.root)


_LARGE = int(Pte.P | Pte.W | Pte.U | Pte.A | Pte.D | Pte.PS)


def _table(l2: GuestLevel, entry: str, entries: Mapping[int, int]) -> int:
    machine = l2.cpu.machine
    at = machine.pages.take(PAGE)
    size = struct.calcsize(f"<{entry}")
    for index, value in entries.items():
        machine.memory.write(Gpa(at + index * size), struct.pack(f"<{entry}", int(value)))
    return int(at)


MODES: Final = {
    "real": Mode(_real, _store16, 0xFFFF, paging=False, real=True),
    "protected": Mode(_protected, _store32, 0xFFFF_FFFF, paging=False),
    "legacy_paging": Mode(_legacy_paging, _store32, 0xFFFF_FFFF),
    "pae_paging": Mode(_pae_paging, _store32, 0xFFFF_FFFF),
    "compatibility": Mode(_compatibility, _store32, 0xFFFF_FFFF),
    "long": Mode(_long_mode, _store64, 0),
}
_PAGING_32 = ("legacy_paging", "pae_paging", "compatibility")
NPT: Final = (True, False)


@scenario(needs=[nested_svm], axes={"mode": tuple(MODES), "npt": NPT}, levels=2)
def test_l2_runs_in_every_mode(context: Context, mode: str, npt: bool) -> None:
    """L2 executes, translates and exits in the mode that the VMCB describes."""
    how = MODES[mode]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={"rax": 0})
    state = how.state(l2)
    address = 0x10 if how.real else l2.scratch + 0x10
    code = _WHICH_MODE + how.store(address + (ALIAS if how.paging else 0)) + _VMMCALL
    at = l2.instance.put_code(code)
    l2.vmcb.update(state)
    l2.vmcb.update({"cs.base": at, "rip": 0} if how.real else {"rip": at})
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    context.expect("RAX", exit_.vmcb["rax"], how.rax, hex)
    start = 0 if how.real else at
    context.expect("RIP", exit_.vmcb["rip"], start + len(code) - len(_VMMCALL), hex)
    seen = machine.memory.read_int(Gpa(l2.scratch + 0x10), 4)
    context.expect("what L2 stored", seen, _VALUE, hex)
    for name in ("cr0", "cr3", "cr4", "efer", "cs.attrib"):
        context.expect(f"{name} after #VMEXIT", exit_.vmcb[name], int(state[name]), hex)
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm], axes={"mode": _PAGING_32, "npt": NPT}, levels=2)
def test_32_bit_page_fault_exits(context: Context, mode: str, npt: bool) -> None:
    """An intercepted #PF of 32-bit L2 has its error code and address."""
    how = MODES[mode]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={f"intercept.excp.{PF}": 1})
    l2.vmcb.update(how.state(l2))
    at = l2.instance.put_code(how.store(UNMAPPED) + _VMMCALL)
    l2.vmcb["rip"] = at
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    context.expect("EXITINFO1", exit_.exit_info_1, Pte.W, hex)
    context.expect("EXITINFO2", exit_.exit_info_2, UNMAPPED, hex)
    context.expect("RIP", exit_.vmcb["rip"], at, hex)
