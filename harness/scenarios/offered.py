"""Facts about what KVM offers an L1 in CPUID 8000_000A: SVM features that guests may use."""

from __future__ import annotations

from harness.facts import Fact, HostView, kvm_device
from harness.machine.cpuid import find_leaf
from harness.svm.cpuid import Leaf, SvmFeaturesEdx
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
