"""What the state of a VM is made of, its vCPUs apart: one entry per part, as in `vcpu_parts`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.migrate.bound import Reading, Writing, buffered, getting, setting
from harness.migrate.parts import Data, Need, Part, Size
from kvm_ioctl.asm_kvm import IrqchipId, kvm_pit_state2
from kvm_ioctl.batch import Call
from kvm_ioctl.handles import Vm
from kvm_ioctl.linux_kvm import KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip
from kvm_ioctl.request import KvmError


@dataclass(frozen=True)
class VmPart(Part):
    """One part of the VM's own state."""

    reading: Callable[[Vm], Reading]
    """Returns how it is read there."""
    writing: Callable[[Vm], Writing]
    """Returns how it is written there."""


def _clock_writing(vm: Vm) -> Writing:
    clock, _ = buffered(kvm_clock_data)
    issue = vm.bind(vm.KVM_SET_CLOCK, clock)

    def load(data: Data) -> bool:
        # The flags say how it was read; KVM_SET_CLOCK of 5.10 takes none.
        clock.clock = kvm_clock_data.from_bytes(data).clock
        return True

    def write(data: Data) -> None:
        load(data)
        issue()

    return Writing(write, Call(vm, vm.KVM_SET_CLOCK, clock), load)


def _pit_reading(vm: Vm) -> Reading:
    pit, view = buffered(kvm_pit_state2)
    call = Call(vm, vm.KVM_GET_PIT2, pit, least=None)

    def data(results: list[int]) -> Data | None:
        if results[0] == -errno.ENXIO:
            return None
        if results[0] < 0:
            raise KvmError(-results[0], call.request.name, vm.kind)
        return view

    return Reading((call,), data=data)


def _pit_writing(vm: Vm) -> Writing:
    put = setting(vm, vm.KVM_SET_PIT2)

    def write(data: Data) -> None:
        # Whether the PIT has port 0x61 too cannot be read; where there is a PIT at all, it has.
        vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        put.write(data)

    return Writing(write)


def _chip(name: str, number: IrqchipId) -> VmPart:
    def flaw(data: Data) -> str | None:
        says = kvm_irqchip.from_buffer_copy(data).chip_id
        return None if says == number else f"chip_id is {says}, not {number.name}"

    def reading(vm: Vm) -> Reading:
        chip, view = buffered(kvm_irqchip)
        chip.chip_id = number
        return Reading((Call(vm, vm.KVM_GET_IRQCHIP, chip),), view)

    def writing(vm: Vm) -> Writing:
        return setting(vm, vm.KVM_SET_IRQCHIP)

    size = Size.of(kvm_irqchip)
    return VmPart(name, kvm_irqchip, size, reading, writing, need=Need.IRQCHIP, flaw=flaw)


VM_PARTS: Final = {
    part.name: part
    for part in (
        _chip("pic_master", IrqchipId.KVM_IRQCHIP_PIC_MASTER),
        _chip("pic_slave", IrqchipId.KVM_IRQCHIP_PIC_SLAVE),
        _chip("ioapic", IrqchipId.KVM_IRQCHIP_IOAPIC),
        VmPart(
            "pit",
            kvm_pit_state2,
            Size.of(kvm_pit_state2),
            _pit_reading,
            _pit_writing,
            need=Need.IF_GIVEN,
        ),
        VmPart(
            "clock",
            kvm_clock_data,
            Size.of(kvm_clock_data),
            lambda vm: getting(vm, vm.KVM_GET_CLOCK),
            _clock_writing,
        ),
    )
}
"""In the order of restore; the clock last, so that it stands for as short as can be."""
