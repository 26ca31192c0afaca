"""A PC for Linux: kernel and initrd loaded by its boot protocol, two serial ports, MP tables.

No ACPI, PCI, firmware, keyboard: the command line says so (`LINUX_OPTIONS`). The console is the
first serial port, the second one is for whoever wants to talk to the guest.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Self

from harness.machine.addresses import Gpa
from harness.machine.cmos import Cmos
from harness.machine.console import PortBus
from harness.machine.cpuid import CpuidPolicy
from harness.machine.linux_boot import LinuxBoot, linux_regs, linux_sregs, load_linux
from harness.machine.machine import Machine
from harness.machine.memory import SMRAM_AS_ID
from harness.machine.mp_table import MP_TABLE_GPA, mp_table
from harness.machine.pc import TEST_MEMORY, Pc, wire_pc
from harness.machine.pc_bus import PcBus, SystemControl
from harness.machine.smi_counter import add_smram, set_smbases
from harness.machine.uart import COM1_IRQ, COM1_PORT, COM2_IRQ, COM2_PORT, Line, Uart, UartPorts
from harness.machine.xsetbv import has_xsave, hide_xsave
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm
from kvm_ioctl.linux_kvm import MemFlags, MpState, kvm_mp_state

# `no_timer_check`, `tsc=reliable`: calibration and timer tests fail where time stutters.
# `reboot=t`: there is nothing else that would reset this PC.
# `damon_stat`: it would look at all memory again and again, from 7.3 on (harness.host.emulated).
LINUX_OPTIONS: Final = (
    "console=ttyS0 acpi=off pci=off panic=-1 oops=panic reboot=t mitigations=off tsc=reliable "
    "no_timer_check nokaslr cryptomgr.notests rcupdate.rcu_expedited=1 audit=0 nowatchdog "
    "random.trust_cpu=on 8250.nr_uarts=2 apparmor=0 damon_stat.enabled=0"
)

SHARED_GPA: Final = Gpa(1 << 36)
"""Far above all memory."""

_MTRR_DEF_TYPE, _MTRRS_WRITE_BACK = 0x2FF, 0xC06
"""MTRRdefType (APM vol. 2, 7.7.2), enabled, write-back: as firmware would leave it."""


class LinuxPc(Pc):
    """A machine that boots Linux; run it with `PcRunner`."""

    # Linux touches all of its memory, and every page of a nested guest costs exits at each level.
    _huge_pages = True

    def __init__(
        self,
        kvm: Kvm,
        boot: LinuxBoot,
        *,
        vcpus: int = 1,
        memory_mib: int = 256,
        on_channel: Callable[[int], None] | None = None,
        shared: mmap.mmap | None = None,
        smm: bool = False,
    ) -> None:
        """Build the machine.

        Args:
            kvm: an open /dev/kvm.
            boot: kernel, initrd, command line (`LINUX_OPTIONS` come before it).
            vcpus: how many; their ids, and APIC ids, are 0 and up.
            memory_mib: memory in MiB.
            on_channel: gets every byte that the guest sends on its second serial port.
            shared: what the guest shall be able to read at `SHARED_GPA`, whole pages; its memory
                map does not have it, so it gets there by /dev/mem. The machine owns it from now on.
            smm: have SMRAM with a handler that counts SMIs (`smi_counter`).

        Raises ImageError: the kernel cannot be loaded.
        Raises MachineError: a size that makes no PC.
        Raises KvmError: KVM refused something.

        """
        self._boot = boot
        self._on_channel = on_channel
        self._shared = shared
        self._smm = smm
        super().__init__(kvm, None, vcpus=vcpus, memory_mib=memory_mib)

    @classmethod
    def adopt(
        cls,
        other: Machine,
        devices: dict[str, Any],
        on_channel: Callable[[int], None] | None = None,
    ) -> Self:
        """Make a PC around a VM that came from elsewhere; `other`, which had it, has none then.

        Args:
            other: with the VM of a PC as it was moved.
            devices: what that PC's `device_state` said.
            on_channel: as of `LinuxPc`.

        Raises MachineError: the devices' state is malformed.
        Raises KvmError: KVM refused something.

        """
        pc = cls.__new__(cls)
        pc.image = None
        pc._on_channel = on_channel
        pc._shared = None
        pc._smm = bool(other.memory.slots(SMRAM_AS_ID))
        pc._vcpu_count = len(other.vcpus)
        ram = (slot for slot in other.memory.slots() if not slot.flags & MemFlags.KVM_MEM_READONLY)
        pc._ram_bytes = sum(slot.size_bytes for slot in ram)
        pc.test_memory = bytearray(len(TEST_MEMORY))
        other.bus = pc._make_bus()
        for runner in other.vcpus:
            runner.connect(other.bus)
        pc.take_over(other)
        try:
            pc.restore_devices(devices)
            wire_pc(pc.vm)
            pc.settle()
        except BaseException:
            pc.close()
            raise
        return pc

    def settle(self) -> None:
        """Go on after an exchange of VMs (`Machine.exchange`): lines may have changed meanwhile."""
        for uart in (self.com1, self.com2):
            uart.drive_line()

    def _cpuid_edit(self, kvm: Kvm) -> Callable[[list[kvm_cpuid_entry2]], None]:
        edit = super()._cpuid_edit(kvm)
        if has_xsave(kvm):
            return edit

        def without_xsave(entries: list[kvm_cpuid_entry2]) -> None:
            edit(entries)
            hide_xsave(entries)

        return without_xsave

    def _make_bus(self) -> PortBus:
        def set_level(irq: int, level: int) -> None:
            self.vm.irq_line(irq, level)

        self.com1 = Uart(COM1_PORT, Line(COM1_IRQ, set_level))
        self.com2 = Uart(COM2_PORT, Line(COM2_IRQ, set_level), self._on_channel)
        self.cmos = Cmos(self._ram_bytes, self._vcpu_count)
        bus = PcBus([self.cmos, SystemControl(), UartPorts(self.com2)])
        bus.serial = self.com1
        self._stateful = {"cmos": self.cmos, "com1": self.com1, "com2": self.com2}
        return bus

    def _load(self, command_line: str) -> None:
        super()._load(command_line)
        line = f"{LINUX_OPTIONS} {self._boot.command_line}".rstrip()
        boot = replace(self._boot, command_line=line)
        self._entry = load_linux(self.memory, boot, self._memory_map())
        # Its views may be of `shared`, which could not be closed then.
        del boot, self._boot
        if self._smm:
            add_smram(self)
        if self._shared is not None:
            number = len(self.memory.slots())
            self.memory.add_slot(number, SHARED_GPA, 0, MemFlags.KVM_MEM_READONLY, self._shared)
        self.memory.write(MP_TABLE_GPA, mp_table(self._vcpu_count))

    def _create_vcpus(self, count: int, cpuid: CpuidPolicy, irqchip: bool) -> None:
        super()._create_vcpus(count, cpuid, irqchip)
        for runner in self.vcpus:
            runner.vcpu.set_msrs({_MTRR_DEF_TYPE: _MTRRS_WRITE_BACK})
        if self._smm:
            set_smbases(self)
        first = self.vcpus[0].vcpu
        first.set_sregs(linux_sregs(first.get_sregs()))
        first.set_regs(linux_regs(self._entry))
        first.set_mp_state(kvm_mp_state(mp_state=MpState.KVM_MP_STATE_RUNNABLE))
