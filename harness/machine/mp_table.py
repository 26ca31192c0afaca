"""Tables that tell a kernel without ACPI of its CPUs, I/O APIC and interrupt lines.

Intel MultiProcessor Specification 1.4, chapter 4; the kernel's asm/mpspec_def.h. Linux looks for
them in the extended BIOS data area (arch/x86/kernel/mpparse.c, default_find_smp_config).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.memory_map import EBDA_GPA

MP_TABLE_GPA: Final = EBDA_GPA
MAX_MP_VCPUS: Final = 32
"""So many that the table stays within the extended BIOS data area."""

_LAPIC_GPA, _IOAPIC_GPA = 0xFEE0_0000, 0xFEC0_0000
_APIC_VERSION, _IOAPIC_VERSION = 0x14, 0x11
_PROCESSOR, _BUS, _IOAPIC, _INTSRC, _LINTSRC = range(5)
_CPU_ENABLED, _CPU_BOOTPROCESSOR = 1, 2
_INT, _NMI, _EXTINT = 0, 1, 3
_ALL_APICS = 0xFF
_ISA_BUS = 0
_IRQ0_PIN = 2
"""As `Pc` routes it."""
_FLOATING_BYTES, _HEADER_BYTES = 16, 44


def mp_table(vcpus: int) -> bytes:
    """Return what is to be written to `MP_TABLE_GPA` for vCPUs with APIC ids from 0 up.

    Raises ValueError: more than `MAX_MP_VCPUS`.
    """
    if not 1 <= vcpus <= MAX_MP_VCPUS:
        raise ValueError(f"{vcpus} vCPUs: MP tables are made for 1 to {MAX_MP_VCPUS}")
    entries = list(_entries(vcpus))
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        *(b"PCMP", _HEADER_BYTES + len(body), 4, 0, b"NSVM    ", b"PC          "),
        *(0, 0, len(entries), _LAPIC_GPA, 0, 0, 0),
    )
    table = _with_checksum(header + body, 7)
    at = Gpa(MP_TABLE_GPA + _FLOATING_BYTES)
    floating = struct.pack("<4sIBBB5s", b"_MP_", at, 1, 4, 0, bytes(5))
    return _with_checksum(floating, 10) + table


def _entries(vcpus: int) -> Iterator[bytes]:
    for index in range(vcpus):
        flags = _CPU_ENABLED | (_CPU_BOOTPROCESSOR if index == 0 else 0)
        yield struct.pack("<BBBBII8s", _PROCESSOR, index, _APIC_VERSION, flags, 0, 0, bytes(8))
    yield struct.pack("<BB6s", _BUS, _ISA_BUS, b"ISA   ")
    ioapic_id = vcpus
    yield struct.pack("<BBBBI", _IOAPIC, ioapic_id, _IOAPIC_VERSION, 1, _IOAPIC_GPA)
    for irq in range(16):
        if irq != _IRQ0_PIN:
            yield _source(_INTSRC, _INT, irq, ioapic_id, irq or _IRQ0_PIN)
    yield _source(_LINTSRC, _EXTINT, 0, _ALL_APICS, 0)
    yield _source(_LINTSRC, _NMI, 0, _ALL_APICS, 1)


def _source(entry: int, kind: int, irq: int, destination: int, pin: int) -> bytes:
    return struct.pack("<BBHBBBB", entry, kind, 0, _ISA_BUS, irq, destination, pin)


def _with_checksum(data: bytes, at: int) -> bytes:
    """Set the byte at `at`, zero so far, so that all bytes add up to 0."""
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]
