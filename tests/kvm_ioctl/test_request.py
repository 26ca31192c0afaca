from __future__ import annotations

import ctypes
import errno
import os
import pickle

import pytest

from kvm_ioctl import request
from kvm_ioctl.asm_kvm import kvm_regs
from kvm_ioctl.request import IO, IOR, IOW, IOWR, ClosedError, KvmError, MsrRefused, VcpuFd, ioc
from kvm_ioctl.requests import VcpuRequests


class Requests:
    NOTHING = IO(VcpuFd, 0x80)
    IMMEDIATE = IO(VcpuFd, 0x84, int)
    READ = IOR(VcpuFd, 0x81, kvm_regs)
    WRITE = IOW(VcpuFd, 0x82, kvm_regs)
    BOTH = IOWR(VcpuFd, 0x83, kvm_regs)
    OTHER = IOWR(VcpuFd, 0xBA, kvm_regs, encodes=ctypes.c_ulong)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("NOTHING", 0x0000AE80),
        ("READ", 0x8090AE81),
        ("WRITE", 0x4090AE82),
        ("BOTH", 0xC090AE83),
        ("OTHER", 0xC008AEBA),
    ],
)
def test_number_and_name(name: str, number: int) -> None:
    request = vars(Requests)[name]
    assert (request.name, request.number) == (name, number)


def test_payload_that_no_number_can_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="16384"):
        ioc(1, 0, 1 << 14)


def test_error_names_request_fd_and_errno() -> None:
    error = KvmError(errno.EINVAL, "KVM_SET_SREGS", "vcpu")
    assert str(error) == "KVM_SET_SREGS on vcpu fd: EINVAL (Invalid argument)"
    assert isinstance(error, OSError)


@pytest.mark.parametrize(
    "error",
    [
        KvmError(errno.E2BIG, "KVM_GET_CPUID2", "vcpu", "why"),
        MsrRefused("KVM_GET_MSRS", "vcpu", 0xC0000080, 3, 10),
    ],
)
def test_errors_survive_pickling(error: KvmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_refused_msr_is_named() -> None:
    error = MsrRefused("KVM_GET_MSRS", "vcpu", 0xC0000080, 3, 10)
    assert str(error) == "KVM_GET_MSRS on vcpu fd: MSR 0xc0000080 refused (3 of 10 done)"


@pytest.fixture
def no_kvm() -> VcpuFd:
    """An fd that knows no KVM request."""
    return VcpuFd(os.open("/dev/null", os.O_RDWR))


def test_call_raises_and_try_call_returns_the_errno(no_kvm: VcpuFd) -> None:
    with no_kvm, pytest.raises(KvmError, match="KVM_GET_REGS on vcpu fd: ENOTTY"):
        no_kvm.call(VcpuRequests.KVM_GET_REGS, kvm_regs())
    other = VcpuFd(os.open("/dev/null", os.O_RDWR))
    with other:
        assert other.try_call(VcpuRequests.KVM_GET_REGS, kvm_regs()) == errno.ENOTTY


@pytest.mark.parametrize(
    ("payload", "arrives"),
    [(None, 0), (5, 5), (0x7FFFFFFF, 0x7FFFFFFF), (0xFFFBD000, 0xFFFBD000), (-1, (1 << 64) - 1)],
)
def test_immediates_arrive_in_the_whole_register(
    monkeypatch: pytest.MonkeyPatch, payload: int | None, arrives: int
) -> None:
    """What a C function with the arguments of ioctl(2) gets to see of one."""
    seen: list[tuple[int, int, int]] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_ulong)
    callee = kind(lambda *arguments: seen.append(arguments) or len(seen))
    address = ctypes.cast(callee, ctypes.c_void_p).value
    monkeypatch.setattr(request, "_libc_ioctl", ctypes.CFUNCTYPE(ctypes.c_int)(address))
    assert Requests.IMMEDIATE.raw(7, payload) == 1
    assert seen == [(7, 0xAE84, arrives)]


def test_close_is_idempotent_and_use_after_it_is_one_clear_error(no_kvm: VcpuFd) -> None:
    fd = no_kvm.fileno()
    no_kvm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    no_kvm.close()
    assert no_kvm.closed
    for use in (no_kvm.call, no_kvm.try_call):
        with pytest.raises(ClosedError, match="this vcpu fd is closed"):
            use(VcpuRequests.KVM_NMI)


def test_forgotten_fd_warns_and_is_closed() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.warns(ResourceWarning, match="unclosed <VcpuFd"):
        VcpuFd(fd).__del__()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
