"""The state of a machine but its memory: taken from a VM that is paused, and put into another."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeVar

from harness.errors import HarnessError
from harness.machine.machine import Machine
from harness.migrate.errors import Refused
from harness.migrate.notes import Note
from harness.migrate.offers import offers
from harness.migrate.parts import Need, Part, Size
from harness.migrate.shape import wants_whole_events
from harness.migrate.vcpu_parts import VCPU_PARTS, Notes, Source, Target
from kvm_ioctl.asm_kvm import IrqchipId, kvm_pit_state2
from kvm_ioctl.handles import Kvm, Vm
from kvm_ioctl.linux_kvm import KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip
from kvm_ioctl.request import KvmError

Parts = Mapping[str, bytes]
T_contra = TypeVar("T_contra", contravariant=True)


@dataclass(frozen=True)
class MachineState:
    """Everything that KVM knows of a machine, as the bytes of KVM's structs."""

    vm: Parts
    """By the names of `VM_PARTS`."""
    vcpus: tuple[Parts, ...]
    """By the names of `VCPU_PARTS`."""
    notes: tuple[Note, ...] = field(default=(), compare=False)
    """What the kernel did not give."""


@dataclass(frozen=True)
class VmPart(Part):
    """One part of the VM's own state: how it is read and written."""

    read: Callable[[Vm], bytes | None]
    """None: there is none here."""
    write: Callable[[Vm, bytes], None]


def _write_clock(vm: Vm, data: bytes) -> None:
    # The flags say how it was read; KVM_SET_CLOCK of 5.10 takes none.
    vm.set_clock(kvm_clock_data(clock=kvm_clock_data.from_bytes(data).clock))


def _write_chip(vm: Vm, data: bytes) -> None:
    vm.set_irqchip(kvm_irqchip.from_bytes(data))


def _read_pit(vm: Vm) -> bytes | None:
    pit = kvm_pit_state2()
    error = vm.try_call(vm.KVM_GET_PIT2, pit)
    if error == errno.ENXIO:
        return None
    if error:
        raise KvmError(error, "KVM_GET_PIT2", vm.kind)
    return pit.as_bytes()


def _write_pit(vm: Vm, data: bytes) -> None:
    # Whether the PIT has port 0x61 too cannot be read; where there is a PIT at all, it has.
    vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
    vm.set_pit2(kvm_pit_state2.from_bytes(data))


def _chip(name: str, chip: IrqchipId) -> VmPart:
    def flaw(data: bytes) -> str | None:
        says = kvm_irqchip.from_bytes(data).chip_id
        return None if says == chip else f"chip_id is {says}, not {chip.name}"

    return VmPart(
        name,
        kvm_irqchip,
        Size.of(kvm_irqchip),
        lambda vm: vm.get_irqchip(chip).as_bytes(),
        _write_chip,
        need=Need.IRQCHIP,
        flaw=flaw,
    )


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
            _read_pit,
            _write_pit,
            need=Need.IF_GIVEN,
        ),
        VmPart(
            "clock",
            kvm_clock_data,
            Size.of(kvm_clock_data),
            lambda vm: vm.get_clock().as_bytes(),
            _write_clock,
        ),
    )
}
"""In the order of restore; the clock last, so that it stands for as short as can be."""


def msr_indices(kvm: Kvm) -> tuple[int, ...]:
    """Return the MSRs that hold state, by this kernel's own list."""
    return offers(kvm).msr_indices


def capture(machine: Machine, indices: Sequence[int] | None = None) -> MachineState:
    """Take the state of a machine that is paused; pending I/O is completed first.

    The routing of interrupt lines (KVM_SET_GSI_ROUTING) cannot be read and is not part of it.

    Args:
        machine: whose vCPUs are not running.
        indices: the MSRs to ask for; by default those of `msr_indices`.

    Raises MachineError: an instruction's I/O does not end.
    Raises KvmError: KVM refused to say something.

    """
    wants_whole_events(machine.vm)
    for runner in machine.vcpus:
        runner.finish_io()
    return read_state(machine, indices)


def read_state(machine: Machine, indices: Sequence[int] | None = None) -> MachineState:
    """Take the state of a machine without pending I/O; else as `capture`, and raises KvmError."""
    notes: Notes = []
    offered = offers(machine.kvm)
    if indices is not None:
        offered = replace(offered, msr_indices=tuple(indices))
    vcpus = []
    for runner in machine.vcpus:
        source = Source(runner.vcpu, offered, machine.irqchip, notes)
        read = ((name, part.read(source)) for name, part in VCPU_PARTS.items())
        vcpus.append({name: data for name, data in read if data is not None})
    found = {
        part.name: part.read(machine.vm)
        for part in VM_PARTS.values()
        if machine.irqchip or part.need is not Need.IRQCHIP
    }
    vm = {name: data for name, data in found.items() if data is not None}
    return MachineState(vm, tuple(vcpus), tuple(dict.fromkeys(notes)))


def restore(machine: Machine, state: MachineState, order: Sequence[str]) -> list[Note]:
    """Put a state into a machine of the same shape; return what the kernel did not take.

    Args:
        machine: blank; nothing of it has run.
        state: what `capture` gave.
        order: the names of all vCPU parts, see `orders`.

    Raises HarnessError: the order is not one of all parts.
    Raises Refused: KVM does not take a part; the message names it.

    """
    if sorted(order) != sorted(VCPU_PARTS):
        raise HarnessError(f"an order has each of {', '.join(VCPU_PARTS)}; got {', '.join(order)}")
    notes: Notes = []
    _write_parts("", VM_PARTS, machine.vm, state.vm, [n for n in VM_PARTS if n != "clock"])
    for runner, parts in zip(machine.vcpus, state.vcpus, strict=True):
        target = Target(runner.vcpu, offers(machine.kvm), machine.irqchip, notes)
        _write_parts(f"vcpu {runner.index}: ", VCPU_PARTS, target, parts, order)
    _write_parts("", VM_PARTS, machine.vm, state.vm, ["clock"])
    return notes


class _Writable(Protocol[T_contra]):
    """A part of the VM or of a vCPU."""

    @property
    def write(self) -> Callable[[T_contra, bytes], None]:
        """Put its bytes there."""


def _write_parts(
    where: str,
    known: Mapping[str, _Writable[T_contra]],
    target: T_contra,
    parts: Parts,
    order: Sequence[str],
) -> None:
    """Write those parts that there are; what goes wrong is a refusal that says with which part."""
    name = ""
    try:
        for name in order:
            if name in parts:
                known[name].write(target, parts[name])
    except KvmError as e:
        raise Refused(f"{where}{name}: {e}") from e
    except ValueError as e:
        raise Refused(f"{where}{name}: {e}") from None
