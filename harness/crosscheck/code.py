"""The bytes that a bench's guest finds in memory: tables, handlers, and one snippet an instruction.

There is no program. The host points RIP at a snippet; it ends in a report, an OUT that it repeats
for ever. Handlers of exceptions report their vector, then idle. APM vol. 2, 4.8 Long-Mode Segment
Descriptors, 5.3 Long-Mode Page Translation, 8.9 Long-Mode Interrupt Control Transfers, 10.3 SMM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from harness.model import layout
from harness.model.operations import Instruction
from harness.svm.smram import DEFAULT_SMBASE

REPORT_PORT: Final = 0xE0
"""The instruction before was executed."""
VECTOR_PORT: Final = 0x80
"""Port of the report of vector 0."""
VECTORS: Final = 32

_DONE_VECTOR: Final = 0x81
"""INT of it ends a snippet at CPL 3."""
_HANDLER_BYTES: Final = 32

OPCODES: Final[dict[Instruction, bytes]] = {
    Instruction.NOP: b"\x90",
    Instruction.CPUID: b"\x0f\xa2",
    Instruction.RDMSR: b"\x0f\x32",
    Instruction.WRMSR: b"\x0f\x30",
    Instruction.VMRUN: b"\x0f\x01\xd8",
    Instruction.VMMCALL: b"\x0f\x01\xd9",
    Instruction.VMLOAD: b"\x0f\x01\xda",
    Instruction.VMSAVE: b"\x0f\x01\xdb",
    Instruction.STGI: b"\x0f\x01\xdc",
    Instruction.CLGI: b"\x0f\x01\xdd",
    Instruction.HLT: b"\xf4",
    Instruction.RSM: b"\x0f\xaa",
    Instruction.UD2: b"\x0f\x0b",
}
"""The same bytes in 64-bit and in 16-bit code."""

_INDEX: Final = {instruction: index for index, instruction in enumerate(Instruction)}
_LAST: Final = len(_INDEX)

ENTER_USER: Final = layout.SNIPPETS_GPA + _LAST * layout.SNIPPET_BYTES
"""An IRETQ; the host writes its frame."""
_USER_OFFSET: Final = 0x400
"""From a snippet at CPL 0 to that at CPL 3."""
USER_FRAME: Final = layout.STACK_TOP - 0x100
"""Where IRETQ's frame lies: RSP at `ENTER_USER`."""
_USER_STACK_TOP: Final = layout.STACK_TOP - 0x200

# SMM: real mode, CS.base is SMBASE.

_IVT_OFFSET: Final = 0x1000
_IDTR_OFFSET: Final = 0x1800
_SMM_HANDLERS: Final = 0x2000
_SMM_SNIPPETS: Final = 0x9000
SMM_STACK_TOP: Final = 0x7000
"""SS.base is 0 in SMM."""


def snippet(instruction: Instruction, *, user: bool = False) -> int:
    """Return the RIP of an instruction in 64-bit code."""
    place = layout.snippet_gpa(instruction)
    return place + _USER_OFFSET if user else place


def smm_snippet(instruction: Instruction) -> int:
    """Return the RIP of an instruction in SMM, entered by an SMI."""
    return _SMM_SNIPPETS + _INDEX[instruction] * layout.SNIPPET_BYTES


SMM_IDLE: Final = _SMM_SNIPPETS + _LAST * layout.SNIPPET_BYTES
"""RIP of the idle loop in SMM, entered by an SMI."""


def user_frame(instruction: Instruction) -> bytes:
    """Return what IRETQ pops to reach an instruction at CPL 3."""
    rip = snippet(instruction, user=True)
    return struct.pack(
        "<5Q", rip, layout.USER_CS, layout.RFLAGS_ON, _USER_STACK_TOP, layout.USER_DS
    )


def base_memory() -> Iterator[tuple[int, bytes]]:
    """Yield what lies where in `layout.BASE`: gpa, bytes."""
    yield layout.GDT_GPA, _gdt()
    yield from _page_tables(layout.PML4_GPA, layout.PDPT_GPA, layout.PD_GPA)
    yield from _page_tables(layout.NESTED_PML4_GPA, layout.NESTED_PDPT_GPA, layout.NESTED_PD_GPA)
    yield from _high_nested_tables()
    yield layout.IDT_GPA, b"".join(_gate(vector) for vector in range(VECTORS))
    yield layout.IDT_GPA + 16 * _DONE_VECTOR, _gate(_DONE_VECTOR, dpl=3)
    yield layout.TSS_GPA, struct.pack("<IQ", 0, layout.EXCEPTION_STACK_TOP) + bytes(0x5C)
    for vector in (*range(VECTORS), _DONE_VECTOR):
        yield _handler_at(vector), _handler(vector)
    for instruction, opcode in OPCODES.items():
        yield snippet(instruction), opcode + _REPORT_FOREVER
        yield snippet(instruction, user=True), opcode + bytes((0xCD, _DONE_VECTOR))
    yield ENTER_USER, b"\x48\xcf"
    yield layout.IDLE_L1, _REPORT_FOREVER
    yield layout.IDLE_L2, _REPORT_FOREVER
    yield layout.RESET_CODE_GPA, _REPORT_FOREVER


def _page_tables(pml4: int, pdpt: int, pd: int) -> Iterator[tuple[int, bytes]]:
    """Yield tables that map the first GiB to itself."""
    yield pml4, struct.pack("<Q", pdpt | _PRESENT_WRITE_USER)
    yield pdpt, struct.pack("<Q", pd | _PRESENT_WRITE_USER)
    pages = (index << 21 | _LARGE_PAGE | _PRESENT_WRITE_USER for index in range(512))
    yield pd, b"".join(struct.pack("<Q", page) for page in pages)


def _high_nested_tables() -> Iterator[tuple[int, bytes]]:
    """Yield what gives the last page below 4 GiB memory, for L2 with nested paging."""
    page = layout.RESET_CODE_GPA & ~0xFFF
    tables = (layout.NESTED_PDPT_GPA, layout.NESTED_HIGH_PD_GPA, layout.NESTED_HIGH_PT_GPA, page)
    for shift, (table, leads_to) in zip((30, 21, 12), pairwise(tables), strict=True):
        index = layout.RESET_VECTOR >> shift & 511
        yield table + 8 * index, struct.pack("<Q", leads_to | _PRESENT_WRITE_USER)


def smram_memory() -> Iterator[tuple[int, bytes]]:
    """Yield what lies where in SMRAM: offset from SMBASE, bytes."""
    ivt = [struct.pack("<HH", _smm_handler_at(v), DEFAULT_SMBASE >> 4) for v in range(VECTORS)]
    yield _IVT_OFFSET, b"".join(ivt)
    limit, base = 4 * VECTORS - 1, DEFAULT_SMBASE + _IVT_OFFSET
    yield _IDTR_OFFSET, struct.pack("<HI", limit, base)
    # KVM gives SMM an IDT limit of 0: without this an exception would be a shutdown.
    load_idt = b"\x2e\x66\x0f\x01\x1e" + struct.pack("<H", _IDTR_OFFSET)
    yield layout.SMM_ENTRY_GPA - DEFAULT_SMBASE, load_idt + _REPORT_FOREVER
    for vector in range(VECTORS):
        jump = _near_jump(_smm_handler_at(vector) + 2, SMM_IDLE)
        yield _smm_handler_at(vector), _out(VECTOR_PORT + vector) + jump
    for instruction, opcode in OPCODES.items():
        yield smm_snippet(instruction), opcode + _REPORT_FOREVER
    yield SMM_IDLE, _REPORT_FOREVER


def _out(port: int) -> bytes:
    return bytes((0xE6, port))


_REPORT_FOREVER: Final = _out(REPORT_PORT) + b"\xeb\xfc"

_PRESENT_WRITE_USER: Final = 7
_LARGE_PAGE: Final = 0x80


def _gdt() -> bytes:
    code, data = layout.CODE_ATTRIB, layout.DATA_ATTRIB
    tss = _descriptor(layout.TSS_GPA, 0x67, int(layout.TSS_ATTRIB))
    entries = {
        layout.KERNEL_CS: _descriptor(0, 0xF_FFFF, int(code)),
        layout.KERNEL_DS: _descriptor(0, 0xF_FFFF, int(data)),
        layout.USER_DS & ~7: _descriptor(0, 0xF_FFFF, int(data.replace(DPL=3))),
        layout.USER_CS & ~7: _descriptor(0, 0xF_FFFF, int(code.replace(DPL=3))),
        layout.TSS_SELECTOR: tss,
    }
    table = bytearray(layout.GDT_LIMIT + 1)
    for selector, entry in entries.items():
        table[selector : selector + 8] = struct.pack("<Q", entry)
    return bytes(table)


def _descriptor(base: int, limit: int, attrib: int) -> int:
    """Return 8 bytes of a descriptor; `attrib` as in `SegAttrib`."""
    value = limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | (attrib & 0xFF) << 40
    return value | (limit >> 16) << 48 | (attrib >> 8) << 52 | (base >> 24) << 56


def _handler_at(vector: int) -> int:
    index = VECTORS if vector == _DONE_VECTOR else vector
    return layout.HANDLERS_GPA + index * _HANDLER_BYTES


def _gate(vector: int, dpl: int = 0) -> bytes:
    target = _handler_at(vector)
    kind = 0x8E | dpl << 5
    return struct.pack("<HHBBHII", target & 0xFFFF, layout.KERNEL_CS, 0, kind, target >> 16, 0, 0)


def _handler(vector: int) -> bytes:
    port = REPORT_PORT if vector == _DONE_VECTOR else VECTOR_PORT + vector
    # From CPL 3 the CPU comes with SS null, and IRETQ nulled DS and ES: as they were, please.
    reload = b"\x50\xb8" + struct.pack("<I", layout.KERNEL_DS)
    reload += b"\x8e\xd0\x8e\xd8\x8e\xc0\x58"
    start = _handler_at(vector) + len(reload) + 2
    return reload + _out(port) + _near_jump_64(start, layout.IDLE_L1)


def _near_jump_64(at: int, target: int) -> bytes:
    return b"\xe9" + struct.pack("<i", target - at - 5)


def _smm_handler_at(vector: int) -> int:
    return _SMM_HANDLERS + vector * layout.SNIPPET_BYTES


def _near_jump(at: int, target: int) -> bytes:
    """Return a 16-bit near jump."""
    return b"\xe9" + struct.pack("<h", target - at - 3)
