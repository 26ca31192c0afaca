"""A whole virtual machine: memory, image, vCPUs, console."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from harness.machine.addresses import Gpa
from harness.machine.console import PortBus
from harness.machine.cpuid import CpuidPolicy
from harness.machine.dirty_rings import DirtyRings, enable_dirty_rings
from harness.machine.entry import entry_regs, entry_sregs, prepare_entry, reserved_memory
from harness.machine.errors import MachineError
from harness.machine.gate import Gate
from harness.machine.loader import Image, read_image
from harness.machine.memory import SMRAM_AS_ID, GuestMemory
from harness.machine.memory_map import MemoryRange
from harness.machine.vcpu import MachineVcpu
from harness.machine.watchdog import WATCHDOG
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, Vm
from kvm_ioctl.linux_kvm import MpState, kvm_mp_state

_TSS_GPA = 0xFFFB_D000
"""Three pages that KVM on Intel needs below 4 GiB (KVM_SET_TSS_ADDR)."""


class Machine:
    """A VM with memory, an image and vCPUs that are ready to run it; use it in a `with`."""

    _huge_pages = False
    """Whether its memory is made of huge pages; which a kind of machine says of itself."""

    def __init__(
        self,
        kvm: Kvm,
        *,
        image: Image | Path | str | bytes | None = None,
        vcpus: int = 1,
        memory_mib: int = 16,
        cpuid: CpuidPolicy | None = None,
        irqchip: bool = False,
        smm: bool = False,
        advice: Sequence[int] = (),
        command_line: str = "",
        dirty_ring_bytes: int = 0,
    ) -> None:
        """Build the machine.

        Args:
            kvm: an open /dev/kvm.
            image: what the vCPUs shall run; without one they stay at reset.
            vcpus: how many; their ids are 0 and up.
            memory_mib: memory from address 0 up, in MiB.
            cpuid: changes to KVM's supported CPUID; none by default.
            irqchip: have the interrupt controllers in the kernel.
            smm: show the memory in the address space of SMM too.
            advice: `mmap.MADV_*` for the memory.
            command_line: for multiboot images.
            dirty_ring_bytes: of a ring per vCPU that dirty pages are queued in while they are
                logged, a power of two; by default there are none, and the dirty log is used.

        Raises ImageError: the image cannot be loaded.
        Raises MachineError: a size that makes no machine, or no dirty rings here.
        Raises KvmError: KVM refused something.

        """
        if vcpus < 0 or memory_mib < 1:
            raise MachineError(f"no machine has {vcpus} vCPUs and {memory_mib} MiB")
        self.kvm = kvm
        self.irqchip = irqchip
        """Whether the interrupt controllers are in the kernel."""
        self.bus = self._make_bus()
        self._gate = Gate()
        self.dirty_rings: DirtyRings | None = None
        """Where dirty pages are queued, if it was asked for."""
        self.image = image if image is None or isinstance(image, Image) else read_image(image)
        self.vcpus: list[MachineVcpu] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            WATCHDOG.install()
            stack.callback(WATCHDOG.uninstall)
            self.vm: Vm = kvm.create_vm()
            self.memory = GuestMemory(self.vm)
            self._own_vm(stack)
            self._add_memory(memory_mib << 20, smm, advice)
            self._load(command_line)
            if dirty_ring_bytes:
                enable_dirty_rings(self.vm, dirty_ring_bytes)
            self._create_vcpus(vcpus, cpuid or CpuidPolicy(), irqchip)
            self._map_dirty_rings(dirty_ring_bytes)
            self._stack = stack.pop_all()

    @property
    def console(self) -> str:
        """Everything that the guest printed on its serial port."""
        return self.bus.serial.text

    def close(self) -> None:
        """Destroy the VM and free its memory; a second call does nothing."""
        self._stack.close()

    @contextlib.contextmanager
    def paused(self, timeout_s: float = 10.0) -> Iterator[None]:
        """Hold all vCPUs back for the time of the `with`; those that run are got out of KVM_RUN.

        Their threads wait, and go on as if nothing had happened. So does every other thread that
        is about to change the guest's memory.

        Raises MachineError: a vCPU does not come out within `timeout_s` seconds.
        """
        self.pause(timeout_s)
        try:
            yield
        finally:
            self.resume()

    def pause(self, timeout_s: float = 10.0) -> None:
        """Begin what `paused` does, to be ended by `resume`: from any thread, or never.

        Raises MachineError: a vCPU does not come out within `timeout_s` seconds; all run on.
        """
        self._gate.close(self.vcpus, timeout_s)
        try:
            self.memory.lock.freeze(timeout_s)
        except BaseException:
            self._gate.open()
            raise

    def resume(self) -> None:
        """Take one `pause` back."""
        self.memory.lock.thaw()
        self._gate.open()

    def abandon(self, why: str) -> None:
        """Let the vCPUs of a paused machine never run again: who waits to run one gets an error."""
        self._gate.condemn(why)

    def take_over(self, other: Machine) -> None:
        """Become the owner of another machine's VM, in place of making one; the other has none.

        For a machine that is made without `__init__`, around a VM that came from elsewhere.
        """
        self.kvm, self.vm, self.memory = other.kvm, other.vm, other.memory
        self.vcpus, self.bus, self.irqchip = other.vcpus, other.bus, other.irqchip
        self._gate, self.dirty_rings = other._gate, other.dirty_rings
        other._stack.pop_all()
        self._stack = contextlib.ExitStack()
        self._stack.callback(WATCHDOG.uninstall)
        self._own_vm(self._stack)
        self._map_dirty_rings(0)

    def exchange(self, other: Machine) -> None:
        """Swap the VMs of two machines of the same shape: handles, memory, vCPUs.

        All that knows this machine goes on with the other's VM, which is how a machine is moved
        while it is in use. Both must be paused or not running.

        Raises MachineError: they differ in vCPUs or slots.
        """
        mine, theirs = _slot_places(self), _slot_places(other)
        if len(self.vcpus) != len(other.vcpus) or mine != theirs:
            raise MachineError("machines of different shapes cannot be exchanged")
        self.kvm, other.kvm = other.kvm, self.kvm
        self.vm, other.vm = other.vm, self.vm
        self.memory.exchange(other.memory)
        self.dirty_rings, other.dirty_rings = other.dirty_rings, self.dirty_rings
        for one, another in zip(self.vcpus, other.vcpus, strict=True):
            one.exchange(another)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What another kind of machine does differently

    def _make_bus(self) -> PortBus:
        """Return what answers to ports."""
        return PortBus()

    def _ram(self, size_bytes: int) -> list[MemoryRange]:
        """Return where memory of this size lies."""
        return [MemoryRange(Gpa(0), size_bytes)]

    def _memory_map(self) -> list[MemoryRange] | None:
        """Return what multiboot images are told of memory; None: that all of it is free."""
        return None

    def _create_devices(self, irqchip: bool) -> None:
        """Make the devices in the kernel."""
        if irqchip:
            self.vm.create_irqchip()

    def _enters(self, index: int) -> bool:
        """Tell whether a vCPU starts in the image; else it stays as KVM made it."""
        return True

    # The parts

    def _map_dirty_rings(self, size_bytes: int) -> None:
        if size_bytes:
            handles = [runner.vcpu for runner in self.vcpus]
            self.dirty_rings = DirtyRings(self.vm, handles, size_bytes)
        for runner in self.vcpus:
            # By way of `self`: `exchange` gives this machine others.
            runner.on_ring_full = self._answer_full_ring

    def _answer_full_ring(self) -> None:
        if self.dirty_rings is None:
            raise MachineError("KVM reports a full dirty ring, and the machine has none")
        self.dirty_rings.answer_full()

    def _own_vm(self, stack: contextlib.ExitStack) -> None:
        """Close the VM, and then its memory, which it uses until its end.

        Both by way of `self`: `exchange` gives this machine others.
        """
        stack.callback(lambda: self.memory.close())
        stack.callback(lambda: self.vm.close())

    def _add_memory(self, size_bytes: int, smm: bool, advice: Sequence[int]) -> None:
        self._set_tss_addr()
        for ram in self._ram(size_bytes):
            slot = self.memory.add(ram.gpa, ram.size_bytes, advice=advice, huge=self._huge_pages)
            if smm:
                self.memory.alias(slot, as_id=SMRAM_AS_ID)

    def _set_tss_addr(self) -> None:
        if self.vm.check_extension(Cap.KVM_CAP_SET_TSS_ADDR):
            self.vm.set_tss_addr(_TSS_GPA)

    def _load(self, command_line: str) -> None:
        if self.image is not None:
            self.image.place(self.memory, reserved_memory(self.image.mode))
            prepare_entry(self.memory, self.image, command_line, self._memory_map())

    def _create_vcpus(self, count: int, cpuid: CpuidPolicy, irqchip: bool) -> None:
        self._create_devices(irqchip)
        supported = self.kvm.supported_cpuid()
        for index in range(count):
            vcpu = self.vm.create_vcpu(index)
            # Before SREGS: newer kernels check EFER there against CPUID.
            vcpu.set_cpuid2(cpuid.entries(supported, index, count))
            if self.image is not None and self._enters(index):
                vcpu.set_sregs(entry_sregs(vcpu.get_sregs(), self.image.mode))
                vcpu.set_regs(entry_regs(self.image, index))
                if irqchip:
                    # With a local APIC in the kernel all but vCPU 0 wait for a SIPI.
                    vcpu.set_mp_state(kvm_mp_state(mp_state=MpState.KVM_MP_STATE_RUNNABLE))
            self.vcpus.append(MachineVcpu(index, vcpu, self.vm, self.memory, self.bus, self._gate))


def _slot_places(machine: Machine) -> list[tuple[int, int, int, int]]:
    slots = machine.memory.all_slots()
    return [(slot.as_id, slot.number, slot.gpa, slot.size_bytes) for slot in slots]
