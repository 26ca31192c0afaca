"""Requests whose payload ends in a list: sizing it, and taking it apart."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

from kvm_ioctl.asm_kvm import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_list
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.request import Fd, Ioctl, KvmError

F = TypeVar("F", bound=Fd)
S = TypeVar("S", bound=CStruct)

_MOST_ENTRIES = 1 << 16
_USUAL_LEAVES = 128

_UNWRITTEN = bytes(kvm_cpuid_entry2(*[0xFFFFFFFF] * 7))
"""A CPUID entry that KVM has not written: there is no such leaf. KVM insists on zero padding."""


def _grown(fd: F, request: Ioctl[F, S], make: Callable[[int], S], entries: int) -> S:
    """Issue the request with room for more and more entries until it does not answer E2BIG."""
    while True:
        payload = make(entries)
        try:
            fd.call(request, payload)
        except KvmError as e:
            if e.errno != errno.E2BIG or entries >= _MOST_ENTRIES:
                raise
            entries *= 2
        else:
            return payload


def read_cpuid(fd: F, request: Ioctl[F, kvm_cpuid2]) -> list[kvm_cpuid_entry2]:
    """Return the CPUID leaves that the request gives."""
    leaves, size = read_cpuid_bytes(fd, request), len(_UNWRITTEN)
    return [
        kvm_cpuid_entry2.from_bytes(leaves[at : at + size]) for at in range(0, len(leaves), size)
    ]


def read_cpuid_bytes(fd: F, request: Ioctl[F, kvm_cpuid2]) -> bytes:
    """Return the CPUID leaves that the request gives as they lie in memory."""
    return _written(_grown(fd, request, _unwritten_cpuid, _USUAL_LEAVES).as_bytes())


class CpuidBuffer:
    """The payload of such a request, to be used again and again."""

    def __init__(self) -> None:
        self._blank = _unwritten_cpuid(_USUAL_LEAVES).as_bytes()
        buffer = bytearray(self._blank)
        self.payload: kvm_cpuid2 = kvm_cpuid2.over(buffer)
        self._view = memoryview(buffer)

    def clear(self) -> None:
        """Make it as it was; to be done before each request."""
        self._view[:] = self._blank

    def leaves(self) -> bytes:
        """Return the leaves that a request has put there, as they lie in memory."""
        return _written(bytes(self._view))


def _written(payload: bytes) -> bytes:
    # KVM_GET_CPUID2 on Linux 5.10 leaves nent as it was given (kvm_vcpu_ioctl_get_cpuid2).
    return payload[ctypes.sizeof(kvm_cpuid2) :].partition(_UNWRITTEN)[0]


def _unwritten_cpuid(entries: int) -> kvm_cpuid2:
    return cpuid_from_bytes(_UNWRITTEN * entries)


def read_msr_list(fd: F, request: Ioctl[F, kvm_msr_list]) -> list[int]:
    """Return the MSR indices that the request gives."""
    return list(_grown(fd, request, kvm_msr_list.with_tail, 256).indices)


def new_cpuid(entries: Iterable[kvm_cpuid_entry2]) -> kvm_cpuid2:
    """Make the payload for KVM_SET_CPUID2."""
    return cpuid_from_bytes(b"".join(map(bytes, entries)))


def cpuid_from_bytes(leaves: bytes) -> kvm_cpuid2:
    """Make the payload for KVM_SET_CPUID2 of leaves as they lie in memory."""
    nent = len(leaves) // ctypes.sizeof(kvm_cpuid_entry2)
    return kvm_cpuid2.from_bytes(bytes(kvm_cpuid2(nent=nent)) + leaves)
