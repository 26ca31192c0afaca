"""The handle classes, for import from one place."""

from kvm_ioctl.request import ClosedError, Fd, KvmError, MsrRefused
from kvm_ioctl.rings import CoalescedRing, CoalescedWrite, DirtyPage, DirtyRing
from kvm_ioctl.stats import StatDescriptor, StatsError, StatsFd
from kvm_ioctl.system import Kvm, KvmOpenError
from kvm_ioctl.vcpu import Vcpu
from kvm_ioctl.vm import Device, GuestMemfd, Vm

__all__ = [
    "ClosedError",
    "CoalescedRing",
    "CoalescedWrite",
    "Device",
    "DirtyPage",
    "DirtyRing",
    "Fd",
    "GuestMemfd",
    "Kvm",
    "KvmError",
    "KvmOpenError",
    "MsrRefused",
    "StatDescriptor",
    "StatsError",
    "StatsFd",
    "Vcpu",
    "Vm",
]
