"""What a VM is made of before it has any state: memory, slots, vCPUs, devices in the kernel."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.machine.errors import MachineError
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.machine.vcpu import MachineVcpu
from harness.migrate.errors import Refused, StreamError
from harness.migrate.offers import offers
from harness.migrate.sections import shortened
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, Vm

MAX_VCPUS: Final = 4096
MAX_SLOTS: Final = 1024
MAX_MEMORY_BYTES: Final = 1 << 40
"""More than this in a stream is taken for nonsense."""

_U16, _U32, _U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class SlotShape:
    """One memory slot, and which mapping it shows from its beginning."""

    number: int
    as_id: int
    gpa: int
    flags: int
    """KVM_MEM_*."""
    backing: int

    def __str__(self) -> str:
        return f"slot {self.number} (as_id {self.as_id}) at gpa {self.gpa:#x}"


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
    def from_json(cls, data: Any) -> Shape:
        """Return the shape of a stream's header.

        Raises StreamError: it is none, or an absurd one.
        """
        if not isinstance(data, dict) or set(data) != {"backings", "slots", "vcpus", "irqchip"}:
            raise StreamError("header: the machine's shape is malformed")
        if not isinstance(data["irqchip"], bool):
            raise StreamError("header: irqchip is neither true nor false")
        shape = cls(
            tuple(_natural(size, "the size of a mapping") for size in _list(data, "backings")),
            tuple(map(_slot, _list(data, "slots"))),
            _natural(data["vcpus"], "the number of vCPUs"),
            data["irqchip"],
        )
        shape._check()
        return shape

    def _check(self) -> None:
        if self.vcpus > MAX_VCPUS:
            raise StreamError(f"header: {self.vcpus} vCPUs, at most {MAX_VCPUS} are possible")
        for size in self.backings:
            if not size or size % PAGE_SIZE:
                raise StreamError(f"header: a mapping of {size} bytes is not whole pages")
        if self.memory_bytes > MAX_MEMORY_BYTES:
            raise StreamError(f"header: {self.memory_bytes} bytes of memory")
        for slot in self.slots:
            if slot.backing >= len(self.backings):
                raise StreamError(f"header: {slot} shows mapping {slot.backing}, there is none")
            if slot.gpa % PAGE_SIZE or slot.gpa + self.backings[slot.backing] > _U64:
                raise StreamError(f"header: {slot} is no place for memory")
        if {slot.backing for slot in self.slots} != set(range(len(self.backings))):
            raise StreamError("header: a mapping without a slot")
        self._check_apart()

    def _check_apart(self) -> None:
        """Make sure that no two slots have one number or one address; adding them finds out too.

        But then part of the VM is there already, and it would be KVM's word.
        """
        if len({(slot.as_id, slot.number) for slot in self.slots}) != len(self.slots):
            raise StreamError("header: two slots of one number")
        ordered = sorted(self.slots, key=lambda slot: (slot.as_id, slot.gpa))
        for slot, above in pairwise(ordered):
            end = slot.gpa + self.backings[slot.backing]
            if slot.as_id == above.as_id and above.gpa < end:
                raise StreamError(f"header: {slot} overlaps {above}")


def _list(data: dict[str, Any], name: str) -> list[Any]:
    found = data[name]
    if not isinstance(found, list) or len(found) > MAX_SLOTS:
        raise StreamError(f"header: {name} is no list of at most {MAX_SLOTS}")
    return found


def _slot(data: object) -> SlotShape:
    if not isinstance(data, list) or len(data) != 5:
        raise StreamError("header: a slot is malformed")
    number, as_id, gpa, flags, backing = data
    return SlotShape(
        # KVM takes both in one word (kvm_userspace_memory_region.slot).
        _natural(number, "the number of a slot", _U16),
        _natural(as_id, "the as_id of a slot", _U16),
        _natural(gpa, "the gpa of a slot"),
        _natural(flags, "the flags of a slot", _U32),
        _natural(backing, "the mapping of a slot"),
    )


def _natural(value: object, what: str, most: int = _U64) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise StreamError(f"header: {what} is {shortened(_quoted(value))}")
    return value


def _quoted(value: object) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    # Hexadecimal, for str() of a very long int raises ValueError.
    return f"{value:#x}" if type(value) is int else repr(value)


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
        if offers(vm.kvm).has(cap):
            vm.enable_cap(cap, args=(1,))


class BlankMachine(Machine):
    """A VM of a given shape: its vCPUs have no CPUID and no registers yet."""

    def __init__(
        self, kvm: Kvm, shape: Shape, *, advice: Sequence[int] = (), dirty_ring_bytes: int = 0
    ) -> None:
        """Build it.

        Raises Refused: the shape cannot be had here.
        """
        self.shape = shape
        _check_room(kvm, shape)
        try:
            super().__init__(
                kvm,
                vcpus=shape.vcpus,
                irqchip=shape.irqchip,
                advice=advice,
                dirty_ring_bytes=dirty_ring_bytes,
            )
        except (MachineError, OSError) as e:
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


def _check_room(kvm: Kvm, shape: Shape) -> None:
    """Refuse what cannot end well, before KVM has taken memory for it.

    A slot alone costs 8 bytes a page where pages are shadowed (kvm_arch_create_memslot).
    """
    most = kvm.check_extension(Cap.KVM_CAP_MAX_VCPUS)
    if shape.vcpus > most:
        raise Refused(f"{shape.vcpus} vCPUs, this kernel has at most {most}")
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if shape.memory_bytes > have:
        raise Refused(f"{shape.memory_bytes >> 20} MiB, this machine has {have >> 20} MiB itself")
