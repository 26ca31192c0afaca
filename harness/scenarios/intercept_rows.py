"""Instructions that a host can intercept: one table for taken and untaken intercepts.

APM vol. 2, 15.9 Instruction Intercepts, appendix B (intercept bits), appendix C (exit codes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.instance import PROXY_CR4
from harness.proxy.layout import GDT_TSS, TABLES_OFFSET
from harness.proxy.level import Level
from harness.proxy.ops import Op, instruction
from harness.proxy.program import UD
from harness.svm.cpuid import (
    AddressSizesEbx,
    ExtendedFeaturesEcx,
    Leaf,
    StructuredFeaturesEbx,
)
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept

SCRATCH: Final = -1
"""In place of a register's value: the address of the level's scratch memory, a whole page."""

RFLAGS_ONE: Final = 1 << 1
"""The bit of RFLAGS that is always set."""

_OSXSAVE = {"cr4": PROXY_CR4.replace(OSXSAVE=1)}

_IRET_TO_NEXT = bytes.fromhex("4889e0 8cd1 51 50 9c 8cc9 51 488d0d03000000 51 48cf")
"""mov %rsp, %rax; mov %ss, %ecx; push %rcx; push %rax; pushf; mov %cs, %ecx; push %rcx;
lea 1f(%rip), %rcx; push %rcx; iretq; 1:"""

_IRET_FRAME_BYTES = 40
_INVPCID_ALL = 2
"""The type that invalidates all PCIDs; it looks at no field of the descriptor."""
_DESCRIPTOR_TYPE_OFFSET = 5
_AVAILABLE_TSS64 = 0x89


@dataclass(frozen=True)
class Row:
    """One instruction, its intercept, and what it does if nobody intercepts it."""

    name: str
    intercept: int
    """Bit number, as `Intercept`; the kernel has no name for some."""
    exit_code: int
    code: bytes
    offset: int
    """Where in the code the intercepted instruction starts."""
    length: int
    """Its bytes."""
    registers: Mapping[str, int] = field(default_factory=dict)
    fault: int | None = None
    """The exception that it raises when it is not intercepted."""
    as_in_l1: bool = False
    """Not intercepted it does what it does in L1: some CPUs have it, others raise an exception."""
    offered: Callable[[Level], bool] = lambda _: True
    """Whether CPUID offers it to a level; elsewhere its #UD may go before the intercept."""
    prepare: Callable[[Level], None] = lambda _: None
    """What is done once before it is executed."""
    pops: int = 0
    """What the host adds to RSP when it skips the instruction, in bytes."""
    vmcb: Mapping[str, int] = field(default_factory=dict)
    """What the VMCB needs for it, other than the intercept."""

    def op(self, level: Level) -> Op:
        """Return the operation that executes the code at a level; RBX is scratch memory."""
        self.prepare(level)
        values = {"rbx": SCRATCH} | dict(self.registers)
        registers = {k: level.scratch if v == SCRATCH else v for k, v in values.items()}
        return level.exec_op(self.code, user=False, **registers)


def address_of(op: Op) -> int:
    """Return where the code of an `exec_op` lies."""
    return op.args[-1]


def set_intercept(guest: GuestLevel, number: int, on: bool = True) -> None:
    """Set an intercept bit by its number, those without a name in the kernel included.

    The guest is left for its host if it is current, so that the bit counts from now on.
    """
    guest.configure({})
    block = guest.vmcb.read()
    word, mask = number // 32, 1 << number % 32
    old = block.control.intercepts[word]
    block.control.intercepts[word] = old | mask if on else old & ~mask
    guest.vmcb.write(block)


def _row(
    name: str,
    intercept: int,
    exit_code: int,
    *,
    before: str = "",
    offset: int = 0,
    length: int | None = None,
    fault: int | None = None,
    pops: int = 0,
    as_in_l1: bool = False,
    offered: Callable[[Level], bool] = lambda _: True,
    prepare: Callable[[Level], None] = lambda _: None,
    vmcb: Mapping[str, int] | None = None,
    **registers: int,
) -> Row:
    """Make a row from lines of the proxy's instruction table; `before` is executed first."""
    ahead = b"".join(instruction(part).code for part in before.split())
    code = instruction(name).code
    return Row(
        name=name.lower(),
        intercept=intercept,
        exit_code=exit_code,
        code=ahead + code,
        offset=len(ahead) + offset,
        length=len(code) - offset if length is None else length,
        registers=registers,
        fault=fault,
        pops=pops,
        as_in_l1=as_in_l1,
        offered=offered,
        prepare=prepare,
        vmcb=vmcb or {},
    )


def _make_tss_available(level: Level) -> None:
    """Clear the busy bit of the TSS descriptor: LTR wants it clear."""
    at = Gpa(level.instance.gpa + TABLES_OFFSET + GDT_TSS + _DESCRIPTOR_TYPE_OFFSET)
    level.cpu.machine.memory.write_int(at, 1, _AVAILABLE_TSS64)


def _has_skinit(level: Level) -> bool:
    ecx = level.cpuid(Leaf.EXTENDED_FEATURES)["rcx"]
    return bool(ExtendedFeaturesEcx(ecx).SKINIT)


def _has_rdpru(level: Level) -> bool:
    return bool(AddressSizesEbx(level.cpuid(Leaf.ADDRESS_SIZES)["rbx"]).RDPRU)


def _has_invpcid(level: Level) -> bool:
    return bool(StructuredFeaturesEbx(level.cpuid(Leaf.STRUCTURED_FEATURES)["rbx"]).INVPCID)


def _control_registers() -> Iterator[Row]:
    for n in (0, 2, 3, 4, 8):
        yield _row(f"READ_CR{n}", n, ExitCode.SVM_EXIT_READ_CR0 + n)
        yield _row(f"WRITE_CR{n}", 16 + n, ExitCode.SVM_EXIT_WRITE_CR0 + n, before=f"READ_CR{n}")


def _debug_registers() -> Iterator[Row]:
    for n in range(8):
        read, write = Intercept.INTERCEPT_DR0_READ + n, Intercept.INTERCEPT_DR0_WRITE + n
        yield _row(f"READ_DR{n}", read, ExitCode.SVM_EXIT_READ_DR0 + n)
        yield _row(f"WRITE_DR{n}", write, ExitCode.SVM_EXIT_WRITE_DR0 + n, before=f"READ_DR{n}")


def _instructions() -> Iterator[Row]:
    bit, code = Intercept, ExitCode
    yield _row("SIDT", bit.INTERCEPT_STORE_IDTR, code.SVM_EXIT_IDTR_READ)
    yield _row("SGDT", bit.INTERCEPT_STORE_GDTR, code.SVM_EXIT_GDTR_READ)
    yield _row("SLDT", bit.INTERCEPT_STORE_LDTR, code.SVM_EXIT_LDTR_READ)
    yield _row("STR", bit.INTERCEPT_STORE_TR, code.SVM_EXIT_TR_READ)
    yield _row("LIDT", bit.INTERCEPT_LOAD_IDTR, code.SVM_EXIT_IDTR_WRITE, before="SIDT")
    yield _row("LGDT", bit.INTERCEPT_LOAD_GDTR, code.SVM_EXIT_GDTR_WRITE, before="SGDT")
    yield _row("LLDT", bit.INTERCEPT_LOAD_LDTR, code.SVM_EXIT_LDTR_WRITE)
    load_tr = bit.INTERCEPT_LOAD_TR
    yield _row("LTR", load_tr, code.SVM_EXIT_TR_WRITE, prepare=_make_tss_available, rax=GDT_TSS)
    yield _row("RDTSC", bit.INTERCEPT_RDTSC, code.SVM_EXIT_RDTSC)
    yield _row("RDPMC", bit.INTERCEPT_RDPMC, code.SVM_EXIT_RDPMC, as_in_l1=True)
    yield _row("PUSHF", bit.INTERCEPT_PUSHF, code.SVM_EXIT_PUSHF, length=1, pops=-8)
    yield _row("POPF", bit.INTERCEPT_POPF, code.SVM_EXIT_POPF, offset=1, pops=8, rax=RFLAGS_ONE)
    yield _row("CPUID", bit.INTERCEPT_CPUID, code.SVM_EXIT_CPUID)
    yield _row("RSM", bit.INTERCEPT_RSM, code.SVM_EXIT_RSM, fault=UD)
    yield Row(
        "iret",
        bit.INTERCEPT_IRET,
        code.SVM_EXIT_IRET,
        _IRET_TO_NEXT,
        offset=len(_IRET_TO_NEXT) - 2,
        length=2,
        pops=_IRET_FRAME_BYTES,
    )
    yield _row("INT80", bit.INTERCEPT_INTn, code.SVM_EXIT_SWINT)
    yield _row("INVD", bit.INTERCEPT_INVD, code.SVM_EXIT_INVD)
    yield _row("PAUSE", bit.INTERCEPT_PAUSE, code.SVM_EXIT_PAUSE)
    yield _row("INVLPG", bit.INTERCEPT_INVLPG, code.SVM_EXIT_INVLPG)
    yield _row("INVLPGA", bit.INTERCEPT_INVLPGA, code.SVM_EXIT_INVLPGA)
    yield _row("VMLOAD", bit.INTERCEPT_VMLOAD, code.SVM_EXIT_VMLOAD, before="VMSAVE", rax=SCRATCH)
    yield _row("VMSAVE", bit.INTERCEPT_VMSAVE, code.SVM_EXIT_VMSAVE, rax=SCRATCH)
    yield _row("STGI", bit.INTERCEPT_STGI, code.SVM_EXIT_STGI)
    yield _row("CLGI", bit.INTERCEPT_CLGI, code.SVM_EXIT_CLGI)
    yield _row("SKINIT", bit.INTERCEPT_SKINIT, code.SVM_EXIT_SKINIT, fault=UD, offered=_has_skinit)
    yield _row("RDTSCP", bit.INTERCEPT_RDTSCP, code.SVM_EXIT_RDTSCP)
    yield _row("WBINVD", bit.INTERCEPT_WBINVD, code.SVM_EXIT_WBINVD)
    yield _row("WBNOINVD", bit.INTERCEPT_WBINVD, code.SVM_EXIT_WBINVD)
    yield _row("MONITOR", bit.INTERCEPT_MONITOR, code.SVM_EXIT_MONITOR, as_in_l1=True, rax=SCRATCH)
    yield _row("MWAIT", bit.INTERCEPT_MWAIT, code.SVM_EXIT_MWAIT, as_in_l1=True)
    rdpru, invpcid = bit.INTERCEPT_RDPRU, bit.INTERCEPT_INVPCID
    yield _row("RDPRU", rdpru, code.SVM_EXIT_RDPRU, as_in_l1=True, offered=_has_rdpru)
    yield _row(
        "INVPCID",
        invpcid,
        code.SVM_EXIT_INVPCID,
        as_in_l1=True,
        offered=_has_invpcid,
        rax=_INVPCID_ALL,
    )
    yield _row("XSETBV", bit.INTERCEPT_XSETBV, code.SVM_EXIT_XSETBV, rax=1, vmcb=_OSXSAVE)


ROWS: Final = tuple((*_control_registers(), *_debug_registers(), *_instructions()))
BY_NAME: Final = {row.name: row for row in ROWS}
