"""A machine into a stream, and out of one."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.migrate import fingerprint
from harness.migrate.contents import Contents
from harness.migrate.errors import StreamError
from harness.migrate.memory_image import (
    Batch,
    Memory,
    PageBits,
    Span,
    batches,
    copy_batch,
    copy_bits,
    count_of_bits,
    end_of_bits,
    filled_spans,
    populated_spans,
)
from harness.migrate.notes import Note
from harness.migrate.orders import DEFAULT
from harness.migrate.sections import (
    DONE,
    HEAD,
    PAGE,
    PREP,
    Section,
    are_inside,
    expect_inside,
    unpack_pages,
)
from harness.migrate.shape import BlankMachine, Shape, backings_of
from harness.migrate.state import MachineState, Snapshot, StateReader, StateWriter, capture
from harness.migrate.stream import Sink, Source, StreamReader, StreamWriter
from kvm_ioctl.handles import Kvm

_POPULATE_PAGES: Final = 8
_MADV_POPULATE_WRITE: Final = 23  # not in Python 3.11's mmap


def write_head(writer: StreamWriter, machine: Machine) -> None:
    """Write what a destination must know first."""
    head = {"source": fingerprint.fingerprint(machine.kvm), "shape": Shape.of(machine).to_json()}
    writer.head(head)


def write_memory(writer: StreamWriter, machine: Machine) -> int:
    """Write all pages that are not zero; return how many.

    They may be written to meanwhile, see `write_pages`.
    """
    backings = backings_of(machine)
    return sum(_write_filled(writer, number, backing) for number, backing in enumerate(backings))


def _write_filled(writer: StreamWriter, number: int, backing: mmap.mmap) -> int:
    memory = Memory(backing)
    spans = (filled_spans(memory.view, span) for span in populated_spans(backing))
    with writer.gathered():
        found = batches(number, chain.from_iterable(spans))
        return sum(writer.pages_of(batch, memory) for batch in found)


def write_pages(writer: StreamWriter, number: int, memory: Memory, pages: PageBits) -> int:
    """Write pages of one mapping; return how many.

    They may be written to meanwhile, see `StreamWriter.pages`.
    """
    with writer.gathered():
        return writer.pages_of_bits(number, pages, memory)


def write_state(writer: StreamWriter, state: MachineState | Snapshot) -> None:
    """Write all but memory."""
    writer.vm(state.vm)
    vcpus: Sequence[Mapping[str, bytes] | bytes] = state.vcpus
    for number, parts in enumerate(vcpus):
        writer.vcpu(number, parts)


@dataclass(frozen=True)
class Saved:
    """What `save` did."""

    state: MachineState
    pages: int
    size_bytes: int


def save(machine: Machine, sink: Sink, sides: Mapping[str, Any] | None = None) -> Saved:
    """Write a machine that is paused.

    Args:
        machine: whose vCPUs are not running.
        sink: where to.
        sides: what its user needs to go on, by name; anything that JSON can say.

    Raises MachineError: an instruction's I/O does not end.
    Raises KvmError: KVM refused to say something.

    """
    # First of all, for it completes I/O, which writes registers and may write memory.
    state = capture(machine)
    writer = StreamWriter(sink)
    write_head(writer, machine)
    pages = write_memory(writer, machine)
    write_state(writer, state)
    for name, data in (sides or {}).items():
        writer.side(name, data)
    writer.done()
    return Saved(state, pages, writer.written_bytes)


@dataclass
class Loaded:
    """A machine out of a stream; its vCPUs have not run. Close the machine when done."""

    machine: BlankMachine
    state: MachineState
    """What the stream said."""
    sides: dict[str, Any]
    notes: list[Note]
    """What this kernel did not take."""
    source: Mapping[str, Any]
    """The fingerprint of where it comes from."""


class Loader:
    """Builds a machine from sections as they come; a context manager that leaves no VM behind.

    `finish` hands the machine over, and only then does it stay.
    """

    def __init__(
        self, kvm: Kvm, *, order: Sequence[str] = DEFAULT, dirty_ring_bytes: int = 0
    ) -> None:
        self._kvm = kvm
        self._dirty_ring_bytes = dirty_ring_bytes
        self._order = order
        self._machine: BlankMachine | None = None
        self._state_writer: StateWriter | None = None
        self._contents = Contents()
        self._memories: list[Memory] = []
        self._populates = True
        self.pages = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def take(self, section: Section) -> bool:
        """Take a section; True: it was the last one.

        Raises StreamError: it cannot be.
        Raises Refused: this kernel cannot have such a machine.
        """
        self._contents.take(section)
        if section.tag == HEAD:
            self._machine = BlankMachine(
                self._kvm, self._contents.shape, dirty_ring_bytes=self._dirty_ring_bytes
            )
            self._memories = list(map(Memory, self._machine.mappings))
            self._state_writer = StateWriter(self._machine, self._order)
        elif section.tag == PREP:
            # What comes from now on has mostly been there before, and has memory.
            self._populates = False
            *vcpus, last = self._contents.early
            if not self.is_prepared:
                self._writer.begin(len(vcpus), last)
        elif section.pages is not None:
            self.pages += section.pages.pages
        elif section.tag == PAGE:
            batch, data = unpack_pages(section, self._built().shape.backings)
            at = 0
            for view in self.place(section.where, batch):
                view[:] = data[at : at + len(view)]
                at += len(view)
            self.pages += batch.pages
        return section.tag == DONE

    @property
    def is_prepared(self) -> bool:
        """Whether all of PREP has come: that of every vCPU, and the VM's."""
        return len(self._contents.early) > self._contents.shape.vcpus

    def rehearse(self) -> None:
        """Read the blank machine's state and put it back: it has to be fast soon.

        Copying memory drives everything else out of the CPU's caches, and of all that is done for
        the first time much has to be made first.
        """
        self._writer.rehearse(StateReader(self._built()).read().state())

    def finish(self) -> Loaded:
        """Put the state into the VM, and hand that over.

        Raises StreamError: vCPUs are missing.
        Raises Refused: KVM does not take a part.
        """
        contents = self._contents
        state, machine = contents.state(), self._built()
        notes = self._writer.write(state)
        self._machine = None
        return Loaded(machine, state, contents.sides, notes, contents.source)

    @property
    def _writer(self) -> StateWriter:
        if self._state_writer is None:
            raise StreamError("there is no header")
        return self._state_writer

    def _built(self) -> BlankMachine:
        if self._machine is None:
            raise StreamError("there is no header")
        return self._machine

    def place(self, where: str, batch: Batch) -> list[memoryview]:
        """Return the machine's memory of each span.

        Raises StreamError: there is no machine yet, or it has no such pages.
        """
        return batch.views(self._memory(where, batch).view)

    def bring(self, batch: Batch, memory: Memory) -> None:
        """Take pages of a mapping of this process; see `Bearer`."""
        copy_batch(self._memory("pages past the stream", batch), memory, batch)
        self.pages += batch.pages

    def bring_bits(self, backing: int, pages: PageBits, memory: Memory) -> None:
        """Do the same with any pages; see `Bearer`."""
        end, backings = end_of_bits(pages), self._built().shape.backings
        if not are_inside(backing, end, backings):
            raise StreamError(
                f"pages past the stream: those up to {end} of mapping {backing} are outside memory"
            )
        copy_bits(self._memories[backing], memory, pages)
        self.pages += count_of_bits(pages)

    def _memory(self, where: str, batch: Batch) -> Memory:
        machine = self._built()
        expect_inside(where, batch, machine.shape.backings)
        if self._populates:
            self._populate(machine.mappings[batch.backing], batch.spans)
        return self._memories[batch.backing]

    def _populate(self, mapping: mmap.mmap, some: Sequence[Span]) -> None:
        """Take memory for long spans at once: a fault per page costs as much as the copy."""
        try:
            for first, count in some:
                if count >= _POPULATE_PAGES:
                    at, size = first * PAGE_SIZE, count * PAGE_SIZE
                    mapping.madvise(_MADV_POPULATE_WRITE, at, size)
        except OSError:
            # Before Linux 5.14. If memory is short, a fault says so later.
            self._populates = False


def load(kvm: Kvm, source: Source, *, order: Sequence[str] = DEFAULT) -> Loaded:
    """Build the machine that a stream holds.

    Raises StreamError: the stream is malformed, cut off or foreign.
    Raises Refused: this kernel does not take the machine.
    """
    with Loader(kvm, order=order) as loader:
        reader = StreamReader(source, loader.place)
        for section in reader.sections():
            if loader.take(section):
                break
        reader.expect_end()
        return loader.finish()
