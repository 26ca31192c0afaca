"""Calls and copies in one go: what the machine code does is what the loop in Python does."""

import ctypes
import errno
import mmap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ioctl import batch
from kvm_ioctl.asm_kvm import kvm_regs, kvm_sregs
from kvm_ioctl.batch import Batch, Call, copy_pages
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.request import ClosedError, KvmError

PAGE = mmap.PAGESIZE


@pytest.fixture(params=["machine code", "Python"])
def how(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(batch, "_code", lambda: None)
    else:
        assert batch._code() is not None
    return request.param


def pages_of(*values):
    memory = mmap.mmap(-1, len(values) * PAGE)
    memory[:] = b"".join(bytes([value]) * PAGE for value in values)
    return memory


def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_pages_are_copied_and_no_others(how):
    here, there = pages_of(*range(8)), pages_of(*[255] * 8)
    copy_pages(bytes([0b100110, 0, 0, 0, 0, 0, 0, 0]), address(there), address(here))
    assert [there[page * PAGE] for page in range(8)] == [255, 1, 2, 255, 255, 5, 255, 255]
    assert [there[page * PAGE - 1] for page in range(1, 9)] == [255, 1, 2, 255, 255, 5, 255, 255]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pages=st.sets(st.integers(0, 191)))
def test_any_pages_of_many_words_are_copied(how, pages):
    here, there = pages_of(*range(192)), pages_of(*[255] * 192)
    bits = sum(1 << page for page in pages).to_bytes(24, "little")
    copy_pages(bits, address(there), address(here))
    wanted = [page if page in pages else 255 for page in range(192)]
    assert [there[page * PAGE] for page in range(192)] == wanted
    assert [there[(page + 1) * PAGE - 1] for page in range(192)] == wanted


def test_no_pages_are_no_pages(how):
    copy_pages(b"", 0, 0)
    copy_pages(bytes(16), 0, 0)


def test_bits_are_whole_words(how):
    with pytest.raises(ValueError, match="9 bytes of bits are no whole words"):
        copy_pages(bytes(9), 0, 0)


def test_what_is_copied_to_is_aligned(how):
    with pytest.raises(ValueError, match="cannot copy to 0x1008, which is no multiple of 16"):
        copy_pages(bytes(8), 0x1008, 0)


@pytest.fixture
def vcpu(kvm):
    with kvm.create_vm() as vm:
        yield vm.create_vcpu(0)


@pytest.mark.kvm
def test_all_calls_are_made_in_order(how, vcpu):
    vcpu.set_regs(kvm_regs(rax=1, rflags=2))
    first, new, second = kvm_regs(), kvm_regs(rax=7, rflags=2), kvm_regs()
    calls = Batch(
        [
            Call(vcpu, Vcpu.KVM_GET_REGS, first),
            Call(vcpu, Vcpu.KVM_SET_REGS, new),
            Call(vcpu, Vcpu.KVM_GET_REGS, second),
            Call(vcpu, Vcpu.KVM_GET_TSC_KHZ, None),
        ]
    )
    for _ in range(2):
        assert calls.run() == 4
        assert calls.result(3) == vcpu.get_tsc_khz()
        assert second.rax == 7
    assert first.rax == 7
    vcpu.set_regs(kvm_regs(rax=3, rflags=2))
    assert calls.run(first=2) == 4
    assert (first.rax, second.rax) == (7, 3)


@pytest.mark.kvm
def test_the_first_that_fails_is_the_last(how, vcpu):
    bad, sregs = kvm_regs(rflags=2), kvm_sregs()
    bad_sregs = vcpu.get_sregs()
    bad_sregs.cr0 = 1 << 31  # paging without protection
    bad_sregs.cr4 = 1 << 63
    calls = Batch(
        [
            Call(vcpu, Vcpu.KVM_SET_SREGS, bad_sregs),
            Call(vcpu, Vcpu.KVM_GET_SREGS, sregs),
        ]
    )
    assert calls.run() == 0
    assert calls.result(0) == -errno.EINVAL
    assert str(calls.error(0)) == "KVM_SET_SREGS on vcpu fd: EINVAL (Invalid argument)"
    assert sregs.as_bytes() == bytes(len(bytes(sregs)))
    with pytest.raises(KvmError, match="KVM_SET_SREGS"):
        calls.run_all()
    tolerant = Batch([Call(vcpu, Vcpu.KVM_SET_SREGS, bad_sregs, least=None)])
    assert tolerant.run() == 1
    demanding = Batch([Call(vcpu, Vcpu.KVM_GET_REGS, bad, least=1)])
    assert demanding.run() == 0


@pytest.mark.kvm
def test_closed_handles_are_not_used(how, vcpu):
    calls = Batch([Call(vcpu, Vcpu.KVM_GET_REGS, kvm_regs())])
    vcpu.close()
    with pytest.raises(ClosedError):
        calls.run()
