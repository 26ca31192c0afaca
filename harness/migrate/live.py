"""Live migration: a machine moves to another harness while its guests run.

At the source, with any user of the machine going on in other threads::

    link = connect_tcp("there", 4000)
    sent = send(machine, link, sides=lambda: {"proxies": ...})
    sent.abandon()

and at the destination::

    with Kvm() as kvm, listen_tcp("0.0.0.0", 4000) as listener:
        received = receive(kvm, listener.accept())
        received.machine.vcpus[0].run()

`send` either returns, and the machine is the destination's; or raises HandoverUnknown, and nobody
can say whose it is; or raises anything else, and everything is as if it had never been called. In
the first two cases the source's vCPUs stay where they are. `handover` has the protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.errors import MachineError
from harness.machine.machine import Machine
from harness.machine.vcpu import MachineVcpu
from harness.migrate.dirty import DirtyTracker, tracker_of
from harness.migrate.errors import HandoverUnknown, LinkLost, Refused, StreamError
from harness.migrate.handover import SAID, Say, expect, put
from harness.migrate.links import Cancel, During, Link
from harness.migrate.orders import DEFAULT
from harness.migrate.precopy import Options, PacedSink, PreCopy, Round
from harness.migrate.same_process import DestinationEnd
from harness.migrate.sections import HEAD, PREP, VMST
from harness.migrate.shape import wants_whole_events
from harness.migrate.standstill import NO_COLLECTION, Laps
from harness.migrate.state import MachineState, Snapshot, StateReader
from harness.migrate.stream import StreamReader, StreamWriter
from harness.migrate.transfer import Loaded, Loader, write_head, write_state
from kvm_ioctl.handles import Kvm
from kvm_ioctl.linux_kvm import MemFlags
from kvm_ioctl.request import KvmError

Sides = Callable[[], Mapping[str, Any]]
"""Returns what the machine's user needs to go on, by name; called while the machine is paused."""

PARTS: Final = {
    "state": "pending I/O is finished, and KVM says what it knows",
    "memory": "the dirty log is read, and the pages are on their way",
    "stream": "the state is packed and on its way",
    "restore": "the destination reads it all, puts it into its VM and says READY",
    "commit": "the source says COMMIT and the destination RUNNING",
}
"""What happens while the machine stands still, in this order."""

_OTHER_FLAGS: Final = ~int(MemFlags.KVM_MEM_LOG_DIRTY_PAGES)

_LAST_WORDS_S: Final = 1.0
"""How long a broken link is listened to for the reason."""


@dataclass(frozen=True)
class Sent:
    """A machine that was given away. It is paused, for ever unless one of the methods is called."""

    machine: Machine
    state: MachineState
    """As it was sent, with notes of what the kernel did not give."""
    rounds: tuple[Round, ...]
    """While the machine ran."""
    rest: Round
    """While it stood still."""
    converged: bool
    """Whether the rest was as small as was asked for."""
    size_bytes: int
    """All that went over the link."""
    downtime_s: float
    """From the vCPUs being held back to the destination's RUNNING."""
    downtime_parts_s: Mapping[str, float]
    """What it is the sum of: see `PARTS`."""
    held_s: float
    """For so long the vCPUs were held back once before, for the destination to be prepared."""

    def exchange(self, other: Machine) -> None:
        """Go on with what the destination made of it, in this process; `other` has the old VM.

        Raises MachineError: it is a machine of another shape.
        """
        self.machine.exchange(other)
        self.machine.resume()

    def abandon(self) -> None:
        """Give whoever waits to run a vCPU an error, for it never will. Close the machine then."""
        self.machine.abandon("its machine has moved away")


def send(
    machine: Machine,
    link: Link,
    *,
    sides: Sides | None = None,
    stop: Callable[[], None] | None = None,
    options: Options | None = None,
    cancel: Cancel | None = None,
) -> Sent:
    """Give a machine away while it runs. The link is closed at the end, whatever that is.

    Args:
        machine: in whatever state, its vCPUs driven by other threads.
        link: with somebody at the other end who calls `receive`.
        sides: called once, the machine being paused; it may write to the guest's memory.
        stop: called once before the machine is paused: brings its user to where `sides` can be had.
        options: limits.
        cancel: to be set by another thread; too late once COMMIT was sent.

    Raises Refused: the destination does not take it; one line says why.
    Raises LinkLost: the other end is gone, or too slow.
    Raises StreamError: the other end says what it must not.
    Raises Cancelled: somebody wished so.
    Raises MachineError: a vCPU does not come out of KVM_RUN, or slots came or went.
    Raises HandoverUnknown: the destination may run, or not; the machine stays paused.

    """
    with link:
        return _Sending(machine, link, options or Options(), cancel or Cancel()).run(sides, stop)


class _Sending:
    """The source's part of one migration."""

    def __init__(self, machine: Machine, link: Link, options: Options, cancel: Cancel) -> None:
        self.machine, self.link, self.options, self.cancel = machine, link, options, cancel
        self.sink = PacedSink(link, options.bytes_per_s, cancel, self.hear_refusal)
        self.places = _places(machine)
        self.committed = False

    def run(self, sides: Sides | None, stop: Callable[[], None] | None) -> Sent:
        with contextlib.ExitStack() as paused:
            with self._talking("offering the machine", within_s=self.options.welcome_s):
                writer = StreamWriter(
                    self.sink, page_checksums=self.options.page_checksums, bearer=self.sink.bearer
                )
                write_head(writer, self.machine)
                expect(self.link, Say.WELCOME)
            with self._tracking() as tracker:
                copy = PreCopy(self.machine, writer, tracker, self.options)
                with self._talking("sending memory", stall_s=self.options.stall_s):
                    copy.run()
                reader, held_s = self._prepare(writer, copy)
                with self._talking("sending memory", stall_s=self.options.stall_s):
                    copy.run_on()
                if stop is not None:
                    stop()
                with NO_COLLECTION:
                    self.machine.pause(self.options.pause_s)
                    paused.callback(self.machine.resume)
                    laps = Laps()
                    snapshot = self._send_rest(writer, reader, copy, sides, laps)
                    with self._talking("waiting for READY", within_s=self.options.ready_s):
                        expect(self.link, Say.READY)
                    laps.end("restore")
                    self.cancel.check()
                    self._commit(paused.pop_all(), laps)
                # The tracking ends after that: the slots of a machine that is gone can wait.
        *rounds, rest = copy.rounds
        return Sent(
            self.machine,
            snapshot.state(),
            tuple(rounds),
            rest,
            copy.converged,
            self.link.sent_bytes,
            laps.whole_s,
            laps.seconds,
            held_s,
        )

    def _prepare(self, writer: StreamWriter, copy: PreCopy) -> tuple[StateReader, float]:
        """Have all made ready at both ends; also return for how many seconds vCPUs were held back.

        They have to be: KVM says nothing of a vCPU that runs. All is done as when the machine is
        stopped, for what was not done for long takes several times as long: caches are cold.
        """
        with self.machine.paused(self.options.pause_s):
            held = Laps()
            wants_whole_events(self.machine.vm)
            reader = StateReader(self.machine)
            found = self._capture(reader)
            held.end("rehearsal")
        with self._talking("waiting for PREPARED", within_s=self.options.ready_s):
            with writer.gathered():
                copy.rehearse()
                for number, packed in enumerate((*found.vcpus, found.vm)):
                    writer.prepare(number, packed)
            expect(self.link, Say.PREPARED)
        return reader, held.whole_s

    def _capture(self, reader: StateReader) -> Snapshot:
        for runner in self.machine.vcpus:
            runner.finish_io()
        return reader.read()

    def _send_rest(
        self,
        writer: StreamWriter,
        reader: StateReader,
        copy: PreCopy,
        sides: Sides | None,
        laps: Laps,
    ) -> Snapshot:
        """Send all that the destination does not have, the machine being stopped."""
        self.sink.hurry()
        with (
            self._talking("sending the rest", stall_s=self.options.stall_s),
            writer.gathered(),
        ):
            snapshot = self._capture(reader)
            laps.end("state")
            given = sides() if sides else {}
            copy.finish()
            laps.end("memory")
            if _places(self.machine) != self.places:
                raise MachineError("memory slots came or went while the machine was being sent")
            write_state(writer, snapshot)
            for name, data in given.items():
                writer.side(name, data)
            writer.done()
        laps.end("stream")
        return snapshot

    def _commit(self, paused: contextlib.ExitStack, laps: Laps) -> None:
        """Give the machine away; it is only resumed if the destination cannot have it."""
        whole = self.link.sent_bytes + len(SAID[Say.COMMIT])
        self.committed = True
        try:
            with self.link.during("handing over", within_s=self.options.commit_s):
                put(self.link, Say.COMMIT)
                expect(self.link, Say.RUNNING)
            laps.end("commit")
        except Refused:
            paused.close()
            raise
        except BaseException as e:
            if self.link.sent_bytes < whole:
                # What was not handed to the link never arrives, and without it nobody runs.
                paused.close()
                raise
            raise HandoverUnknown(
                f"the destination may run, or not: {_line(e)}; this side stays paused"
            ) from e

    def _talking(self, what: str, **limits: float) -> _Talking:
        return _Talking(self, self.link.during(what, cancel=self.cancel, **limits))

    def hear_refusal(self) -> None:
        """Raise what the destination says instead of taking more."""
        # READY is not due yet, so it is a refusal, or an error of its own.
        expect(self.link, Say.REFUSED)

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[DirtyTracker]:
        tracker = tracker_of(self.machine, self.options.tracking)
        tracker.__enter__()
        try:
            yield tracker
        finally:
            # Whose machine it is does not depend on that any more.
            unimportant = (KvmError,) if self.committed else ()
            with contextlib.suppress(*unimportant):
                tracker.__exit__()


class _Talking:
    """Prefers what the destination said to the broken link that it left behind."""

    __slots__ = ("_during", "_sending")

    def __init__(self, sending: _Sending, during: During) -> None:
        self._sending, self._during = sending, during

    def __enter__(self) -> None:
        self._during.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._during.__exit__()
        if isinstance(error, LinkLost):
            with (
                contextlib.suppress(LinkLost, StreamError),
                self._sending.link.during("listening to its last words", within_s=_LAST_WORDS_S),
            ):
                self._sending.hear_refusal()


def _places(machine: Machine) -> list[tuple[int, ...]]:
    """Return where a machine's memory is, whatever is tracked of it."""
    return [
        (slot.as_id, slot.number, slot.gpa, id(slot.backing), int(slot.flags) & _OTHER_FLAGS)
        for slot in machine.memory.all_slots()
    ]


@dataclass
class Received(Loaded):
    """A machine that is this side's now. Its vCPUs have not run; close it when done."""

    pages: int
    """That came, repeated ones included."""
    acknowledged: bool
    """Whether the source could be told; if not, it stays paused and knows nothing."""

    @property
    def vcpus(self) -> list[MachineVcpu]:
        """The machine's vCPUs."""
        return self.machine.vcpus


@dataclass(frozen=True)
class Patience:
    """How long a destination waits."""

    stall_s: float = 60.0
    """For the next byte, anywhere in the stream: the source may be slowed down on purpose."""
    commit_s: float = 60.0
    """For COMMIT after READY, then everything is thrown away."""
    say_s: float = 10.0
    """For a message to be taken."""


def receive(
    kvm: Kvm,
    link: Link,
    *,
    order: Sequence[str] = DEFAULT,
    dirty_ring_bytes: int = 0,
    patience: Patience | None = None,
    cancel: Cancel | None = None,
) -> Received:
    """Take a machine. The link is closed at the end, whatever that is.

    On every error there is nothing left of the machine here, and the source was told why if it
    could be.

    Args:
        kvm: where the VM is made.
        link: with somebody at the other end who calls `send`.
        order: of the parts of a vCPU, see `orders`.
        dirty_ring_bytes: of dirty rings, if it is to be sent on with them.
        patience: limits.
        cancel: to be set by another thread.

    Raises StreamError: the stream is malformed or foreign.
    Raises Refused: this kernel does not take the machine.
    Raises LinkLost: the source is gone, too slow, or gave up.
    Raises Cancelled: somebody wished so.

    """
    work = receiving(
        kvm,
        link,
        order=order,
        dirty_ring_bytes=dirty_ring_bytes,
        patience=patience,
        cancel=cancel,
    )
    while True:
        try:
            next(work)
        except StopIteration as e:
            received: Received = e.value
            return received


def receiving(
    kvm: Kvm,
    link: Link,
    *,
    order: Sequence[str] = DEFAULT,
    dirty_ring_bytes: int = 0,
    patience: Patience | None = None,
    cancel: Cancel | None = None,
) -> Generator[None, None, Received]:
    """Do what `receive` does, yielding wherever the source has to do something first."""
    limits = patience or Patience()
    with link, contextlib.ExitStack() as quiet:
        yield
        try:
            with Loader(kvm, order=order, dirty_ring_bytes=dirty_ring_bytes) as loader:
                loaded = yield from _load(link, loader, limits, cancel, quiet)
            with contextlib.ExitStack() as made:
                made.callback(loaded.machine.close)
                with link.during("waiting for COMMIT", within_s=limits.commit_s, cancel=cancel):
                    put(link, Say.READY)
                    yield
                    expect(link, Say.COMMIT)
                made.pop_all()
        except Exception as e:
            # By now there is no VM any more.
            _refuse(link, e, limits)
            raise
        acknowledged = _acknowledge(link, limits)
        return Received(**vars(loaded), pages=loader.pages, acknowledged=acknowledged)


def _load(
    link: Link,
    loader: Loader,
    limits: Patience,
    cancel: Cancel | None,
    quiet: contextlib.ExitStack,
) -> Generator[None, None, Loaded]:
    if beside := isinstance(link, DestinationEnd):
        link.taker = loader
    with link.during("receiving the machine", stall_s=limits.stall_s, cancel=cancel):
        for section in StreamReader(link, loader.place, beside=beside).sections():
            loader.take(section)
            if section.tag == HEAD:
                put(link, Say.WELCOME)
                yield
            elif section.tag == VMST:
                # The source stands still.
                quiet.enter_context(NO_COLLECTION)
            elif section.tag == PREP and loader.is_prepared:
                loader.rehearse()
                put(link, Say.PREPARED)
                yield
        return loader.finish()


def _acknowledge(link: Link, limits: Patience) -> bool:
    try:
        with link.during("saying RUNNING", within_s=limits.say_s):
            put(link, Say.RUNNING)
    except LinkLost:
        return False
    return True


def _refuse(link: Link, error: Exception, limits: Patience) -> None:
    """Tell the source, if it still listens."""
    with contextlib.suppress(LinkLost), link.during("refusing", within_s=limits.say_s):
        put(link, Say.REFUSED, _line(error))
        link.drain(_LAST_WORDS_S)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
