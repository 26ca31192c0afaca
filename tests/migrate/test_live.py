"""Live migration of plain machines on this machine's KVM, within the process and between two."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from counting_guest import COUNTERS, counting, expect_sound_rings, resumed

from harness.errors import HarnessError
from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.threads import VcpuThread
from harness.migrate import live
from harness.migrate.connections import child, connect_tcp, connect_unix, pair
from harness.migrate.difference import (
    EXCUSED,
    field_differences,
    memory_differences,
    state_differences,
)
from harness.migrate.dirty import Tracking
from harness.migrate.errors import Refused
from harness.migrate.fields import state_fields
from harness.migrate.links import Cancel
from harness.migrate.live import PARTS
from harness.migrate.live_move import hand_over
from harness.migrate.precopy import Options
from harness.migrate.state import capture

pytestmark = pytest.mark.kvm

RING_BYTES = 64 << 10
WRITTEN = range(0x40000, 0x60000, 0x1000)
DESTINATION = Path(__file__).with_name("live_destination.py")


@pytest.fixture(params=[0, RING_BYTES], ids=["log", "ring"])
def guest(kvm, request):
    if request.param:
        expect_sound_rings()
    with counting(kvm, dirty_ring_bytes=request.param) as running:
        yield running


def test_a_running_machine_arrives_as_it_was_and_goes_on(guest):
    handed = hand_over(guest.machine, sides=lambda: {"mine": guest.counters()})
    sent, received = handed.sent, handed.received
    with received.machine as there:
        assert memory_differences(guest.machine, there) == []
        assert state_differences(sent.state, capture(there)) == []
        assert received.acknowledged
        before = guest.counters()
        assert received.sides == {"mine": before}
        sent.abandon()
        with pytest.raises(MachineError, match="its machine has moved away"):
            guest.thread.join(10)
        assert guest.counters() == before
        assert resumed(there).stop() > max(before)


def test_who_uses_the_machine_goes_on_with_the_one_that_arrived(guest):
    for _ in range(3):
        before = guest.counters()[0]
        hand_over(guest.machine).go_on()
        guest.expect_unharmed()
        assert guest.counters()[0] > before


def test_what_was_sent_is_counted(guest):
    handed = hand_over(
        guest.machine, options=Options(few_pages=0, most_rounds=3, bytes_per_s=100_000)
    )
    sent = handed.sent
    handed.go_on()
    assert len(sent.rounds) == 3
    assert not sent.converged
    everything, *again = sent.rounds
    assert everything.pages == len(COUNTERS) + 1  # and the code
    assert all(1 <= done.pages <= len(COUNTERS) + 1 for done in (*again, sent.rest))
    sizes = [done.size_bytes for done in (*sent.rounds, sent.rest)]
    assert all(done.size_bytes == done.pages * 4096 for done in (*sent.rounds, sent.rest))
    assert sum(sizes) < sent.size_bytes < sum(sizes) + (1 << 20)
    assert 0 < sent.downtime_s < 10
    # And one that the rehearsal sends.
    assert handed.received.pages == sum(done.pages for done in (*sent.rounds, sent.rest)) + 1
    assert list(sent.downtime_parts_s) == list(PARTS)
    assert sum(sent.downtime_parts_s.values()) == pytest.approx(sent.downtime_s)
    assert 0 < sent.held_s < 10


def test_it_converges_when_few_enough_pages_are_left(guest):
    handed = hand_over(guest.machine, options=Options(few_pages=len(COUNTERS) + 1))
    assert handed.sent.converged
    assert len(handed.sent.rounds) == 1
    handed.go_on()


def test_time_is_a_limit_too(guest):
    started = time.monotonic()
    options = Options(few_pages=0, most_rounds=1_000_000, most_seconds=0.3, bytes_per_s=100_000)
    handed = hand_over(guest.machine, options=options)
    handed.go_on()
    assert not handed.sent.converged
    assert time.monotonic() - started >= 0.3


def test_the_bandwidth_can_be_limited(guest):
    guest.machine.memory.write(Gpa(0x20000), b"x" * (64 << 10))
    options = Options(few_pages=1000, bytes_per_s=400_000)
    handed = hand_over(guest.machine, options=options)
    handed.go_on()
    everything = handed.sent.rounds[0]
    assert everything.size_bytes / everything.seconds < 450_000


def test_a_kind_of_tracking_that_the_machine_has_not_is_refused(guest):
    wrong = Tracking.RING if guest.machine.dirty_rings is None else Tracking.LOG
    with pytest.raises(MachineError, match="dirty rings"):
        hand_over(guest.machine, options=Options(tracking=wrong))
    guest.expect_unharmed()


def test_a_machine_that_is_being_sent_is_not_sent_twice(guest):
    cancel, (ours, theirs) = Cancel(), pair()
    slow = Options(bytes_per_s=20_000)
    errors = []

    def send():
        with pytest.raises(live.LinkLost) as caught:
            live.send(guest.machine, ours, options=slow, cancel=cancel)
        errors.append(caught.value)

    thread = threading.Thread(target=send)
    with theirs:
        receiver = threading.Thread(target=read_until_pages, args=(theirs,))
        thread.start()
        receiver.start()
        receiver.join()
        with pytest.raises(MachineError, match="being tracked already"):
            hand_over(guest.machine)
    thread.join()
    assert len(errors) == 1
    guest.expect_unharmed()


def read_until_pages(link):
    """Be a destination that has said WELCOME, and reads no further than the first pages."""
    from harness.migrate.handover import Say, put
    from harness.migrate.stream import PAGE, StreamReader

    for number, section in enumerate(StreamReader(link).sections()):
        if number == 0:
            put(link, Say.WELCOME)
        if section.tag == PAGE:
            return


def test_memory_written_by_the_side_that_is_asked_for_its_knowledge_arrives(guest):
    def sides():
        guest.machine.memory.write(Gpa(0x30000), b"in the last moment")
        return {}

    handed = hand_over(guest.machine, sides=sides)
    assert handed.received.machine.memory.read(Gpa(0x30000), 18) == b"in the last moment"
    handed.go_on()


def test_memory_written_through_python_meanwhile_arrives(kvm):
    with counting(kvm) as guest:
        stop = threading.Event()

        def write():
            number = 0
            while not stop.is_set():
                number += 1
                for at in WRITTEN:
                    guest.machine.memory.write_int(Gpa(at), 8, number)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(5):
                handed = hand_over(guest.machine, options=Options(few_pages=1000))
                assert memory_differences(guest.machine, handed.received.machine) == []
                handed.go_on()
        finally:
            stop.set()
            writer.join()
        numbers = {guest.machine.memory.read_int(Gpa(at), 8) for at in WRITTEN}
        assert len(numbers) == 1


def test_several_vcpus_and_an_irqchip(kvm):
    with counting(kvm, vcpus=2, irqchip=True) as guest:
        handed = hand_over(guest.machine)
        assert state_differences(handed.sent.state, capture(handed.received.machine)) == []
        handed.go_on()
        guest.expect_unharmed()


def test_a_machine_at_rest_is_sent_as_well(kvm):
    with counting(kvm) as guest:
        counted = guest.stop()
        handed = hand_over(guest.machine)
        assert handed.sent.rest.pages == 0
        handed.go_on()
        guest.start()
        assert guest.stop() > counted


# Between two processes


@contextmanager
def destination(*arguments):
    process = subprocess.Popen(
        [sys.executable, str(DESTINATION), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def expect_arrived(sent, guest, said):
    """What the other process says of the machine is what it was here."""
    assert field_differences(state_fields(sent.state), said["state"], EXCUSED) == []
    machine = guest.machine
    assert said["memory"] == {
        str(int(slot.gpa)): hashlib.sha256(slot.backing[:]).hexdigest()
        for slot in machine.memory.all_slots()
    }
    assert said["before"] == guest.counters()
    assert said["after"] > max(said["before"])
    assert said["sides"] == {"mine": [1]}


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_between_processes_over_a_socket(guest, tmp_path, kind):
    place = tmp_path / "socket" if kind == "unix" else "127.0.0.1"
    with destination(kind, place) as process:
        if kind == "unix":
            link = connect_unix(place)
        else:
            link = connect_tcp("127.0.0.1", int(process.stdout.readline()))
        sent = live.send(guest.machine, link, sides=lambda: {"mine": [1]})
        said = json.loads(process.stdout.readline())
    sent.abandon()
    with pytest.raises(MachineError):
        guest.thread.join(10)
    expect_arrived(sent, guest, said)


def test_between_processes_over_the_standard_streams(guest, tmp_path):
    said = tmp_path / "said"
    with child([sys.executable, str(DESTINATION), "stdio", str(said)]) as (link, process):
        sent = live.send(guest.machine, link, sides=lambda: {"mine": [1]})
        assert process.wait(30) == 0
    sent.abandon()
    expect_arrived(sent, guest, json.loads(said.read_text()))


def test_the_destination_may_keep_the_guest_that_the_source_abandons(guest):
    handed = hand_over(guest.machine)
    handed.sent.abandon()
    with pytest.raises(HarnessError):
        guest.thread.join(10)
    thread = VcpuThread(guest.machine.vcpus[0], lambda vcpu: vcpu.run(5))
    thread.start()
    with pytest.raises(MachineError, match="moved away"):
        thread.join(10)
    handed.received.machine.close()


def test_a_destination_that_cannot_have_the_machine_says_why(guest):
    ours, theirs = pair()
    errors = []

    def receive():
        with pytest.raises(Refused) as caught:
            live.receive(guest.machine.kvm, theirs, dirty_ring_bytes=1 << 40)
        errors.append(str(caught.value))

    thread = threading.Thread(target=receive)
    thread.start()
    with pytest.raises(Refused, match=r"refused: no VM of this shape: a dirty ring of \d+ bytes"):
        live.send(guest.machine, ours)
    thread.join(10)
    assert len(errors) == 1
    guest.expect_unharmed()
