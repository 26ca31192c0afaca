"""The CPUID that a guest sees, made from what KVM supports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.errors import Unsupported
from harness.machine.errors import MachineError
from harness.svm.cpuid import AddressSizesEax, ExtendedFeaturesEcx, Leaf
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2

_APIC_ID_LEAVES = (Leaf.TOPOLOGY, Leaf.TOPOLOGY_V2, Leaf.EXTENDED_TOPOLOGY)


@dataclass(frozen=True)
class CpuidPolicy:
    """What to change in KVM's supported CPUID."""

    svm: bool | None = None
    """True: a guest with SVM, or Unsupported; False: hide it; None: as KVM supports it."""

    physical_address_bits: int | None = None
    """MAXPHYADDR of the guest."""

    edit: Callable[[list[kvm_cpuid_entry2]], None] | None = None
    """A last word: changes the finished list in place, per vCPU."""

    def entries(
        self, supported: Iterable[kvm_cpuid_entry2], index: int, vcpus: int
    ) -> list[kvm_cpuid_entry2]:
        """Return the CPUID of vCPU `index` out of `vcpus`.

        Raises Unsupported: SVM is asked for and KVM has none.
        Raises MachineError: an address width that no CPU has.
        """
        entries = [entry.copy() for entry in supported]
        _set_apic_id(entries, index, vcpus)
        if self.svm is not None:
            _require_svm(entries) if self.svm else _hide_svm(entries)
        if self.physical_address_bits is not None:
            _set_address_bits(entries, self.physical_address_bits)
        if self.edit is not None:
            self.edit(entries)
        return entries


def find_leaf(entries: Iterable[kvm_cpuid_entry2], leaf: int) -> kvm_cpuid_entry2 | None:
    """Return the first entry of a CPUID function, if it is there."""
    return next((entry for entry in entries if entry.function == leaf), None)


def has_svm(entries: Iterable[kvm_cpuid_entry2]) -> bool:
    """Tell whether a CPUID list offers SVM (8000_0001 ECX[2])."""
    entry = find_leaf(entries, Leaf.EXTENDED_FEATURES)
    return entry is not None and bool(ExtendedFeaturesEcx(entry.ecx).SVM)


def _require_svm(entries: list[kvm_cpuid_entry2]) -> None:
    if not has_svm(entries):
        entry = find_leaf(entries, Leaf.EXTENDED_FEATURES)
        seen = "absent" if entry is None else f"ECX={entry.ecx:#x}"
        raise Unsupported(f"KVM_GET_SUPPORTED_CPUID has no SVM: 8000_0001 {seen}")


def _hide_svm(entries: list[kvm_cpuid_entry2]) -> None:
    if (entry := find_leaf(entries, Leaf.EXTENDED_FEATURES)) is not None:
        entry.ecx = ExtendedFeaturesEcx(entry.ecx).replace(SVM=0, SKINIT=0)
    if (entry := find_leaf(entries, Leaf.SVM)) is not None:
        entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def _set_address_bits(entries: list[kvm_cpuid_entry2], width: int) -> None:
    if not 32 <= width <= 52:
        raise MachineError(f"{width} physical address bits: 32 to 52 is possible")
    if (entry := find_leaf(entries, Leaf.ADDRESS_SIZES)) is None:
        raise MachineError("KVM's CPUID has no leaf 8000_0008 to put address bits in")
    entry.eax = AddressSizesEax(entry.eax).replace(PHYSICAL=width)


def _set_apic_id(entries: list[kvm_cpuid_entry2], index: int, vcpus: int) -> None:
    for entry in entries:
        if entry.function == Leaf.FEATURES:
            low = entry.ebx & 0xFFFF
            entry.ebx = (index & 0xFF) << 24 | min(vcpus, 255) << 16 | low
        elif entry.function in _APIC_ID_LEAVES:
            entry.edx = index
        elif entry.function == Leaf.EXTENDED_APIC_ID:
            entry.eax = index
