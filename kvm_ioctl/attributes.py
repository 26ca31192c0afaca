"""Device attributes: the same three requests on devices, VMs, vCPUs and KVM itself."""

from __future__ import annotations

import ctypes
import errno
from typing import TypeVar

from kvm_ioctl.linux_kvm import kvm_device_attr
from kvm_ioctl.request import Fd, Ioctl, KvmError

F = TypeVar("F", bound=Fd)


def has_attr(fd: F, request: Ioctl[F, kvm_device_attr], group: int, attr: int) -> bool:
    """Tell whether the attribute exists; raises KvmError for anything but yes and no (ENXIO)."""
    error = fd.try_call(request, kvm_device_attr(group=group, attr=attr))
    if error not in (0, errno.ENXIO):
        raise KvmError(error, request.name, fd.kind, f"group {group}, attribute {attr}")
    return error == 0


def get_attr(
    fd: F, request: Ioctl[F, kvm_device_attr], group: int, attr: int, size_bytes: int
) -> bytes:
    """Return the value of an attribute that has so many bytes."""
    value = ctypes.create_string_buffer(size_bytes)
    fd.call(request, kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(value)))
    return value.raw


def set_attr(
    fd: F, request: Ioctl[F, kvm_device_attr], group: int, attr: int, value: bytes
) -> None:
    """Set an attribute to these bytes."""
    copy = ctypes.create_string_buffer(value, len(value))
    fd.call(request, kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(copy)))
