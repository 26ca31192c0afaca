"""The local APIC as proxies use it: enabling it, EOI, interrupts between vCPUs.

APM vol. 2, 16.3 Local APIC, 16.9 Processor Interrupt Priority, 16.11 x2APIC. An ICR of 64 bits is
split for xAPIC; in x2APIC mode it is one MSR.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from harness.proxy.layout import Eoi
from harness.proxy.level import Level
from harness.proxy.ops import Op
from harness.proxy.program import store, wrmsr
from harness.svm.msrs import Msr

APIC_BASE: Final = 0xFEE0_0000
SPURIOUS: Final = 0x0F0
EOI: Final = 0x0B0
TPR: Final = 0x080
ICR_LOW: Final = 0x300
ICR_HIGH: Final = 0x310
_SOFTWARE_ENABLE = 0x1FF
_X2APIC_FIRST = 0x800
_BASE_ENABLED = 1 << 11
_BASE_X2APIC = 1 << 10
_ASSERT = 1 << 14


class Delivery(IntEnum):
    """Delivery modes of the ICR."""

    FIXED = 0
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6


class Apic:
    """A level's way to its local APIC; the level uses it from then on for EOI."""

    def __init__(self, level: Level, *, x2apic: bool = False) -> None:
        self.level = level
        self.x2apic = x2apic
        level.instance.set_eoi(Eoi.X2APIC if x2apic else Eoi.XAPIC)

    def enable(self) -> None:
        """Enable the APIC by software, in the wanted mode.

        Raises GuestFault: the vCPU has no such mode.
        """
        if self.x2apic:
            base = self.level.rdmsr(Msr.MSR_IA32_APICBASE)
            self.level.wrmsr(Msr.MSR_IA32_APICBASE, base | _BASE_ENABLED | _BASE_X2APIC)
        self.level.run(self.write(SPURIOUS, _SOFTWARE_ENABLE))[0].regs  # noqa: B018

    def write(self, register: int, value: int) -> Op:
        """Return the operation that writes a register, named by its xAPIC offset."""
        if self.x2apic:
            return wrmsr(_X2APIC_FIRST + (register >> 4), value)
        return store(APIC_BASE + register, value, 4)

    def ipi(self, apic_id: int, vector: int, delivery: Delivery = Delivery.FIXED) -> list[Op]:
        """Return the operations that send an interrupt to a vCPU."""
        low = _ASSERT | delivery << 8 | vector
        if self.x2apic:
            return [wrmsr(_X2APIC_FIRST + (ICR_LOW >> 4), apic_id << 32 | low)]
        return [self.write(ICR_HIGH, apic_id << 24), self.write(ICR_LOW, low)]
