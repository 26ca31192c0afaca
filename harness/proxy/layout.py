"""What a proxy and Python share: the layout of an instance, ports, structs.

An instance is what one vCPU has at one level: mailbox, tables, stacks, in 64 KiB that are aligned
to as much, so that a handler finds its instance from any address in it. The guest's C header is
generated from here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from harness.proxy.ops import ARGUMENT_REGISTERS
from kvm_ioctl.cstruct import CStruct, field_names, u8, u16, u32, u64

PROXY_PORT: Final = 0x5F4
"""An OUT of 4 bytes here, instance | `Report`, speaks to Python. No level intercepts it."""

INSTANCE_SIZE: Final = 0x1_0000
IDT_OFFSET: Final = 0x1000
STUBS_OFFSET: Final = 0x2000
TABLES_OFFSET: Final = 0x3000
"""The GDT, then the TSS at TSS_OFFSET."""
TSS_OFFSET: Final = 0x3100
PROGRAM_OFFSET: Final = 0x4000
RESULTS_OFFSET: Final = 0x5000
STACK_TOP: Final = 0x7000
TRAP_STACK_TOP: Final = 0x7800
"""Of IST 1: exceptions and interrupts."""
NMI_STACK_TOP: Final = 0x7C00
"""Of IST 2."""
USER_STACK_TOP: Final = 0x8000
SMM_ENTRY: Final = 0x8000
"""In SMRAM, where the handler starts; elsewhere the page for EXEC."""
CODE_OFFSET: Final = 0x8000
CODE_SIZE: Final = 0x1000
SCRATCH_OFFSET: Final = 0x9000
SCRATCH_SIZE: Final = 0x6000
"""For scenarios; ends below SMRAM's state save area."""

OPS_PER_PAGE: Final = 64
MAX_LOOP_DEPTH: Final = 6
RETURN_VECTOR: Final = 0x81
"""INT of this vector ends code at CPL 3."""

INSTANCE_MAGIC: Final = 0x7978_6F72_506D_5653

GDT_CS64: Final = 0x08
GDT_DS: Final = 0x10
GDT_CS32: Final = 0x18
GDT_USER_DS: Final = 0x23
GDT_USER_CS64: Final = 0x2B
GDT_USER_CS32: Final = 0x33
GDT_TSS: Final = 0x38
GDT_CS16: Final = 0x48
GDT_DS16: Final = 0x50

TRAP_IST: Final = 1
NMI_IST: Final = 2


class Report(IntEnum):
    """Why a proxy speaks up."""

    START = 1
    """It was entered at its beginning."""
    DONE = 2
    """A program is done."""
    IDLE = 3
    """It was resumed and finds no new program."""
    CRASH = 4
    """An exception outside any operation."""


class Eoi(IntEnum):
    """How a handler tells the local APIC."""

    NONE = 0
    XAPIC = 1
    X2APIC = 2


class proxy_op(CStruct):
    """One operation of a program."""

    _fields_ = (
        ("opcode", u16),
        ("flags", u16),
        ("length", u32),
        ("args", u64 * len(ARGUMENT_REGISTERS)),
    )


class proxy_result(CStruct):
    """What came of it. Of a fault, `values` are error code, CR2, RIP, CS, RFLAGS, RSP."""

    _fields_ = (
        ("status", u32),
        ("vector", u32),
        ("values", u64 * len(ARGUMENT_REGISTERS)),
    )


class proxy_gprs(CStruct):
    """General registers, all but RSP."""

    _fields_ = tuple(
        (name, u64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
            *(f"r{n}" for n in range(8, 16)),
        )
    )


class proxy_fault(CStruct):
    """The last exception that abandoned an operation, or crashed the proxy."""

    _fields_ = (
        ("vector", u64),
        ("error", u64),
        ("cr2", u64),
        ("rip", u64),
        ("cs", u64),
        ("rflags", u64),
        ("rsp", u64),
    )


class proxy_instance(CStruct):
    """The first page of an instance."""

    _fields_ = (
        ("magic", u64),
        ("self", u64),
        ("vcpu", u32),
        ("level", u32),
        ("request", u64),
        ("done", u64),
        ("program", u64),
        ("results", u64),
        ("count", u32),
        ("current", u32),
        ("landing_rsp", u64),
        ("landing_status", u64),
        ("in_op", u32),
        ("eoi", u32),
        ("cr3", u64),
        ("cr4", u64),
        ("efer", u64),
        ("cr0", u64),
        ("regs", proxy_gprs),
        ("fault", proxy_fault),
        ("log_count", u32),
        ("reserved", u32),
        ("log", u8 * 64),
        ("policy", u8 * 256),
        ("vectors", u32 * 256),
    )


VMCB_REGISTERS: Final = ("rax", "rsp")
"""Registers of a guest that its VMCB holds; `proxy_gprs` has the others."""


def header_constants() -> dict[str, int]:
    """Return the numbers of this module by the name that they have in C."""
    names = (
        *("PROXY_PORT", "INSTANCE_SIZE", "IDT_OFFSET", "STUBS_OFFSET", "TABLES_OFFSET"),
        *("TSS_OFFSET", "STACK_TOP", "USER_STACK_TOP", "SMM_ENTRY", "RETURN_VECTOR"),
        *("INSTANCE_MAGIC", "GDT_CS64", "GDT_DS", "GDT_USER_DS", "GDT_USER_CS64", "GDT_TSS"),
        *("TRAP_IST", "NMI_IST"),
    )
    numbers = {
        name if name.startswith(("PROXY", "INSTANCE")) else f"PROXY_{name}": globals()[name]
        for name in names
    }
    for field in (
        "landing_rsp",
        "landing_status",
        "in_op",
        "regs",
        "cr3",
        "cr4",
        "efer",
        "cr0",
        "vectors",
    ):
        numbers[f"INSTANCE_{field.upper()}"] = getattr(proxy_instance, field).offset
    for field in field_names(proxy_gprs):
        numbers[f"GPRS_{field.upper()}"] = getattr(proxy_gprs, field).offset
    return numbers
