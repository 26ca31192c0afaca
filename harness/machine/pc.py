"""A PC without PCI and firmware, for images that bring all else with them.

In the kernel: APICs, I/O APIC, PIC, PIT. Here: serial port, debug-exit port, fw_cfg, CMOS and what
QEMU's pc-testdev has. Where nothing is, reads give all ones and writes are lost. APs wait for INIT
and SIPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from harness.machine.addresses import Gpa
from harness.machine.cmos import Cmos
from harness.machine.console import PortBus
from harness.machine.cpuid import CpuidPolicy, find_leaf
from harness.machine.device_state import StatefulDevice, taking_state
from harness.machine.entry import reserved_memory
from harness.machine.fw_cfg import pc_fw_cfg
from harness.machine.guest_abi import SERIAL_PORT
from harness.machine.loader import EntryMode, Image
from harness.machine.machine import Machine
from harness.machine.memory_map import EBDA_GPA, MemoryRange, e820_map, ram_ranges
from harness.machine.multiboot import multiboot_info
from harness.machine.pc_bus import (
    IrqLines,
    KeyboardController,
    LatchPorts,
    PcBus,
    SystemControl,
)
from harness.svm.cpuid import Leaf
from kvm_ioctl.asm_kvm import IrqchipId, kvm_cpuid_entry2
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, Vm
from kvm_ioctl.linux_kvm import KVM_PIT_SPEAKER_DUMMY, IrqRoutingType, kvm_irq_routing_entry

TEST_MEMORY: Final = range(0xFF00_0000, 0xFF01_0000)
"""Memory of pc-testdev whose every access leaves the guest."""

_BDA_COM1, _BDA_EBDA, _BDA_BASE_KIB = Gpa(0x400), Gpa(0x40E), Gpa(0x413)
"""BIOS data area: port of COM1, segment of the EBDA, KiB below it."""

_TSC_DEADLINE_TIMER, _HYPERVISOR = 1 << 24, 1 << 31
"""CPUID 0000_0001 ECX."""

_IOAPIC_PINS, _IOAPIC_PIN_OF_IRQ0 = 24, 2


class Pc(Machine):
    """A machine that looks like a PC to the image; only vCPU 0 enters it."""

    def __init__(
        self,
        kvm: Kvm,
        image: Image | Path | str | bytes | None,
        *,
        vcpus: int = 1,
        memory_mib: int = 128,
        command_line: str = "",
    ) -> None:
        """Build the machine.

        Args:
            kvm: an open /dev/kvm.
            image: what vCPU 0 shall run; without one it stays at reset.
            vcpus: how many; their ids, and APIC ids, are 0 and up.
            memory_mib: memory in MiB; what exceeds 3 GiB lies above 4 GiB.
            command_line: for the image; by custom its first word is the image's own name.

        Raises ImageError: the image cannot be loaded.
        Raises MachineError: a size that makes no PC.
        Raises KvmError: KVM refused something.

        """
        self._ram_bytes = memory_mib << 20
        self._vcpu_count = vcpus
        self._command_line = command_line
        self.test_memory = bytearray(len(TEST_MEMORY))
        super().__init__(
            kvm,
            image=image,
            vcpus=vcpus,
            memory_mib=memory_mib,
            cpuid=CpuidPolicy(edit=self._cpuid_edit(kvm)),
            irqchip=True,
            command_line=command_line,
        )

    def read_mmio(self, gpa: int, size_bytes: int) -> bytes:
        """Return what a read of no memory gives."""
        if gpa in TEST_MEMORY:
            at = gpa - TEST_MEMORY.start
            return bytes(self.test_memory[at : at + size_bytes]).ljust(size_bytes, b"\xff")
        return b"\xff" * size_bytes

    def write_mmio(self, gpa: int, data: bytes) -> None:
        """Take a write to no memory."""
        if gpa in TEST_MEMORY:
            at = gpa - TEST_MEMORY.start
            kept = data[: len(self.test_memory) - at]
            self.test_memory[at : at + len(kept)] = kept

    def device_state(self) -> dict[str, Any]:
        """Return what the devices outside the kernel hold, for JSON."""
        states = {name: device.state() for name, device in self._stateful.items()}
        return {**states, "test_memory": self.test_memory.rstrip(b"\0").hex()}

    def restore_devices(self, state: dict[str, Any]) -> None:
        """Give the devices what another machine's `device_state` says.

        Raises MachineError: it is malformed.
        """
        for name, device in self._stateful.items():
            device.restore(state.get(name, {}))
        with taking_state("pc-testdev's memory"):
            kept = bytes.fromhex(state["test_memory"])
            if len(kept) > len(TEST_MEMORY):
                raise ValueError(f"{len(kept)} bytes")
            self.test_memory[:] = kept.ljust(len(TEST_MEMORY), b"\0")

    def _cpuid_edit(self, kvm: Kvm) -> Callable[[list[kvm_cpuid_entry2]], None]:
        """Return how KVM's CPUID is changed for this PC."""
        return _add_what_the_irqchip_gives(kvm)

    def _make_bus(self) -> PortBus:
        fw_cfg = pc_fw_cfg(
            self._vcpu_count, self._ram_bytes, self._memory_map(), self._command_line
        )
        cmos, latch = Cmos(self._ram_bytes, self._vcpu_count), LatchPorts()
        bus = PcBus(
            [
                fw_cfg,
                cmos,
                KeyboardController(),
                SystemControl(),
                latch,
                IrqLines(lambda line, level: self.vm.irq_line(line, level)),
            ]
        )
        self._stateful: dict[str, StatefulDevice] = {
            "fw_cfg": fw_cfg,
            "cmos": cmos,
            "latch": latch,
            "com1": bus.serial,
        }
        """Those outside the kernel that a guest changes, by what their state is called."""
        return bus

    def _ram(self, size_bytes: int) -> list[MemoryRange]:
        return ram_ranges(size_bytes)

    def _memory_map(self) -> list[MemoryRange]:
        return e820_map(self._ram_bytes)

    def _load(self, command_line: str) -> None:
        self.memory.write_int(_BDA_COM1, 2, SERIAL_PORT)
        self.memory.write_int(_BDA_EBDA, 2, EBDA_GPA >> 4)
        self.memory.write_int(_BDA_BASE_KIB, 2, EBDA_GPA >> 10)
        super()._load(command_line)

    def _create_devices(self, irqchip: bool) -> None:
        super()._create_devices(irqchip)
        # With port 0x61 in the kernel too, which guests use to time by channel 2.
        self.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        wire_pc(self.vm)

    def _enters(self, index: int) -> bool:
        return index == 0


def wire_pc(vm: Vm) -> None:
    """Connect the interrupt lines of a VM as those of a PC are; KVM does not tell how they were."""
    vm.set_gsi_routing(_routes())


def _routes() -> Iterator[kvm_irq_routing_entry]:
    """Yield how a PC is wired; KVM's own default has IRQ 0 at pin 0 of the I/O APIC."""
    for irq in range(16):
        chip = IrqchipId.KVM_IRQCHIP_PIC_SLAVE if irq & 8 else IrqchipId.KVM_IRQCHIP_PIC_MASTER
        yield _route(irq, chip, irq & 7)
    for irq in range(_IOAPIC_PINS):
        if irq != _IOAPIC_PIN_OF_IRQ0:
            yield _route(irq, IrqchipId.KVM_IRQCHIP_IOAPIC, irq or _IOAPIC_PIN_OF_IRQ0)


def _route(irq: int, chip: int, pin: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=irq, type=IrqRoutingType.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry


def check_image(image: Image, memory_mib: int, command_line: str) -> None:
    """Tell whether an image can be loaded into a PC of this size, before there is one.

    Raises ImageError: a segment outside memory, on another one, or where the loader's tables go.
    Raises MachineError: a size that makes no PC, or a command line that is too long.
    """
    ram = [range(r.gpa, r.end) for r in ram_ranges(memory_mib << 20)]
    image.check(ram, reserved_memory(image.mode))
    if image.mode is EntryMode.MULTIBOOT32:
        multiboot_info(e820_map(memory_mib << 20), command_line)


def _add_what_the_irqchip_gives(kvm: Kvm) -> Callable[[list[kvm_cpuid_entry2]], None]:
    """Return an edit of CPUID: KVM's supported list leaves this to whoever makes an irqchip."""
    has_timer = kvm.check_extension(Cap.KVM_CAP_TSC_DEADLINE_TIMER)

    def edit(entries: list[kvm_cpuid_entry2]) -> None:
        if (entry := find_leaf(entries, Leaf.FEATURES)) is not None:
            entry.ecx |= _HYPERVISOR | (_TSC_DEADLINE_TIMER if has_timer else 0)

    return edit
