"""A virtual CPU."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from kvm_ioctl.accessors import action, getter, setter
from kvm_ioctl.asm_kvm import (
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    kvm_cpuid_entry2,
    kvm_nested_state,
    kvm_xsave,
)
from kvm_ioctl.attributes import get_attr, has_attr, set_attr
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import u64
from kvm_ioctl.exit_codes import ExitReason
from kvm_ioctl.exits import Exit, Interrupted, decode, decode_memory_fault
from kvm_ioctl.kvm_run import kvm_run
from kvm_ioctl.linux_kvm import (
    kvm_enable_cap,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_one_reg,
    kvm_signal_mask,
    kvm_translation,
)
from kvm_ioctl.lists import new_cpuid, read_cpuid
from kvm_ioctl.msrs import MsrBlocks, read_msrs, write_msrs
from kvm_ioctl.request import ClosedError, KvmError, VcpuFd
from kvm_ioctl.requests import VcpuRequests
from kvm_ioctl.rings import CoalescedRing, DirtyRing, unmap
from kvm_ioctl.stats import StatsFd

if TYPE_CHECKING:
    from kvm_ioctl.vm import Vm

_KERNEL_SIGSET_BYTES = 8
_KVM_RUN = VcpuRequests.KVM_RUN
_EHWPOISON = 133  # asm-generic/errno.h; the errno module lacks it before Python 3.14


class Vcpu(VcpuRequests, VcpuFd):
    """A vCPU: its fd, and the ``kvm_run`` page that it shares with KVM.

    ``Vcpu.KVM_GET_REGS`` is the request; ``call``, ``try_call`` and ``get`` issue any of them.
    The methods are for those that want more than forwarding.
    """

    def __init__(self, vm: Vm, fd: int, vcpu_id: int, mmap_size_bytes: int) -> None:
        super().__init__(fd)
        self.vm = vm
        self.id = vcpu_id
        self._dirty_ring: DirtyRing | None = None
        self._coalesced_ring: CoalescedRing | None = None
        self._read_blocks, self._write_blocks = MsrBlocks(), MsrBlocks()
        self._run: kvm_run | None = None
        try:
            self._mapping = mmap.mmap(fd, mmap_size_bytes)
            self._run = kvm_run.over(self._mapping)
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> kvm_run:
        """The shared page; raises ClosedError after ``close()``."""
        if self._run is None:
            raise ClosedError("this vcpu fd is closed")
        return self._run

    def close(self) -> None:
        """Close the fd and unmap what was mapped from it; a second call does nothing."""
        if self._run is not None:
            self._run = self._coalesced_ring = None
            unmap(self._mapping)
        if self._dirty_ring is not None:
            self._dirty_ring.close()
            self._dirty_ring = None
        super().close()

    # Running

    def enter(self) -> Exit:
        """Issue KVM_RUN once and say why it came back.

        A signal, or ``run.immediate_exit``, gives ``Interrupted``. Raises KvmError for every errno
        but EINTR, and those that KVM explains with KVM_EXIT_MEMORY_FAULT.
        """
        run = self._run
        if run is None:
            raise ClosedError("this vcpu fd is closed")
        # Not fcntl.ioctl, which is a little cheaper: newer Pythons repeat it after EINTR, and then
        # neither a signal nor immediate_exit gets a looping guest out.
        result = _KVM_RUN.raw(self._fd, None)
        if result >= 0:
            return decode(run)
        if result == -errno.EINTR:
            return Interrupted()
        return self._explain(run, -result)

    def _explain(self, run: kvm_run, error: int) -> Exit:
        annotated = error in (errno.EFAULT, _EHWPOISON)
        if not annotated or run.exit_reason != ExitReason.KVM_EXIT_MEMORY_FAULT:
            raise KvmError(error, "KVM_RUN", self.kind)
        fault = decode_memory_fault(run, error)
        # A later EFAULT without explanation must not find this one.
        run.exit_reason = ExitReason.KVM_EXIT_UNKNOWN
        return fault

    def complete_io(self, data: bytes) -> None:
        """Answer the pending KVM_EXIT_IO of direction IN; the next KVM_RUN hands it to the guest.

        Raises ValueError unless there are as many bytes as the guest reads.
        """
        io = self.run.io
        if len(data) != io.size * io.count:
            raise ValueError(f"the guest reads {io.size * io.count} bytes, got {len(data)}")
        ctypes.memmove(ctypes.addressof(self.run) + io.data_offset, data, len(data))

    def complete_mmio(self, data: bytes) -> None:
        """Answer the pending KVM_EXIT_MMIO that reads; the next KVM_RUN hands it to the guest.

        Raises ValueError unless there are as many bytes as the guest reads.
        """
        mmio = self.run.mmio
        if len(data) != mmio.len:
            raise ValueError(f"the guest reads {mmio.len} bytes, got {len(data)}")
        mmio.data[: len(data)] = data

    # Whole structs

    get_regs = getter(VcpuRequests.KVM_GET_REGS)
    set_regs = setter(VcpuRequests.KVM_SET_REGS)
    get_sregs = getter(VcpuRequests.KVM_GET_SREGS)
    set_sregs = setter(VcpuRequests.KVM_SET_SREGS)
    get_sregs2 = getter(VcpuRequests.KVM_GET_SREGS2)
    set_sregs2 = setter(VcpuRequests.KVM_SET_SREGS2)
    get_fpu = getter(VcpuRequests.KVM_GET_FPU)
    set_fpu = setter(VcpuRequests.KVM_SET_FPU)
    get_lapic = getter(VcpuRequests.KVM_GET_LAPIC)
    set_lapic = setter(VcpuRequests.KVM_SET_LAPIC)
    get_mp_state = getter(VcpuRequests.KVM_GET_MP_STATE)
    set_mp_state = setter(VcpuRequests.KVM_SET_MP_STATE)
    get_vcpu_events = getter(VcpuRequests.KVM_GET_VCPU_EVENTS)
    set_vcpu_events = setter(VcpuRequests.KVM_SET_VCPU_EVENTS)
    get_debugregs = getter(VcpuRequests.KVM_GET_DEBUGREGS)
    set_debugregs = setter(VcpuRequests.KVM_SET_DEBUGREGS)
    get_xcrs = getter(VcpuRequests.KVM_GET_XCRS)
    set_xcrs = setter(VcpuRequests.KVM_SET_XCRS)
    set_nested_state = setter(VcpuRequests.KVM_SET_NESTED_STATE)
    get_tsc_khz = action(VcpuRequests.KVM_GET_TSC_KHZ)
    set_tsc_khz = setter(VcpuRequests.KVM_SET_TSC_KHZ)
    smi = action(VcpuRequests.KVM_SMI)
    nmi = action(VcpuRequests.KVM_NMI)
    kvmclock_ctrl = action(VcpuRequests.KVM_KVMCLOCK_CTRL)

    # State of variable size

    def get_msrs(self, indices: Iterable[int], *, skip_refused: bool = False) -> dict[int, int]:
        """Return the values by index; raise MsrRefused at one that KVM refuses, or skip it."""
        return read_msrs(self, self.KVM_GET_MSRS, self._read_blocks, indices, skip_refused)

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """Set the MSRs in order; return how many were taken before KVM refused one.

        Raises OverflowError for what is no MSR's index, or not its value.
        """
        return write_msrs(self, self.KVM_SET_MSRS, self._write_blocks, values)

    def get_cpuid2(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves of this vCPU."""
        return read_cpuid(self, self.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """Give this vCPU its CPUID leaves."""
        self.call(self.KVM_SET_CPUID2, new_cpuid(entries))

    def get_nested_state(self) -> kvm_nested_state:
        """Return the nested state, in a buffer for all of it.

        In guest mode KVM writes the whole state before it finds that a buffer is too small.
        """
        size_bytes = self.nested_state_bytes
        state: kvm_nested_state = kvm_nested_state.over(bytearray(size_bytes))
        state.size = size_bytes
        self.call(self.KVM_GET_NESTED_STATE, state)
        return state

    @cached_property
    def nested_state_bytes(self) -> int:
        """Bytes of the longest nested state: kvm_amd and kvm_intel answer with a constant, or 0."""
        least = ctypes.sizeof(kvm_nested_state) + KVM_STATE_NESTED_SVM_VMCB_SIZE
        return max(self.vm.check_extension(Cap.KVM_CAP_NESTED_STATE), least)

    def get_xsave(self) -> kvm_xsave:
        """Return the XSAVE area, as long as KVM_CAP_XSAVE2 says where there is that capability."""
        if self._xsave_bytes == 0:
            return self.get(self.KVM_GET_XSAVE)
        xsave = self._new_xsave()
        self.call(self.KVM_GET_XSAVE2, xsave)
        return xsave

    def set_xsave(self, xsave: kvm_xsave) -> None:
        """Load the XSAVE area; a shorter one than KVM reads is extended by zeroes."""
        if xsave.allocated_bytes < self._xsave_bytes:
            longer = self._new_xsave()
            ctypes.memmove(ctypes.byref(longer), ctypes.byref(xsave), xsave.allocated_bytes)
            xsave = longer
        self.call(self.KVM_SET_XSAVE, xsave)

    @cached_property
    def _xsave_bytes(self) -> int:
        """Of the XSAVE area, 0 before Linux 5.17.

        The features that it has room for are those that the process was permitted when it made its
        first vCPU (``fpstate`` permissions are locked then), so the answer holds for this one.
        """
        return self.vm.check_extension(Cap.KVM_CAP_XSAVE2)

    @property
    def xsave_buffer_bytes(self) -> int:
        """Bytes of a buffer for the XSAVE area, whole words."""
        size_bytes = max(self._xsave_bytes, ctypes.sizeof(kvm_xsave))
        return -(-size_bytes // 4) * 4

    def _new_xsave(self) -> kvm_xsave:
        return kvm_xsave.over(bytearray(self.xsave_buffer_bytes))

    def get_one_reg(self, reg_id: int) -> int:
        """Return a 64-bit register by its KVM_REG_X86 id."""
        value = u64()
        self.call(self.KVM_GET_ONE_REG, kvm_one_reg(id=reg_id, addr=ctypes.addressof(value)))
        return value.value

    def set_one_reg(self, reg_id: int, data: int) -> None:
        """Set a 64-bit register by its KVM_REG_X86 id."""
        value = u64(data)
        self.call(self.KVM_SET_ONE_REG, kvm_one_reg(id=reg_id, addr=ctypes.addressof(value)))

    def get_tsc_offset(self) -> int:
        """Return the guest TSC minus the host TSC (mod 2**64)."""
        group, attr = KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET
        return int.from_bytes(get_attr(self, self.KVM_GET_DEVICE_ATTR, group, attr, 8), "little")

    def set_tsc_offset(self, offset: int) -> None:
        """Set the guest TSC minus the host TSC (mod 2**64)."""
        value = offset.to_bytes(8, "little")
        set_attr(self, self.KVM_SET_DEVICE_ATTR, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, value)

    def has_attr(self, group: int, attr: int) -> bool:
        """Tell whether this vCPU has the attribute; none has any before Linux 5.16."""
        if not self.vm.check_extension(Cap.KVM_CAP_VCPU_ATTRIBUTES):
            return False
        return has_attr(self, self.KVM_HAS_DEVICE_ATTR, group, attr)

    # Events and settings

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt; only without in-kernel irqchip."""
        self.call(self.KVM_INTERRUPT, kvm_interrupt(irq=vector))

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Set breakpoints and single steps: KVM_GUESTDBG_* flags, and DR0 to DR7."""
        debug = kvm_guest_debug(control=control)
        for i, value in enumerate(debugreg):
            debug.arch.debugreg[i] = value
        self.call(self.KVM_SET_GUEST_DEBUG, debug)

    def set_signal_mask(self, blocked: Iterable[int]) -> None:
        """Block these signals, and no others, while in KVM_RUN."""
        mask = kvm_signal_mask.with_tail(_KERNEL_SIGSET_BYTES)
        bits = sum(1 << number - 1 for number in set(blocked))
        mask.sigset[:] = bits.to_bytes(_KERNEL_SIGSET_BYTES, "little")
        self.call(self.KVM_SET_SIGNAL_MASK, mask)

    def enable_cap(self, cap: int, flags: int = 0, args: Sequence[int] = ()) -> None:
        """Enable a capability of this vCPU."""
        self.call(self.KVM_ENABLE_CAP, kvm_enable_cap(cap=cap, flags=flags, args=tuple(args)))

    def translate(self, gva: int) -> kvm_translation:
        """Walk the guest's page tables; ``valid`` says whether there is a mapping."""
        translation = kvm_translation(linear_address=gva)
        self.call(self.KVM_TRANSLATE, translation)
        return translation

    def supported_hv_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the Hyper-V CPUID leaves that KVM can give this vCPU."""
        return read_cpuid(self, self.KVM_GET_SUPPORTED_HV_CPUID)

    # What KVM reports in files and rings

    def stats(self) -> StatsFd:
        """Open the binary statistics of this vCPU; closed with it.

        Waits until the vCPU is out of KVM_RUN (kvm_vcpu_ioctl takes its mutex); reading does not.
        """
        return self._adopt(StatsFd(self.call(self.KVM_GET_STATS_FD)))

    def map_dirty_ring(self, size_bytes: int) -> DirtyRing:
        """Map the dirty ring, of the size that the VM was given; closed with this vCPU."""
        if self._dirty_ring is None:
            self._dirty_ring = DirtyRing(self.fileno(), size_bytes)
        return self._dirty_ring

    def coalesced_ring(self) -> CoalescedRing:
        """Return the ring of coalesced writes, which is the whole VM's."""
        self.run  # noqa: B018 - raises ClosedError
        if self._coalesced_ring is None:
            page_offset = self.vm.check_extension(Cap.KVM_CAP_COALESCED_MMIO)
            self._coalesced_ring = CoalescedRing(self._mapping, page_offset)
        return self._coalesced_ring
