"""KVM itself: /dev/kvm."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.attributes import get_attr, has_attr
from kvm_ioctl.linux_kvm import KVM_API_VERSION
from kvm_ioctl.lists import read_cpuid, read_msr_list
from kvm_ioctl.msrs import MsrBlocks, read_msrs
from kvm_ioctl.request import KvmError, SystemFd
from kvm_ioctl.requests import SystemRequests
from kvm_ioctl.vm import Vm

_WHY_NOT_OPEN = {
    errno.ENOENT: "there is no such file; is there a KVM module, and is it loaded?",
    errno.EACCES: "no permission; is this user in the group that owns it?",
    errno.EPERM: "no permission; is it kept from this container?",
    errno.ENODEV: "there is no KVM behind it; is a KVM module loaded?",
    errno.ENXIO: "there is no KVM behind it; is a KVM module loaded?",
}

_CREATE_VM_TRIES = 100


class KvmOpenError(OSError):
    """The KVM device cannot be opened, or is none."""

    def __init__(self, path: str, why: str, error: int = 0) -> None:
        super().__init__(error, why)
        self.path = path

    def __str__(self) -> str:
        return f"cannot use KVM at {self.path}: {self.strerror}"

    def __reduce__(self) -> tuple[type[KvmOpenError], tuple[str, str | None, int | None]]:
        return type(self), (self.path, self.strerror, self.errno)


class Kvm(SystemRequests, SystemFd):
    """An open KVM device; closing it closes the VMs made from it."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open the device; raises KvmOpenError with one line that says why not."""
        super().__init__(_open(path))
        version = -self.KVM_GET_API_VERSION.raw(self._fd, None)
        if version != -KVM_API_VERSION:
            self.close()
            why = os.strerror(version) if version > 0 else f"its API version is {-version}"
            raise KvmOpenError(path, f"this is not KVM: {why}", max(version, 0))
        self.path = path

    @property
    def api_version(self) -> int:
        """The version of the KVM API, 12 since Linux 2.6.22."""
        return self.call(self.KVM_GET_API_VERSION)

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes that a vCPU fd maps: ``kvm_run`` and the pages after it."""
        return self.call(self.KVM_GET_VCPU_MMAP_SIZE)

    def check_extension(self, cap: int) -> int:
        """Return what KVM says about the capability; 0 is no."""
        return self.call(self.KVM_CHECK_EXTENSION, cap)

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves that KVM can give a guest."""
        return read_cpuid(self, self.KVM_GET_SUPPORTED_CPUID)

    def emulated_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID features that KVM emulates without the CPU having them."""
        return read_cpuid(self, self.KVM_GET_EMULATED_CPUID)

    def supported_hv_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the Hyper-V CPUID leaves that KVM can give a guest."""
        return read_cpuid(self, self.KVM_GET_SUPPORTED_HV_CPUID)

    def msr_index_list(self) -> list[int]:
        """Return the MSRs that KVM saves and restores."""
        return read_msr_list(self, self.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """Return the MSRs that describe what KVM supports."""
        return read_msr_list(self, self.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def get_feature_msrs(
        self, indices: Iterable[int], *, skip_refused: bool = False
    ) -> dict[int, int]:
        """Return feature MSRs by index; raise MsrRefused at one that is none, or skip it."""
        return read_msrs(self, self.KVM_GET_MSRS, MsrBlocks(), indices, skip_refused)

    def has_attr(self, group: int, attr: int) -> bool:
        """Tell whether KVM has the attribute (KVM_X86_GRP_*)."""
        return has_attr(self, self.KVM_HAS_DEVICE_ATTR, group, attr)

    def get_attr(self, group: int, attr: int) -> int:
        """Return a 64-bit attribute (KVM_X86_GRP_*)."""
        value = get_attr(self, self.KVM_GET_DEVICE_ATTR, group, attr, 8)
        return int.from_bytes(value, "little")

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Make a VM of a KVM_X86_*_VM type."""
        for tries_left in reversed(range(_CREATE_VM_TRIES)):
            try:
                return self._adopt(Vm(self, self.call(self.KVM_CREATE_VM, vm_type)))
            except KvmError as e:
                # Registering the MMU notifier gives up when a signal is pending.
                if e.errno != errno.EINTR or tries_left == 0:
                    raise
        raise AssertionError("unreachable")


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        error = e.errno or 0
        raise KvmOpenError(path, _WHY_NOT_OPEN.get(error, os.strerror(error)), error) from e
