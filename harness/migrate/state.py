"""The state of a machine but its memory: taken from a VM that is paused, and put into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from harness.errors import HarnessError
from harness.machine.machine import Machine
from harness.migrate.bound import (
    Notes,
    Reading,
    Source,
    Target,
    Writing,
)
from harness.migrate.errors import Refused
from harness.migrate.notes import Note
from harness.migrate.offers import offers
from harness.migrate.parts import Data, Need
from harness.migrate.sections import part_header, split_parts
from harness.migrate.shape import wants_whole_events
from harness.migrate.vcpu_parts import VCPU_PARTS, VcpuPart
from harness.migrate.vm_parts import VM_PARTS, VmPart
from kvm_ioctl.batch import Batch
from kvm_ioctl.handles import Kvm
from kvm_ioctl.request import KvmError

Parts = Mapping[str, bytes]


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
class Snapshot:
    """A state as it travels: all parts of the VM in one piece, and all of each vCPU."""

    vm: bytes
    vcpus: tuple[bytes, ...]
    notes: tuple[Note, ...]
    """What the kernel did not give."""

    def state(self) -> MachineState:
        """Return it taken apart."""
        vcpus = tuple(map(split_parts, self.vcpus))
        return MachineState(split_parts(self.vm), vcpus, self.notes)


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
    return StateReader(machine, indices).read().state()


class StateReader:
    """Takes the state of one machine, again and again; all that it needs is made only once."""

    def __init__(self, machine: Machine, indices: Sequence[int] | None = None) -> None:
        """Make ready.

        Args:
            machine: paused; its vCPUs are asked which MSRs they have.
            indices: the MSRs to ask for; by default those of `msr_indices`.

        Raises KvmError: KVM refused to say something.

        """
        self._notes: Notes = []
        offered = offers(machine.kvm)
        if indices is not None:
            offered = replace(offered, msr_indices=tuple(indices))
        self._sources = [
            Source(runner.vcpu, offered, machine.irqchip, self._notes) for runner in machine.vcpus
        ]
        self._vm = machine.vm
        self._vm_parts = [
            part for part in VM_PARTS.values() if machine.irqchip or part.need is not Need.IRQCHIP
        ]
        self._cpuids: list[Data] = []
        self._make_ready()

    def read(self) -> Snapshot:
        """Take the state of a machine that is paused and has no pending I/O.

        Raises KvmError: KVM refused to say something.
        """
        if not self._run():
            # An MSR was refused that was given before.
            self._make_ready()
            if not self._run():
                raise self._batch.error(self._stopped)
        bodies = [packer.body() for packer in self._packers]
        cpuids = [packer.found["cpuid"] for packer in self._packers[:-1]]
        if self._cpuids and cpuids != self._cpuids:
            # With other leaves there may be other MSRs than the first time.
            self._cpuids = []
            self._make_ready()
            return self.read()
        self._cpuids = cpuids
        *vcpus, vm = bodies
        return Snapshot(vm, tuple(vcpus), tuple(dict.fromkeys(self._notes)))

    def _make_ready(self) -> None:
        del self._notes[:]
        readings = [
            {name: part.reading(source) for name, part in VCPU_PARTS.items()}
            for source in self._sources
        ]
        readings.append({part.name: part.reading(self._vm) for part in self._vm_parts})
        calls = [call for each in readings for reading in each.values() for call in reading.calls]
        self._before = [
            reading.before
            for each in readings
            for reading in each.values()
            if reading.before is not None
        ]
        self._batch = Batch(calls)
        self._packers, at = list[_Packer](), 0
        for each in readings:
            self._packers.append(_Packer(self._batch, at, each))
            at += sum(len(reading.calls) for reading in each.values())

    def _run(self) -> bool:
        """Make all calls; False: an MSR was refused."""
        for before in self._before:
            before()
        self._stopped = self._batch.run()
        if self._stopped == len(self._batch.calls):
            return True
        if self._batch.result(self._stopped) >= 0:
            return False
        raise self._batch.error(self._stopped)


class _Packer:
    """Puts what calls have filled into one piece, as `pack_parts` does."""

    def __init__(self, batch: Batch, first_call: int, readings: Mapping[str, Reading]) -> None:
        self.found: dict[str, Data] = {}
        """The parts that are not always in one place."""
        self._batch = batch
        self._pieces: list[Data] = []
        self._loose: list[tuple[int, str, Reading, range]] = []
        for name, reading in readings.items():
            calls = range(first_call, first_call + len(reading.calls))
            first_call = calls.stop
            if reading.view is not None:
                self._pieces += part_header(name, len(reading.view)), reading.view
            elif reading.calls:
                self._loose.append((len(self._pieces), name, reading, calls))
                self._pieces += b"", b""

    def body(self) -> bytes:
        """Return all parts that there are."""
        pieces, result = self._pieces, self._batch.result
        for at, name, reading, calls in self._loose:
            data = reading.data([result(number) for number in calls])
            if data is None:
                pieces[at : at + 2] = b"", b""
            else:
                self.found[name] = data
                pieces[at : at + 2] = part_header(name, len(data)), data
        return b"".join(pieces)


def restore(machine: Machine, state: MachineState, order: Sequence[str]) -> list[Note]:
    """Put a state into a machine of the same shape; return what the kernel did not take.

    Args:
        machine: blank; nothing of it has run.
        state: what `capture` gave.
        order: the names of all vCPU parts, see `orders`.

    Raises HarnessError: the order is not one of all parts.
    Raises Refused: KVM does not take a part; the message names it.

    """
    return StateWriter(machine, order).write(state)


EARLY: Final = ("cpuid", "tsc_khz")
"""Parts that hardly ever change, and may be put into a blank vCPU long before the others."""


_PUT_TWICE: Final = frozenset(
    ("sregs", "regs", "xcrs", "xsave", "debugregs", "pic_master", "pic_slave", "ioapic")
)


class StateWriter:
    """Puts a state into one blank machine; all that it needs for that is made beforehand."""

    def __init__(self, machine: Machine, order: Sequence[str]) -> None:
        """Make ready.

        Args:
            machine: blank; nothing of it has run.
            order: the names of all vCPU parts, see `orders`.

        Raises HarnessError: the order is not one of all parts.

        """
        if sorted(order) != sorted(VCPU_PARTS):
            raise HarnessError(
                f"an order has each of {', '.join(VCPU_PARTS)}; got {', '.join(order)}"
            )
        self._notes: Notes = []
        offered = offers(machine.kvm)
        self._early: list[Parts] = [{} for _ in machine.vcpus]
        *self._steps, clock = [
            _Step(None, part, part.writing(machine.vm)) for part in VM_PARTS.values()
        ]
        for number, runner in enumerate(machine.vcpus):
            target = Target(runner.vcpu, offered, machine.irqchip, self._notes)
            parts = map(VCPU_PARTS.__getitem__, order)
            self._steps += [_Step(number, part, part.writing(target)) for part in parts]
        self._steps.append(clock)
        if not machine.irqchip:
            self._steps = [step.without_irqchip() for step in self._steps]
        self._ready = [step for step in self._steps if step.writing.call is not None]
        self._batch = Batch([step.writing.call for step in self._ready if step.writing.call])
        # What `_load` goes through, without a look at anything that is always the same. Of the
        # parts of all vCPUs and then the VM's, these are the last.
        self._loads = [(step.owner, step.name, step.writing.load) for step in self._ready]
        self._callless = [(step.owner, step) for step in self._steps if step.writing.call is None]
        self._leasts = [
            (number, step.owner, step.name, step.writing.least)
            for number, step in enumerate(self._ready)
            if step.writing.least is not None
        ]

    def begin(self, number: int, parts: Parts) -> None:
        """Put those of `EARLY` into a vCPU; `write` leaves out what is still the same.

        Raises Refused: KVM does not take one.
        """
        early = {name: parts[name] for name in EARLY if name in parts}
        for step in self._steps:
            if step.vcpu == number and step.name in early:
                step.write(early[step.name])
        self._early[number] = early

    def rehearse(self, state: MachineState) -> None:
        """Put back what was read of the same blank machine: just what may well be put twice.

        The others do more than to be there: timers start, TSCs are matched to one another.
        """
        for step in self._steps:
            data = step.of(state)
            if data is not None and step.name in _PUT_TWICE:
                step.write(data)

    def write(self, state: MachineState) -> list[Note]:
        """Put a state there; return what the kernel did not take.

        Raises Refused: KVM does not take a part; the message names it.
        """
        if self._load(state):
            self._write_at_once(state)
        else:
            for step in self._steps:
                data = step.of(state)
                if data is not None and not self._is_there(step, data):
                    step.write(data)
        return self._notes

    def _is_there(self, step: _Step, data: bytes) -> bool:
        return step.vcpu is not None and self._early[step.vcpu].get(step.name) == data

    def _load(self, state: MachineState) -> bool:
        """Fill the payloads of all calls; False: they are not what is to be done."""
        all_parts = (*state.vcpus, state.vm)
        for index, name, load in self._loads:
            data = all_parts[index].get(name)
            if data is None or not load(data):
                return False
        for index, step in self._callless:
            data = all_parts[index].get(step.name)
            # What no call does must not be there, or be there already.
            if data is not None and not self._is_there(step, data):
                return False
        for number, index, name, least in self._leasts:
            self._batch.expect(number, least(all_parts[index][name]))
        return True

    def _write_at_once(self, state: MachineState) -> None:
        done, batch = 0, self._batch
        while (done := batch.run(done)) < len(self._ready):
            step, result = self._ready[done], batch.result(done)
            data = step.of(state)
            if result < 0 or step.writing.go_on is None or data is None:
                raise Refused(f"{step.where}{step.name}: {batch.error(done)}")
            step.writing.go_on(data, result)
            done += 1


class _Step(NamedTuple):
    """One part of a state on its way into a machine."""

    vcpu: int | None
    """None: it is the VM's."""
    part: VmPart | VcpuPart
    writing: Writing

    @property
    def name(self) -> str:
        """The part's name."""
        return self.part.name

    @property
    def owner(self) -> int:
        """Whose part it is: the vCPU's number, or -1 for the VM."""
        return -1 if self.vcpu is None else self.vcpu

    def without_irqchip(self) -> _Step:
        """Return the same for a machine without irqchip: some parts are not there."""
        if self.part.need is not Need.IRQCHIP:
            return self
        return self._replace(writing=replace(self.writing, call=None))

    @property
    def where(self) -> str:
        """What messages call the vCPU."""
        return "" if self.vcpu is None else f"vcpu {self.vcpu}: "

    def of(self, state: MachineState) -> bytes | None:
        """Return this part of a state, if it has it."""
        parts = state.vm if self.vcpu is None else state.vcpus[self.vcpu]
        return parts.get(self.name)

    def write(self, data: Data) -> None:
        """Write it; what goes wrong is a refusal that says with which part."""
        try:
            self.writing.write(data)
        except KvmError as e:
            raise Refused(f"{self.where}{self.name}: {e}") from e
        except ValueError as e:
            raise Refused(f"{self.where}{self.name}: {e}") from None
