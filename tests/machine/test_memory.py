import mmap
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import IgnoresSlots

from harness.machine.errors import GuestMemoryError
from harness.machine.guest_abi import report
from harness.machine.memory import PAGE_SIZE, SMRAM_AS_ID, GuestMemory


@pytest.fixture
def memory(fake_vm):
    with GuestMemory(fake_vm) as memory:
        yield memory


def test_slots_are_numbered_and_given_to_kvm(memory, fake_vm):
    first = memory.add(0, 0x2000)
    second = memory.add(0x10000, 0x1000, flags=1)
    assert fake_vm.slots == {
        (0, 0): (0, first.hva, 0x2000, 0),
        (0, 1): (0x10000, second.hva, 0x1000, 1),
    }


def test_a_removed_slots_number_is_used_again(memory, fake_vm):
    first = memory.add(0, 0x1000)
    memory.add(0x1000, 0x1000)
    memory.remove(first)
    assert memory.add(0x5000, 0x1000).number == 0
    assert set(fake_vm.slots) == {(0, 0), (0, 1)}


def test_an_alias_shows_the_same_bytes(memory, fake_vm):
    slot = memory.add(0x30000, 0x10000)
    alias = memory.alias(slot, as_id=SMRAM_AS_ID)
    memory.write(0x38000, b"\x0f\xaa", as_id=SMRAM_AS_ID)
    assert memory.read(0x38000, 2) == b"\x0f\xaa"
    assert fake_vm.slots[1, 0] == fake_vm.slots[0, 0]
    memory.remove(slot)
    assert memory.read(0x38000, 2, as_id=SMRAM_AS_ID) == b"\x0f\xaa"
    memory.remove(alias)
    assert slot.backing.closed


def test_address_spaces_are_separate(memory):
    memory.add(0, 0x1000)
    memory.add(0, 0x1000, as_id=SMRAM_AS_ID)
    memory.write(0, b"x", as_id=SMRAM_AS_ID)
    assert memory.read(0, 1) == b"\0"


@pytest.mark.parametrize(
    ("gpa", "size", "message"),
    [
        (0x800, 0x1000, "slot at gpa 0x800 of 0x1000 bytes (as_id 0): address and size must be"),
        (0x4000, 0x801, "whole pages"),
        (0x4000, 0, "whole pages"),
        (-0x1000, 0x1000, "whole pages"),
        (0x1000, 0x3000, "overlaps slot 0 (as_id 0, 0x2000-0x2fff)"),
        (0x2000, 0x1000, "overlaps slot 0"),
    ],
)
def test_a_slot_in_the_wrong_place_is_refused(memory, gpa, size, message):
    memory.add(0x2000, 0x1000)
    with pytest.raises(GuestMemoryError) as caught:
        memory.add(gpa, size)
    assert message in str(caught.value)


def test_an_access_outside_names_gpa_and_slot(memory):
    memory.add(0x2000, 0x1000)
    with pytest.raises(GuestMemoryError) as caught:
        memory.write(0x2FFE, b"abc")
    assert str(caught.value) == (
        "write of 0x3 bytes at gpa 0x2ffe (as_id 0): no slot at 0x3000, "
        "nearest is slot 0 (as_id 0, 0x2000-0x2fff)"
    )
    assert memory.read(0x2FFE, 2) == b"\0\0", "nothing is written of what does not fit"


def test_an_access_without_slots_says_so(memory):
    with pytest.raises(GuestMemoryError, match="there are no slots"):
        memory.read(0, 1, as_id=1)


def test_zeroing_leaves_zero_pages_unpopulated(memory):
    slot = memory.add(0, 64 * PAGE_SIZE, advice=[mmap.MADV_NOHUGEPAGE])
    memory.write(5 * PAGE_SIZE + 1, b"x")
    memory.zero(1, 64 * PAGE_SIZE - 1)
    assert memory.read(0, 64 * PAGE_SIZE) == bytes(64 * PAGE_SIZE)
    assert private_pages(slot.hva) == 1


def private_pages(hva):
    """Anonymous pages of a mapping of this process, from /proc/self/smaps."""
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        for line in lines:
            first = line.split()[0]
            if "-" in first and ":" not in first:
                start, end = (int(x, 16) for x in first.split("-"))
                inside = start <= hva < end
            elif inside and line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024 // PAGE_SIZE
    raise AssertionError("no such mapping")


def test_structs_are_copied_both_ways(memory):
    memory.add(0, 0x1000)
    memory.write_struct(0x10, report(index=7, exit_code=0x81))
    copy = memory.read_struct(report, 0x10)
    assert (copy.index, copy.exit_code) == (7, 0x81)
    copy.index = 8
    assert memory.read_int(0x10 + report.index.offset, 4) == 7


SIZE = 4 * PAGE_SIZE
WRITES = st.lists(st.tuples(st.integers(0, SIZE + 10), st.binary(max_size=3 * PAGE_SIZE)))


@settings(deadline=None)
@given(WRITES)
def test_memory_behaves_like_one_byte_array(writes):
    """Two slots that touch read and write like one; what leaves them changes nothing."""
    expected = bytearray(SIZE)
    with GuestMemory(IgnoresSlots()) as memory:
        memory.add(0, PAGE_SIZE)
        memory.add(PAGE_SIZE, SIZE - PAGE_SIZE)
        for at, data in writes:
            if at + len(data) <= SIZE or not data:
                memory.write(at, data)
                expected[at : at + len(data)] = data
            else:
                with pytest.raises(GuestMemoryError):
                    memory.write(at, data)
        assert memory.read(0, SIZE) == expected[:SIZE]


def test_memory_of_huge_pages_lies_as_the_guest_sees_it():
    """Else KVM maps it page by page. In a process of its own: holes in this one's are no matter."""
    code = f"""
from harness.machine.memory import HUGE_PAGE_SIZE, GuestMemory
class IgnoresSlots:
    def set_user_memory_region(self, *args, **kwargs): pass
with GuestMemory(IgnoresSlots()) as memory:
    low = memory.add(0, 0xA0000, huge=True)
    high = memory.add(0xC0000, (64 << 20) - 0xC0000, huge=True)
    print((low.hva - low.gpa) % HUGE_PAGE_SIZE, (high.hva - high.gpa) % HUGE_PAGE_SIZE)
    memory.write(0xC0000, b"x" * {PAGE_SIZE})
    print(memory.read(0xC0000, 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0 0\nb'x'\n", "")
