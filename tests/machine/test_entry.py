import struct

import pytest

from harness.machine.entry import entry_regs, entry_sregs, prepare_entry
from harness.machine.errors import MachineError
from harness.machine.loader import EntryMode, raw_image
from harness.machine.memory import GuestMemory
from harness.machine.multiboot import MULTIBOOT_AREA
from kvm_ioctl.asm_kvm import kvm_sregs


@pytest.fixture
def memory(fake_vm):
    with GuestMemory(fake_vm) as memory:
        memory.add(0, 2 << 20)
        yield memory


def walk(memory, cr3, gva):
    """Translate as the CPU does, by APM vol. 2, 5.3.3; 2 MiB pages only."""
    table = cr3
    for shift in (39, 30):
        entry = memory.read_int(table + (gva >> shift & 511) * 8, 8)
        assert entry & 3 == 3
        assert not entry & 0x80
        table = entry & ~0xFFF
    entry = memory.read_int(table + (gva >> 21 & 511) * 8, 8)
    assert entry & 0x83 == 0x83
    return (entry & ~0x1FFFFF) | gva & 0x1FFFFF


@pytest.mark.parametrize("gva", [0, 0x100123, 0x4000_0000, 0xFEE0_0020, 0xFFFF_FFFF])
def test_the_low_4_gib_map_to_themselves(memory, gva):
    prepare_entry(memory, raw_image(b"x", 0x100000, EntryMode.LONG64))
    sregs = entry_sregs(kvm_sregs(), EntryMode.LONG64)
    assert walk(memory, sregs.cr3, gva) == gva


def descriptor(memory, sregs, selector):
    raw = memory.read_int(sregs.gdt.base + selector, 8)
    return {"type": raw >> 40 & 15, "l": raw >> 53 & 1, "db": raw >> 54 & 1, "p": raw >> 47 & 1}


@pytest.mark.parametrize("mode", [EntryMode.LONG64, EntryMode.PROTECTED32, EntryMode.MULTIBOOT32])
def test_selectors_name_what_the_segment_registers_hold(memory, mode):
    """A guest that reloads its segments gets the same ones."""
    prepare_entry(memory, raw_image(b"x", 0x100000, mode))
    sregs = entry_sregs(kvm_sregs(), mode)
    for segment in (sregs.cs, sregs.ss, sregs.ds):
        seen = descriptor(memory, sregs, segment.selector)
        assert seen == {"type": segment.type, "l": segment.l, "db": segment.db, "p": 1}
    assert sregs.cs.l == (mode is EntryMode.LONG64)


def test_apic_base_survives():
    sregs = kvm_sregs(apic_base=0xFEE0_0900)
    assert entry_sregs(sregs, EntryMode.LONG64).apic_base == 0xFEE0_0900
    assert sregs.cr0 == 0, "the argument is not changed"


def test_the_index_is_in_rdi():
    regs = entry_regs(raw_image(b"x", 0x100000, EntryMode.LONG64), 5)
    assert (regs.rdi, regs.rip, regs.rflags) == (5, 0x100000, 2)


def test_multiboot_information(memory):
    memory.add(4 << 20, 1 << 20)
    image = raw_image(b"x", 0x100000, EntryMode.MULTIBOOT32)
    prepare_entry(memory, image, "one two")
    regs = entry_regs(image, 0)
    assert regs.rax == 0x2BADB002
    assert regs.rbx in MULTIBOOT_AREA
    info = memory.read(regs.rbx, 0x58)
    flags, lower_kib, upper_kib, _, cmdline = struct.unpack_from("<IIIII", info, 0)[:5]
    assert (flags, lower_kib, upper_kib) == (0x245, 640, 1024)
    cmdline = struct.unpack_from("<I", info, 16)[0]
    assert memory.read(cmdline, 8) == b"one two\0"
    length, at = struct.unpack_from("<II", info, 44)
    entries = list(struct.iter_unpack("<IQQI", memory.read(at, length)))
    assert entries == [(20, 0, 2 << 20, 1), (20, 4 << 20, 1 << 20, 1)]
    assert memory.read(struct.unpack_from("<I", info, 64)[0], 5) == b"nsvm\0"


def test_a_command_line_that_does_not_fit_is_refused(memory):
    image = raw_image(b"x", 0x100000, EntryMode.MULTIBOOT32)
    with pytest.raises(MachineError, match="command line of 20001 bytes is too long"):
        prepare_entry(memory, image, "x" * 20000)


def test_real_mode_needs_no_tables(memory):
    prepare_entry(memory, raw_image(b"x", 0x1000))
    assert memory.read(0, 0x9000) == bytes(0x9000)
