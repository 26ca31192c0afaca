"""Which pages were written: by guests, by userspace; through the log and through rings."""

import threading

import pytest
from counting_guest import CODE, CODE_GPA, COUNTERS, DEADLINE_S, STOP, counting, expect_sound_rings
from hypothesis import given
from hypothesis import strategies as st

from harness.machine.addresses import Gpa
from harness.machine.dirty_rings import DirtyRings
from harness.machine.errors import GuestMemoryError, MachineError
from harness.machine.loader import raw_image
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE, GuestMemory
from harness.machine.memory_lock import MemoryLock
from harness.migrate.dirty import DirtyLog, DirtyRing, Tracking, bits_of, count, join, tracker_of
from harness.migrate.memory_image import bits_of_pages, pages_of_bits
from kvm_ioctl.exits import DirtyRingFullExit, HltExit
from kvm_ioctl.handles import DirtyPage
from kvm_ioctl.request import KvmError

RING_BYTES = 64 << 10
GUESTS_PAGES = {counter // PAGE_SIZE for counter in COUNTERS}


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=8))
def test_bits_are_found(words):
    bitmap = b"".join(word.to_bytes(8, "little") for word in words)
    naive = [n for n in range(len(bitmap) * 8) if bitmap[n // 8] >> n % 8 & 1]
    assert list(pages_of_bits(bits_of(bitmap))) == naive


def test_full_words_are_found():
    assert list(pages_of_bits(bits_of(b"\xff" * 16))) == list(range(128))


def test_bits_are_found_far_away():
    far = 300_000
    bitmap = bytearray(far)
    bitmap[far - 1] = 0x81
    assert list(pages_of_bits(bits_of(bitmap))) == [far * 8 - 8, far * 8 - 1]


def bits(pages):
    return {number: bits_of_pages(some) for number, some in pages.items()}


def sets(pages):
    return {number: set(pages_of_bits(some)) for number, some in pages.items()}


def test_pages_are_joined_by_mapping():
    pages = bits({0: {1}, 2: {5}})
    join(pages, bits({0: {1, 2, 10_000}, 1: {9}}))
    assert sets(pages) == {0: {1, 2, 10_000}, 1: {9}, 2: {5}}
    assert count(pages) == 5


# On a KVM


def trackers():
    yield pytest.param((0, lambda machine: DirtyLog(machine, manual=True)), id="log-manual")
    yield pytest.param((0, lambda machine: DirtyLog(machine, manual=False)), id="log-automatic")
    yield pytest.param((RING_BYTES, DirtyRing), id="ring")


@pytest.fixture(params=trackers())
def tracked(kvm, request):
    """A machine that counts, and its tracker, not begun."""
    if request.param[0]:
        expect_sound_rings()
    with counting(kvm, dirty_ring_bytes=request.param[0]) as guest:
        yield guest, request.param[1](guest.machine)


kvm_tier = pytest.mark.kvm


@kvm_tier
def test_what_the_guest_writes_is_dirty_once(tracked):
    guest, tracker = tracked
    with tracker:
        guest.expect_progress()
        guest.expect_progress()
        guest.stop()
        assert sets(tracker.collect()) == {0: GUESTS_PAGES | {STOP // PAGE_SIZE}}
        assert sets(tracker.collect()) == {}
        guest.start()
        guest.stop()
        assert sets(tracker.collect())[0] >= GUESTS_PAGES


@kvm_tier
def test_what_userspace_writes_is_dirty(tracked):
    guest, tracker = tracked
    guest.stop()
    memory = guest.machine.memory
    memory.write(Gpa(0x50000), b"before")
    with tracker:
        memory.write(Gpa(0x20FFF), b"ab")
        memory.write_int(Gpa(0x30000), 8, 1)
        memory.write(Gpa(0x60000), b"")
        memory.zero(Gpa(0x40000), 4096)  # is zero
        memory.zero(Gpa(0x50000), 4096)
        assert sets(tracker.collect()) == {0: {0x20, 0x21, 0x30, 0x50}}
        assert sets(tracker.collect()) == {}


@kvm_tier
def test_all_is_as_before_afterwards(tracked):
    guest, tracker = tracked
    before = guest.machine.memory.all_slots()
    with tracker:
        assert [slot.flags for slot in guest.machine.memory.all_slots()] == [1]
        guest.expect_progress()
    assert guest.machine.memory.all_slots() == before
    guest.expect_unharmed()
    with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG"):
        guest.machine.vm.get_dirty_log(0, 256)
    with tracker:
        guest.stop()
        tracker.collect()
        assert sets(tracker.collect()) == {}
    guest.start()


@kvm_tier
def test_nobody_tracks_twice(tracked):
    guest, tracker = tracked
    with tracker:
        with pytest.raises(GuestMemoryError, match="being tracked already"):
            tracker_of(guest.machine).__enter__()
        guest.expect_progress()
        assert tracker.collect()


@kvm_tier
def test_two_slots_of_one_mapping_are_one_memory(kvm):
    image = raw_image(CODE, CODE_GPA)
    with Machine(kvm, image=image, memory_mib=1) as machine:
        [slot] = machine.memory.all_slots()
        machine.memory.alias(slot, as_id=0, gpa=Gpa(0x10_0000))
        with tracker_of(machine) as tracker:
            machine.memory.write_int(Gpa(0x10_0000 + STOP), 1, 1)
            machine.vcpus[0].run(DEADLINE_S)
            machine.memory.write(Gpa(0x30000), b"x")
            assert sets(tracker.collect()) == {0: GUESTS_PAGES | {STOP // PAGE_SIZE, 0x30}}


@kvm_tier
def test_a_slot_that_came_meanwhile_is_an_error(kvm):
    with Machine(kvm, memory_mib=1) as machine, tracker_of(machine) as tracker:
        machine.memory.add(Gpa(0x40_0000), PAGE_SIZE)
        machine.memory.write(Gpa(0x40_0000), b"x")
        with pytest.raises(MachineError, match=r"slot 1 .* came while pages were tracked"):
            tracker.collect()


@kvm_tier
def test_the_kind_is_the_machines(kvm):
    with Machine(kvm, memory_mib=1) as machine:
        assert isinstance(tracker_of(machine), DirtyLog)
        with pytest.raises(MachineError, match="has no dirty rings"):
            tracker_of(machine, Tracking.RING)
    with Machine(kvm, memory_mib=1, dirty_ring_bytes=RING_BYTES) as machine:
        assert isinstance(tracker_of(machine), DirtyRing)
        with pytest.raises(MachineError, match="has no dirty log"):
            tracker_of(machine, Tracking.LOG)


@kvm_tier
def test_a_ring_that_no_kernel_has_is_refused(kvm):
    with pytest.raises(MachineError, match="this kernel has 1048576 at most"):
        Machine(kvm, memory_mib=1, dirty_ring_bytes=1 << 30)


@kvm_tier
def test_a_full_ring_is_answered_and_not_shown(kvm, monkeypatch):
    with Machine(kvm, vcpus=1, memory_mib=1, dirty_ring_bytes=RING_BYTES) as machine:
        exits = iter([DirtyRingFullExit(), DirtyRingFullExit(), HltExit()])
        monkeypatch.setattr(machine.vcpus[0].vcpu, "enter", lambda: next(exits))
        assert isinstance(machine.vcpus[0].run(5), HltExit)
        assert machine.dirty_rings.times_full == 2


class FakeRing:
    def __init__(self, *harvests):
        self.harvests = list(harvests)

    def harvest(self):
        return self.harvests.pop(0) if self.harvests else []


class FakeVcpu:
    def __init__(self, ring):
        self.ring = ring

    def map_dirty_ring(self, size_bytes):
        return self.ring


class FakeVm:
    resets = 0

    def reset_dirty_rings(self):
        self.resets += 1


def test_pages_of_a_full_ring_are_kept_for_who_asks():
    vm = FakeVm()
    one = FakeRing([DirtyPage(0, 1, 5), DirtyPage(0, 1, 5)], [], [DirtyPage(1, 1, 5)])
    rings = DirtyRings(vm, [FakeVcpu(one), FakeVcpu(FakeRing([DirtyPage(0, 2, 7)]))], 4096)
    rings.answer_full()
    assert rings.take() == {(0, 1, 5), (0, 2, 7)}
    assert vm.resets == 1  # the second harvest found nothing
    assert rings.take() == {(1, 1, 5)}
    assert rings.take() == set()


# Memory that stands still


def test_a_frozen_memory_is_changed_by_nobody_else(fake_memory):
    memory = fake_memory
    memory.lock.freeze(1)
    memory.write(Gpa(0), b"mine")
    done = threading.Event()
    thread = threading.Thread(target=lambda: (memory.write(Gpa(0), b"late"), done.set()))
    thread.start()
    assert not done.wait(0.1)
    assert memory.read(Gpa(0), 4) == b"mine"
    memory.lock.thaw()
    assert done.wait(5)
    assert memory.read(Gpa(0), 4) == b"late"
    thread.join()


def test_freezing_has_a_deadline(fake_memory):
    lock = MemoryLock()
    thread = threading.Thread(target=lambda: lock.freeze(1))
    thread.start()
    thread.join()
    with pytest.raises(GuestMemoryError, match=r"frozen by another thread for 0\.05 s"):
        lock.freeze(0.05)
    lock.thaw()
    lock.freeze(0.05)


@pytest.fixture
def fake_memory():
    class Slots:
        def set_user_memory_region(self, slot, gpa, hva, size, flags=0, as_id=0):
            pass

    with GuestMemory(Slots()) as memory:
        memory.add(Gpa(0), 1 << 20)
        yield memory
