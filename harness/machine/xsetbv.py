"""Whether KVM gets to know what a guest writes to XCR0.

KVM intercepts XSETBV (init_vmcb) and sets the guest's XCR0 at every entry
(kvm_load_guest_xsave_state). Emulated silicon may execute XSETBV in the guest without the
#VMEXIT (QEMU 7.2's translate.c asks for no intercept there): KVM then takes the write back at the
next entry, and whatever the guest has in AVX registers is lost to it.
"""

from __future__ import annotations

from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.console import GuestExit
from harness.machine.cpuid import find_leaf
from harness.machine.loader import EntryMode, raw_image
from harness.machine.machine import Machine
from harness.svm.cpuid import FeaturesEcx, Leaf, StructuredFeaturesEbx, StructuredFeaturesEcx
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm

_CODE: Final = bytes.fromhex(
    "0f20e0"  # mov rax, cr4
    "0d00000400"  # or eax, CR4.OSXSAVE
    "0f22e0"  # mov cr4, rax
    "31c9 31d2"  # xor ecx, ecx; xor edx, edx
    "b803000000"  # mov eax, x87 and SSE
    "0f01d1"  # xsetbv
    "e6f4"  # out DEBUG_EXIT_PORT, al
)
_CODE_GPA: Final = Gpa(0x1_0000)
_X87_AND_SSE: Final = 3
_TIMEOUT_S: Final = 10.0


def has_xsave(kvm: Kvm) -> bool:
    """Tell whether KVM offers XSAVE, and knows what its guests do with it."""
    entry = find_leaf(kvm.supported_cpuid(), Leaf.FEATURES)
    if entry is None or not FeaturesEcx(entry.ecx).XSAVE:
        return False
    image = raw_image(_CODE, _CODE_GPA, EntryMode.LONG64)
    with Machine(kvm, image=image, memory_mib=1) as machine:
        end = machine.vcpus[0].run(_TIMEOUT_S)
        known: int = machine.vcpus[0].vcpu.get_xcrs().xcrs[0].value
    return isinstance(end, GuestExit) and known == _X87_AND_SSE


def hide_xsave(entries: list[kvm_cpuid_entry2]) -> None:
    """Take XSAVE, and all that comes with it, out of a guest's CPUID."""
    for entry in entries:
        if entry.function == Leaf.FEATURES:
            hidden = FeaturesEcx.of(XSAVE=1, OSXSAVE=1, AVX=1, F16C=1, FMA=1)
            entry.ecx &= ~hidden
        elif entry.function == Leaf.STRUCTURED_FEATURES and entry.index == 0:
            entry.ebx &= ~StructuredFeaturesEbx.of(AVX2=1)
            entry.ecx &= ~StructuredFeaturesEcx.of(PKU=1, OSPKE=1, VAES=1, VPCLMULQDQ=1)
        elif entry.function == Leaf.XSTATE:
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
