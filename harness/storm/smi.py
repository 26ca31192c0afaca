"""SMIs seen from outside: how they are sent, what they interrupted, and what they may change.

APM vol. 2, 10.2 SMM Resources, 10.3 Using SMM; kernel: enter_smm(), svm_enter_smm().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.machine.machine import Machine
from harness.migrate.difference import Difference, memory_differences
from harness.proxy.apic import Delivery
from harness.proxy.level import Level
from harness.proxy.machine import APIC_GPA, ProxyMachine
from harness.proxy.paging import PAGE
from harness.proxy.smm import SmmLevel
from harness.svm.msrs import Cr4, Efer, Msr
from kvm_ioctl.linux_kvm import kvm_msi

_MOST_WORDS: Final = 1 << 16
_MSI_DELIVERY_SHIFT: Final = 8

COUNTS: Final[Mapping[str, str]] = {
    rf"vcpu\d+\.msrs\.{Msr.MSR_SMI_COUNT:#x}": "MSR_SMI_COUNT counts them",
}
"""State that may differ from that of a machine without SMIs, and why; besides `EXCUSED`."""


@dataclass(frozen=True)
class Smi:
    """One SMI as its handler found it."""

    level: str
    """Name of the interrupted level, by the CR3 in the save area; empty: of none."""
    rip: int
    svm_guest: bool
    """The save area's flag: a guest of L1 was interrupted."""
    svme: bool
    """EFER.SVME in the save area."""


def interrupted_level(handler: SmmLevel) -> Level | None:
    """Return the level that the save area is of: each has page tables of its own."""
    cr3 = handler.save_area.cr3
    levels = (level for level in handler.cpu.levels() if level is not handler)
    return next((level for level in levels if level.tables.root == cr3), None)


def read_smi(handler: SmmLevel) -> Smi:
    """Return what the save area says; the vCPU is in SMM."""
    area = handler.save_area
    level = interrupted_level(handler)
    name = "" if level is None else level.name
    return Smi(name, area.rip, bool(area.svm_guest_flag), bool(Efer(area.efer).SVME))


def count_smis(machine: ProxyMachine, vcpu: int = 0) -> list[Smi]:
    """Have a vCPU's handler note every SMI from now on; return the list that it fills."""
    seen: list[Smi] = []
    machine.cpus[vcpu].smm.handler = lambda handler: seen.append(read_smi(handler))
    return seen


def send_message(machine: ProxyMachine, delivery: Delivery, vcpu: int = 0) -> None:
    """Send an SMI, NMI or INIT to a local APIC, as a device's MSI would: even while the vCPU runs.

    Raises KvmError: the machine has no irqchip.
    """
    message = kvm_msi(address_lo=APIC_GPA | vcpu << 12, data=delivery << _MSI_DELIVERY_SHIFT)
    machine.vm.call(machine.vm.KVM_SIGNAL_MSI, message)


def levels_hit(smis: Iterable[Smi]) -> dict[str, int]:
    """Return how many SMIs interrupted which level."""
    hit: dict[str, int] = {}
    for smi in smis:
        hit[smi.level] = hit.get(smi.level, 0) + 1
    return dict(sorted(hit.items()))


def set_mce(level: Level) -> None:
    """Set CR4.MCE of a level, as kernels do.

    After an SMI in L2 KVM's own CR4.MCE is L1's (svm_set_cr4(), svm_enter_smm()), and that would
    be seen wherever twins are compared.
    """
    level.write_cr(4, Cr4(level.read_cr(4)).replace(MCE=1))


def memory_outside_smm(one: Machine, other: Machine, hsave: int) -> list[Difference]:
    """Return where memory differs that an SMI has to leave alone.

    SMRAM is the handler's; the page at VM_HSAVE_PA is the CPU's, which keeps L1's state there.
    """
    own = {f"memory at {at:#x}" for at in range(hsave, hsave + PAGE, 8)} if hsave else set()
    return [
        found
        for found in memory_differences(one, other, _MOST_WORDS)
        if not found.what.endswith(" in SMRAM") and found.what not in own
    ]
