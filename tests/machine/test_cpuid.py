import pytest

from harness.errors import Unsupported
from harness.machine.cpuid import CpuidPolicy, find_leaf, has_svm
from harness.machine.errors import MachineError
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2


def supported(ecx=0x4):
    return [
        kvm_cpuid_entry2(function=0, eax=0x1F),
        kvm_cpuid_entry2(function=1, ebx=0x0102_1234),
        kvm_cpuid_entry2(function=0xB, index=0, edx=9),
        kvm_cpuid_entry2(function=0xB, index=1, edx=9),
        kvm_cpuid_entry2(function=0x8000_0001, ecx=ecx | 0x1000),
        kvm_cpuid_entry2(function=0x8000_0008, eax=0x3028),
        kvm_cpuid_entry2(function=0x8000_000A, eax=1, ebx=16, edx=0xFF),
        kvm_cpuid_entry2(function=0x8000_001E, eax=9),
    ]


def test_every_vcpu_has_its_own_apic_id():
    entries = CpuidPolicy().entries(supported(), 3, 4)
    assert find_leaf(entries, 1).ebx == 0x0304_1234
    assert [e.edx for e in entries if e.function == 0xB] == [3, 3]
    assert find_leaf(entries, 0x8000_001E).eax == 3


def test_kvms_own_list_is_left_alone():
    entries = supported()
    CpuidPolicy(svm=False, physical_address_bits=36).entries(entries, 1, 2)
    assert [e.as_bytes() for e in entries] == [e.as_bytes() for e in supported()]


def test_svm_is_as_supported_by_default():
    assert has_svm(CpuidPolicy().entries(supported(), 0, 1))
    assert not has_svm(CpuidPolicy().entries(supported(0), 0, 1))


def test_hidden_svm_leaves_nothing_behind():
    entries = CpuidPolicy(svm=False).entries(supported(), 0, 1)
    assert not has_svm(entries)
    assert find_leaf(entries, 0x8000_0001).ecx == 0
    leaf = find_leaf(entries, 0x8000_000A)
    assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0, 0)


def test_svm_that_kvm_lacks_is_unsupported_with_evidence():
    with pytest.raises(Unsupported, match=r"no SVM: 8000_0001 ECX=0x1000"):
        CpuidPolicy(svm=True).entries(supported(0), 0, 1)
    with pytest.raises(Unsupported, match="8000_0001 absent"):
        CpuidPolicy(svm=True).entries([], 0, 1)


def test_the_address_width_is_set():
    entries = CpuidPolicy(physical_address_bits=36).entries(supported(), 0, 1)
    assert find_leaf(entries, 0x8000_0008).eax == 0x3024


@pytest.mark.parametrize("width", [31, 53])
def test_an_address_width_of_no_cpu_is_refused(width):
    with pytest.raises(MachineError, match=f"{width} physical address bits"):
        CpuidPolicy(physical_address_bits=width).entries(supported(), 0, 1)


def test_an_edit_has_the_last_word():
    def edit(entries):
        find_leaf(entries, 0x8000_0001).ecx = 0xABC

    entries = CpuidPolicy(svm=False, edit=edit).entries(supported(), 0, 1)
    assert find_leaf(entries, 0x8000_0001).ecx == 0xABC
