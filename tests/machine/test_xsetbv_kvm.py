"""XSAVE for guests: whether KVM knows what they do with it, and how it is hidden."""

import pytest

from harness.machine.cpuid import find_leaf
from harness.machine.xsetbv import has_xsave, hide_xsave
from harness.svm.cpuid import FeaturesEcx, Leaf
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm


def entry(function, **registers):
    return kvm_cpuid_entry2(function=function, **registers)


def test_hiding_takes_all_that_needs_xsave_and_nothing_else():
    entries = [
        entry(1, ecx=0xFFFF_FFFF, edx=0x1234),
        entry(7, ebx=0xFFFF_FFFF, ecx=0xFFFF_FFFF),
        entry(0xD, eax=7, ebx=832),
        entry(0x8000_0001, ecx=4),
    ]
    hide_xsave(entries)
    features = FeaturesEcx(entries[0].ecx)
    assert not any((features.XSAVE, features.OSXSAVE, features.AVX, features.FMA, features.F16C))
    assert entries[0].ecx | 0x3C00_1000 == 0xFFFF_FFFF
    assert entries[0].edx == 0x1234
    assert entries[1].ebx == 0xFFFF_FFFF & ~(1 << 5)
    assert (entries[2].eax, entries[2].ebx) == (0, 0)
    assert entries[3].ecx == 4


@pytest.mark.kvm
def test_without_xsave_in_cpuid_there_is_none(monkeypatch):
    with Kvm() as kvm:
        supported = [e.copy() for e in kvm.supported_cpuid()]
        find_leaf(supported, Leaf.FEATURES).ecx &= ~(1 << 26)
        monkeypatch.setattr(Kvm, "supported_cpuid", lambda self: supported)
        assert not has_xsave(kvm)


@pytest.mark.kvm
def test_the_answer_is_what_the_guest_and_kvm_agree_on(monkeypatch):
    with Kvm() as kvm:
        if not find_leaf(kvm.supported_cpuid(), Leaf.FEATURES).ecx >> 26 & 1:
            pytest.skip("this KVM offers no XSAVE")
        assert has_xsave(kvm)
        # A guest that sets something else than KVM is asked for: 1 in place of 3.
        from harness.machine import xsetbv

        other = xsetbv._CODE.replace(bytes.fromhex("b803000000"), bytes.fromhex("b801000000"))
        monkeypatch.setattr(xsetbv, "_CODE", other)
        assert not has_xsave(kvm)
