"""Facts about what KVM offers an L1 in CPUID: features that guests may use."""

from __future__ import annotations

from harness.facts import Fact, HostView, kvm_device
from harness.machine.cpuid import find_leaf
from harness.svm.cpuid import Leaf, StructuredFeaturesEcx, SvmFeaturesEdx
from kvm_ioctl.handles import Kvm


def _offered(host: HostView, feature: str) -> Fact:
    """Look for a bit of EDX in KVM_GET_SUPPORTED_CPUID."""
    device = kvm_device(host)
    if not device.holds:
        return device
    with Kvm() as kvm:
        leaf = find_leaf(kvm.supported_cpuid(), Leaf.SVM)
    edx = SvmFeaturesEdx(0 if leaf is None else leaf.edx)
    holds = bool(getattr(edx, feature))
    mend = "" if holds else "a CPU and a kernel that offer it"
    return Fact(holds, f"KVM_GET_SUPPORTED_CPUID 8000_000A EDX={edx}", mend)


def vgif_for_l1(host: HostView) -> Fact:
    """Guests may use virtual GIF."""
    return _offered(host, "VGIF")


def vnmi_for_l1(host: HostView) -> Fact:
    """Guests may use virtual NMIs."""
    return _offered(host, "VNMI")


def lbrv_for_l1(host: HostView) -> Fact:
    """Guests may use LBR virtualization."""
    return _offered(host, "LBRV")


def shadow_stacks_for_l1(host: HostView) -> Fact:
    """Guests may use shadow stacks, whose MSRs the VMCB has."""
    device = kvm_device(host)
    if not device.holds:
        return device
    with Kvm() as kvm:
        leaf = find_leaf(kvm.supported_cpuid(), Leaf.STRUCTURED_FEATURES)
    ecx = StructuredFeaturesEcx(0 if leaf is None else leaf.ecx)
    mend = "" if ecx.SHSTK else "a CPU and a kernel that offer it"
    return Fact(bool(ecx.SHSTK), f"KVM_GET_SUPPORTED_CPUID 0000_0007 ECX={ecx}", mend)
