"""A virtual machine, its devices and its guest_memfds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from kvm_ioctl.accessors import action, getter, setter
from kvm_ioctl.attributes import get_attr, has_attr, set_attr
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import u64
from kvm_ioctl.linux_kvm import (
    kvm_clear_dirty_log,
    kvm_coalesced_mmio_zone,
    kvm_create_device,
    kvm_create_guest_memfd,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_pit_config,
    kvm_userspace_memory_region,
)
from kvm_ioctl.request import DeviceFd, Fd, VmFd
from kvm_ioctl.requests import DeviceRequests, VmRequests
from kvm_ioctl.stats import StatsFd
from kvm_ioctl.vcpu import Vcpu

if TYPE_CHECKING:
    from kvm_ioctl.system import Kvm

_BITMAP_ALIGN_PAGES = 64


class GuestMemfd(Fd):
    """Guest memory in a file of its own (KVM_CREATE_GUEST_MEMFD)."""

    kind = "guest_memfd"

    def __init__(self, fd: int, size_bytes: int) -> None:
        super().__init__(fd)
        self.size_bytes = size_bytes


class Device(DeviceRequests, DeviceFd):
    """An in-kernel device (KVM_CREATE_DEVICE)."""

    def has_attr(self, group: int, attr: int) -> bool:
        """Tell whether the device has the attribute."""
        return has_attr(self, self.KVM_HAS_DEVICE_ATTR, group, attr)

    def get_attr(self, group: int, attr: int, size_bytes: int) -> bytes:
        """Return the value of an attribute that has so many bytes."""
        return get_attr(self, self.KVM_GET_DEVICE_ATTR, group, attr, size_bytes)

    def set_attr(self, group: int, attr: int, value: bytes) -> None:
        """Set an attribute to these bytes."""
        set_attr(self, self.KVM_SET_DEVICE_ATTR, group, attr, value)


def slot_id(slot: int, as_id: int) -> int:
    """Return the kernel's slot number: the address space is in the upper half."""
    return as_id << 16 | slot


class Vm(VmRequests, VmFd):
    """A VM; closing it closes the vCPUs, devices and statistics made from it.

    ``Vm.KVM_CREATE_VCPU`` is the request; ``call``, ``try_call`` and ``get`` issue any of them.
    The methods are for those that want more than forwarding.
    """

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self.kvm = kvm

    def check_extension(self, cap: int) -> int:
        """Return what this VM says about the capability; 0 is no."""
        return self.call(self.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, flags: int = 0, args: Sequence[int] = ()) -> None:
        """Enable a capability of this VM."""
        self.call(self.KVM_ENABLE_CAP, kvm_enable_cap(cap=cap, flags=flags, args=tuple(args)))

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Make a vCPU and map what it shares with KVM."""
        mmap_size_bytes = self.kvm.vcpu_mmap_size
        fd = self.call(self.KVM_CREATE_VCPU, vcpu_id)
        return self._adopt(Vcpu(self, fd, vcpu_id, mmap_size_bytes))

    def create_device(self, device_type: int, flags: int = 0) -> Device:
        """Make an in-kernel device (KVM_DEV_TYPE_*)."""
        request = kvm_create_device(type=device_type, flags=flags)
        self.call(self.KVM_CREATE_DEVICE, request)
        return self._adopt(Device(request.fd))

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> GuestMemfd:
        """Make a guest_memfd; it outlives neither this VM nor its own ``close()``."""
        request = kvm_create_guest_memfd(size=size_bytes, flags=flags)
        return self._adopt(GuestMemfd(self.call(self.KVM_CREATE_GUEST_MEMFD, request), size_bytes))

    def stats(self) -> StatsFd:
        """Open the binary statistics of this VM; closed with it."""
        return self._adopt(StatsFd(self.call(self.KVM_GET_STATS_FD)))

    # Memory

    def set_user_memory_region(
        self, slot: int, gpa: int, hva: int, size: int, flags: int = 0, as_id: int = 0
    ) -> None:
        """Map ``size`` bytes of this process at ``hva`` into the guest at ``gpa``.

        The caller keeps the memory mapped for as long as the slot is there. Address space 1 is
        what a vCPU sees in SMM (KVM_CAP_MULTI_ADDRESS_SPACE).
        """
        region = kvm_userspace_memory_region(
            slot=slot_id(slot, as_id),
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
        )
        self.call(self.KVM_SET_USER_MEMORY_REGION, region)

    def delete_memory_region(self, slot: int, as_id: int = 0) -> None:
        """Take the slot away from the guest."""
        self.set_user_memory_region(slot, 0, 0, 0, as_id=as_id)

    def get_dirty_log(self, slot: int, npages: int, as_id: int = 0) -> bytearray:
        """Return the dirty bitmap of a slot of so many pages; page 0 is bit 0 of byte 0.

        Without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 this also clears the log.
        """
        bitmap = bytearray(dirty_bitmap_bytes(npages))
        view = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        log = kvm_dirty_log(slot=slot_id(slot, as_id), dirty_bitmap=ctypes.addressof(view))
        self.call(self.KVM_GET_DIRTY_LOG, log)
        return bitmap

    def clear_dirty_log(
        self, slot: int, bitmap: bytes | bytearray, npages: int, first_page: int = 0, as_id: int = 0
    ) -> None:
        """Clear the pages set in the bitmap, whose bit 0 is ``first_page`` (a multiple of 64).

        Raises ValueError if the bitmap has fewer bits than there are pages.
        """
        if len(bitmap) < -(-npages // 8):
            raise ValueError(f"a bitmap of {len(bitmap)} bytes is too short for {npages} pages")
        padded = bytes(bitmap).ljust(dirty_bitmap_bytes(npages), b"\0")
        copy = ctypes.create_string_buffer(padded, len(padded))
        log = kvm_clear_dirty_log(
            slot=slot_id(slot, as_id),
            num_pages=npages,
            first_page=first_page,
            dirty_bitmap=ctypes.addressof(copy),
        )
        self.call(self.KVM_CLEAR_DIRTY_LOG, log)

    def enable_dirty_ring(self, size_bytes: int) -> None:
        """Log dirty pages in a ring of this size per vCPU; to be called before there is a vCPU."""
        acq_rel = self.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
        cap = Cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL if acq_rel else Cap.KVM_CAP_DIRTY_LOG_RING
        self.enable_cap(cap, args=(size_bytes,))

    reset_dirty_rings = action(VmRequests.KVM_RESET_DIRTY_RINGS)

    @cached_property
    def has_coalesced_ring(self) -> bool:
        """Whether the vCPUs map a ring of coalesced writes (KVM_CAP_COALESCED_MMIO)."""
        return bool(self.check_extension(Cap.KVM_CAP_COALESCED_MMIO))

    def register_coalesced_pio(self, port: int, size: int) -> None:
        """Collect writes to ports in the coalesced ring instead of exiting for each."""
        zone = kvm_coalesced_mmio_zone(addr=port, size=size, pio=1)
        self.call(self.KVM_REGISTER_COALESCED_MMIO, zone)

    def register_coalesced_mmio(self, gpa: int, size: int) -> None:
        """Collect writes to memory in the coalesced ring instead of exiting for each."""
        zone = kvm_coalesced_mmio_zone(addr=gpa, size=size, pio=0)
        self.call(self.KVM_REGISTER_COALESCED_MMIO, zone)

    # Platform devices

    create_irqchip = action(VmRequests.KVM_CREATE_IRQCHIP)
    set_irqchip = setter(VmRequests.KVM_SET_IRQCHIP)
    set_tss_addr = setter(VmRequests.KVM_SET_TSS_ADDR)
    get_pit2 = getter(VmRequests.KVM_GET_PIT2)
    set_pit2 = setter(VmRequests.KVM_SET_PIT2)
    get_clock = getter(VmRequests.KVM_GET_CLOCK)
    set_clock = setter(VmRequests.KVM_SET_CLOCK)

    def create_pit2(self, flags: int = 0) -> None:
        """Make the 8254 timer; needs the irqchip."""
        self.call(self.KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """Return one interrupt controller of the irqchip (KVM_IRQCHIP_*)."""
        chip = kvm_irqchip(chip_id=chip_id)
        self.call(self.KVM_GET_IRQCHIP, chip)
        return chip

    def set_identity_map_addr(self, gpa: int) -> None:
        """Choose where VMX keeps its identity map; before the first vCPU."""
        self.call(self.KVM_SET_IDENTITY_MAP_ADDR, u64(gpa))

    def irq_line(self, gsi: int, level: int) -> None:
        """Set the level of an interrupt line."""
        self.call(self.KVM_IRQ_LINE, kvm_irq_level(irq=gsi, level=level))

    def set_gsi_routing(self, entries: Iterable[kvm_irq_routing_entry]) -> None:
        """Replace the GSI routing table."""
        routes = list(entries)
        table = kvm_irq_routing(nr=len(routes))
        payload = kvm_irq_routing.from_bytes(bytes(table) + b"".join(map(bytes, routes)))
        self.call(self.KVM_SET_GSI_ROUTING, payload)


def dirty_bitmap_bytes(npages: int) -> int:
    """Return the bytes of a bitmap that KVM reads and writes in 64-bit words."""
    return -(-npages // _BITMAP_ALIGN_PAGES) * 8
