"""A machine whose vCPUs run proxies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final, Self, TypeVar

from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy, find_leaf
from harness.machine.errors import MachineError
from harness.machine.images import load_image
from harness.machine.loader import Image
from harness.machine.machine import Machine
from harness.machine.memory import SMRAM_AS_ID
from harness.machine.memory_map import MemoryRange
from harness.machine.threads import VcpuThread
from harness.proxy.cpu import Cpu
from harness.proxy.l1_entry import enter_l1
from harness.proxy.layout import INSTANCE_SIZE
from harness.proxy.level import Level
from harness.proxy.paging import LARGE_PAGE, PAGE, PageAllocator, PageTables
from harness.proxy.smm import SmmLevel
from harness.svm.cpuid import ExtendedFeaturesEdx, Leaf, SvmFeaturesEdx
from harness.svm.msrs import Efer
from harness.svm.smram import DEFAULT_SMBASE
from kvm_ioctl.handles import Kvm
from kvm_ioctl.linux_kvm import kvm_msi

T = TypeVar("T")

APIC_GPA: Final = 0xFEE0_0000
FREE_GPA: Final = Gpa(0x20_0000)
"""From here up, memory is handed out; the image lies below."""

SMRAM_SIZE: Final = INSTANCE_SIZE
"""Bytes of SMRAM per vCPU; vCPU n has its SMBASE at DEFAULT_SMBASE + n * SMRAM_SIZE."""

MAX_SMM_VCPUS: Final = 13
"""SMRAM of so many fits below the image."""

MAX_MEMORY_MIB: Final = 1024

_SPARE_SLOT_GPA: Final = Gpa(1 << 32)
"""Where a slot can come and go without the guest's noticing."""

DEFAULT_TIMEOUT_S: Final = 30.0


class ProxyMachine(Machine):
    """A VM with a proxy as L1 on every vCPU; use it in a `with`."""

    def __init__(
        self,
        kvm: Kvm,
        *,
        vcpus: int = 1,
        memory_mib: int = 64,
        cpuid: CpuidPolicy | None = None,
        irqchip: bool = False,
        smm: bool = False,
        image: Image | bytes | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        dirty_ring_bytes: int = 0,
    ) -> None:
        """Build the machine; no vCPU has run yet.

        Args:
            kvm: an open /dev/kvm.
            vcpus: how many; each has its own levels, see `cpus`.
            memory_mib: memory from address 0 up, in MiB; at most 1024.
            cpuid: changes to KVM's supported CPUID.
            irqchip: have local APICs, I/O APIC and PICs in the kernel.
            smm: have SMRAM with a proxy in it, see `smm`.
            image: the proxy's image; by default the one that was carried along.
            timeout_s: how long a program may run, unless its call says otherwise.
            dirty_ring_bytes: of a dirty ring per vCPU; by default there are none.

        Raises MachineError: a size that makes no machine.
        Raises KvmError: KVM refused something.

        """
        if smm and vcpus > MAX_SMM_VCPUS:
            raise MachineError(f"SMRAM is for {MAX_SMM_VCPUS} vCPUs at most, not {vcpus}")
        if memory_mib > MAX_MEMORY_MIB:
            raise MachineError(f"proxies map {MAX_MEMORY_MIB} MiB at most, not {memory_mib}")
        self.timeout_s = timeout_s
        self.smm_wired = smm
        self._vcpu_count = vcpus
        self._shadows_stale = False
        self.pages = PageAllocator(FREE_GPA, Gpa(memory_mib << 20))
        super().__init__(
            kvm,
            image=load_image("proxy") if image is None else image,
            vcpus=vcpus,
            memory_mib=memory_mib,
            cpuid=cpuid,
            irqchip=irqchip,
            smm=smm,
            dirty_ring_bytes=dirty_ring_bytes,
        )
        try:
            self.efer = self._base_efer()
            self.cpus = [Cpu(self, runner) for runner in self.vcpus]
            for cpu in self.cpus:
                enter_l1(cpu.runner.vcpu, cpu.l1.context, irqchip=irqchip)
        except BaseException:
            self.close()
            raise

    # Levels

    @property
    def l1(self) -> Level:
        """L1 of vCPU 0."""
        return self.cpus[0].l1

    @property
    def smm(self) -> SmmLevel:
        """The SMI handler of vCPU 0."""
        return self.cpus[0].smm

    @cached_property
    def offers_npt(self) -> bool:
        """Whether KVM offers nested paging to guests; with kvm_amd.npt=0 it does not."""
        leaf = find_leaf(self.kvm.supported_cpuid(), Leaf.SVM)
        return leaf is not None and bool(SvmFeaturesEdx(leaf.edx).NPT)

    def level(self, depth: int, *, npt: bool | None = None, vcpu: int = 0) -> Level:
        """Return the level of a depth, 1 for L1; those that are missing are launched.

        Raises GuestFault: a level has no SVM.
        Raises Unsupported: nested paging is asked for, and KVM offers none.
        """
        level = self.cpus[vcpu].l1
        while level.depth < depth:
            level = level.guests[0] if level.guests else level.launch(npt=npt)
        return level

    def inject_smi(self, vcpu: int = 0) -> SmmLevel:
        """Send an SMI and run the vCPU until its handler is entered; return that."""
        return self.cpus[vcpu].inject_smi()

    def interrupt(self, vector: int, vcpu: int = 0) -> None:
        """Send an external interrupt to a vCPU's local APIC, as a device's MSI would.

        Raises KvmError: the machine has no irqchip.
        """
        message = kvm_msi(address_lo=APIC_GPA | vcpu << 12, data=vector)
        self.vm.call(self.vm.KVM_SIGNAL_MSI, message)

    def in_thread(self, level: Level, body: Callable[[Level], T]) -> VcpuThread[T]:
        """Start `body(level)` in a thread of the level's vCPU; `join` it for the result."""
        thread: VcpuThread[T] = VcpuThread(level.cpu.runner, lambda _: body(level))
        thread.start()
        return thread

    def page_tables(self) -> PageTables:
        """Return new tables that map memory and the local APIC to themselves."""
        tables = PageTables(self.memory, self.pages, self.tables_changed)
        tables.identity(0, self.memory_bytes)
        tables.identity(APIC_GPA, APIC_GPA + LARGE_PAGE)
        return tables

    def tables_changed(self) -> None:
        """Note that page tables were written from outside; KVM's shadows are dropped before a run.

        KVM write-protects the tables that it shadows, which does not concern userspace's mapping.
        """
        self._shadows_stale = True

    def drop_stale_shadows(self) -> None:
        """Make KVM forget all shadow page tables, if tables were changed.

        Deleting any memory slot does (`kvm_mmu_zap_all_fast`, KVM_X86_QUIRK_SLOT_ZAP_ALL).
        """
        if self._shadows_stale:
            self._shadows_stale = False
            self.memory.blink(_SPARE_SLOT_GPA, PAGE)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory, from address 0 up."""
        return max(slot.end for slot in self.memory.slots() if slot.gpa < _SPARE_SLOT_GPA)

    @property
    def entry(self) -> int:
        """Where a proxy is entered."""
        return int(self.proxy_image.entry)

    @property
    def proxy_image(self) -> Image:
        """The image that all levels share."""
        if self.image is None:
            raise MachineError("a machine of proxies has their image")
        return self.image

    def __enter__(self) -> Self:
        return self

    # The machine below

    def _ram(self, size_bytes: int) -> list[MemoryRange]:
        if not self.smm_wired:
            return super()._ram(size_bytes)
        start, end = self._smram.start, self._smram.stop
        return [
            MemoryRange(Gpa(0), start),
            MemoryRange(Gpa(start), end - start),
            MemoryRange(Gpa(end), size_bytes - end),
        ]

    @property
    def _smram(self) -> range:
        count = max(1, min(self._vcpu_count, MAX_SMM_VCPUS))
        return range(DEFAULT_SMBASE, DEFAULT_SMBASE + count * SMRAM_SIZE)

    def _add_memory(self, size_bytes: int, smm: bool, advice: Sequence[int]) -> None:
        super()._add_memory(size_bytes, False, advice)
        if not smm:
            return
        for slot in self.memory.slots():
            if slot.gpa == self._smram.start:
                # SMRAM hides what is below it, as a chipset does.
                self.memory.add(slot.gpa, slot.size_bytes, as_id=SMRAM_AS_ID, advice=advice)
            else:
                self.memory.alias(slot, as_id=SMRAM_AS_ID)

    def _load(self, command_line: str) -> None:
        if self.image is not None:
            self.image.place(self.memory)

    def _enters(self, index: int) -> bool:
        return False

    def _base_efer(self) -> Efer:
        leaf = find_leaf(self.kvm.supported_cpuid(), Leaf.EXTENDED_FEATURES)
        has_nx = leaf is not None and ExtendedFeaturesEdx(leaf.edx).NX
        return Efer.of(LME=1, LMA=1, NX=int(bool(has_nx)))
