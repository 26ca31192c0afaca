"""What a kernel offers, asked once: states are taken and put again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm

CAPABILITIES: Final = (
    Cap.KVM_CAP_NESTED_STATE,
    Cap.KVM_CAP_X86_SMM,
    Cap.KVM_CAP_XSAVE2,
    Cap.KVM_CAP_SREGS2,
    Cap.KVM_CAP_XCRS,
    Cap.KVM_CAP_EXCEPTION_PAYLOAD,
    Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    Cap.KVM_CAP_TSC_CONTROL,
    Cap.KVM_CAP_VCPU_ATTRIBUTES,
)
"""Those that decide what of a machine can be given and taken."""


@dataclass(frozen=True)
class Offers:
    """The answers of one /dev/kvm, which stay as they are for as long as it is open."""

    capabilities: Mapping[Cap, int]
    """What KVM_CHECK_EXTENSION says of each of `CAPABILITIES`; 0 is no."""
    msr_indices: tuple[int, ...]
    """The MSRs that hold state, by this kernel's own list (KVM_GET_MSR_INDEX_LIST)."""

    def has(self, cap: Cap) -> bool:
        """Tell whether the kernel has one of `CAPABILITIES`."""
        return self.capabilities[cap] != 0


_KNOWN: Final[WeakKeyDictionary[Kvm, Offers]] = WeakKeyDictionary()


def offers(kvm: Kvm) -> Offers:
    """Return what this kernel offers."""
    found = _KNOWN.get(kvm)
    if found is None:
        capabilities = {cap: kvm.check_extension(cap) for cap in CAPABILITIES}
        found = _KNOWN[kvm] = Offers(capabilities, tuple(kvm.msr_index_list()))
    return found
