"""What a VM is made of before it has any state: memory, slots, vCPUs, devices in the kernel."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.machine.errors import GuestMemoryError
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.machine.vcpu import MachineVcpu
from harness.migrate.errors import Refused, StreamError
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, Vm

MAX_VCPUS: Final = 4096
MAX_SLOTS: Final = 4096
MAX_MEMORY_BYTES: Final = 1 << 40
"""More than this in a stream is taken for nonsense."""


@dataclass(frozen=True)
class SlotShape:
    """One memory slot, and which mapping it shows from its beginning."""

    number: int
    as_id: int
    gpa: int
    flags: int
    backing: int


@dataclass(frozen=True)
class Shape:
    """What a destination needs to know to build an empty VM for a machine."""

    backings: tuple[int, ...]
    """Bytes of each mapping; slots that show the same memory share one."""
    slots: tuple[SlotShape, ...]
    vcpus: int
    irqchip: bool

    @classmethod
    def of(cls, machine: Machine) -> Shape:
        """Return the shape of a machine."""
        slots = machine.memory.all_slots()
        backings = backings_of(machine)
        numbers = {id(backing): number for number, backing in enumerate(backings)}
        return cls(
            tuple(map(len, backings)),
            tuple(
                SlotShape(s.number, s.as_id, int(s.gpa), s.flags, numbers[id(s.backing)])
                for s in slots
            ),
            len(machine.vcpus),
            machine.irqchip,
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes of all mappings."""
        return sum(self.backings)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "backings": list(self.backings),
            "slots": [[s.number, s.as_id, s.gpa, s.flags, s.backing] for s in self.slots],
            "vcpus": self.vcpus,
            "irqchip": self.irqchip,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shape:
        """Return the shape of a stream's header.

        Raises StreamError: it is none, or an absurd one.
        """
        try:
            backings = tuple(_natural(size) for size in data["backings"])
            slots = tuple(SlotShape(*map(_natural, slot)) for slot in data["slots"])
            shape = cls(backings, slots, _natural(data["vcpus"]), bool(data["irqchip"]))
        except (KeyError, TypeError, ValueError) as e:
            raise StreamError(f"header: the machine's shape is malformed ({e})") from None
        shape._check()
        return shape

    def _check(self) -> None:
        if self.vcpus > MAX_VCPUS or len(self.slots) > MAX_SLOTS:
            raise StreamError(f"header: {self.vcpus} vCPUs and {len(self.slots)} slots")
        if self.memory_bytes > MAX_MEMORY_BYTES:
            raise StreamError(f"header: {self.memory_bytes} bytes of memory")
        for size in self.backings:
            if not size or size % PAGE_SIZE:
                raise StreamError(f"header: a mapping of {size} bytes is not whole pages")
        for slot in self.slots:
            if slot.backing >= len(self.backings):
                raise StreamError(f"header: slot {slot.number} shows mapping {slot.backing}")
        if {slot.backing for slot in self.slots} != set(range(len(self.backings))):
            raise StreamError("header: a mapping without a slot")


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is no count, size or address")
    return value


def backings_of(machine: Machine) -> list[mmap.mmap]:
    """Return the mappings behind a machine's slots, each once, in the order of slots."""
    found = {id(slot.backing): slot.backing for slot in machine.memory.all_slots()}
    return list(found.values())


def wants_whole_events(vm: Vm) -> None:
    """Make KVM_GET_VCPU_EVENTS tell all it can, and KVM_SET_VCPU_EVENTS take it.

    Without KVM_CAP_EXCEPTION_PAYLOAD reading the events delivers a pending exception's CR2 or DR6
    (kvm_deliver_exception_payload), and a pending triple fault is not told at all.
    """
    for cap in (Cap.KVM_CAP_EXCEPTION_PAYLOAD, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        if vm.check_extension(cap):
            vm.enable_cap(cap, args=(1,))


class BlankMachine(Machine):
    """A VM of a given shape: its vCPUs have no CPUID and no registers yet."""

    def __init__(self, kvm: Kvm, shape: Shape, *, advice: Sequence[int] = ()) -> None:
        """Build it.

        Raises Refused: the shape cannot be had here.
        """
        self.shape = shape
        try:
            super().__init__(kvm, vcpus=shape.vcpus, irqchip=shape.irqchip, advice=advice)
        except (GuestMemoryError, OSError) as e:
            raise Refused(f"no VM of this shape: {e}") from e

    def _add_memory(self, size_bytes: int, smm: bool, advice: Sequence[int]) -> None:
        self._set_tss_addr()
        wants_whole_events(self.vm)
        self.mappings: list[mmap.mmap] = []
        """The memory, in the order of `Shape.backings`."""
        unowned = contextlib.ExitStack()
        with unowned:
            for size in self.shape.backings:
                mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                unowned.callback(mapping.close)
                for option in advice:
                    mapping.madvise(option)
                self.mappings.append(mapping)
            for slot in self.shape.slots:
                self.memory.add_slot(
                    slot.number, Gpa(slot.gpa), slot.as_id, slot.flags, self.mappings[slot.backing]
                )
            unowned.pop_all()

    def _create_vcpus(self, count: int, cpuid: CpuidPolicy, irqchip: bool) -> None:
        self._create_devices(irqchip)
        for index in range(count):
            vcpu = self.vm.create_vcpu(index)
            self.vcpus.append(MachineVcpu(index, vcpu, self.vm, self.memory, self.bus, self._gate))
