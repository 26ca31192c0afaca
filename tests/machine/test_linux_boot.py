"""Kernels and what they are told, by Documentation/arch/x86/boot.rst."""

import struct

import pytest
from forged_elf import forge_elf

from harness.machine.errors import ImageError
from harness.machine.linux_boot import (
    BOOT_PARAMS_GPA,
    COMMAND_LINE_BYTES,
    COMMAND_LINE_GPA,
    GDT_GPA,
    PAGE_TABLES_GPA,
    LinuxBoot,
    linux_regs,
    linux_sregs,
    load_linux,
    map_file,
)
from harness.machine.memory import GuestMemory
from harness.machine.memory_map import e820_map
from kvm_ioctl.asm_kvm import kvm_sregs

MIB = 1 << 20
SIZE = 32 * MIB
RAM = e820_map(SIZE)
TEXT = 16 * MIB


@pytest.fixture
def memory(fake_vm):
    with GuestMemory(fake_vm) as memory:
        memory.add(0, SIZE)
        yield memory


def elf(**changes):
    segments = ((TEXT, b"text" * 5000, 0x8000), (TEXT + MIB, b"data", MIB))
    return memoryview(forge_elf(**{"segments": segments, "entry": TEXT + 0x43, **changes}))


def bzimage(version=0x20F, xloadflags=1, pref=TEXT, init_size=2 * MIB, setup_sects=1):
    setup = bytearray((setup_sects + 1) * 512)
    setup[0x1F1] = setup_sects
    setup[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    struct.pack_into("<H", setup, 0x236, xloadflags)
    struct.pack_into("<QI", setup, 0x258, pref, init_size)
    return memoryview(bytes(setup) + b"kernel" * 100)


def params(memory, at, kind):
    return struct.unpack_from(f"<{kind}", memory.read(BOOT_PARAMS_GPA, 4096), at)[0]


def test_an_elf_is_placed_and_entered_at_its_own_entry(memory):
    assert load_linux(memory, LinuxBoot(elf()), RAM) == TEXT + 0x43
    assert memory.read(TEXT, 8) == b"texttext"
    assert memory.read(TEXT + 4 * 4999, 4) == b"text"
    assert memory.read(TEXT + MIB, 8) == b"data\0\0\0\0"


def test_a_bzimage_is_entered_at_startup_64(memory):
    assert load_linux(memory, LinuxBoot(bzimage()), RAM) == TEXT + 0x200
    assert memory.read(TEXT, 6) == b"kernel"
    assert params(memory, 0x206, "H") == 0x20F
    assert params(memory, 0x260, "I") == 2 * MIB


@pytest.mark.parametrize("kernel", [elf(), bzimage()], ids=["elf", "bzimage"])
def test_every_kernel_is_told_of_loader_initrd_and_command_line(memory, kernel):
    initrd = memoryview(b"i" * 5000)
    load_linux(memory, LinuxBoot(kernel, initrd, "console=ttyS0"), RAM)
    at, size = params(memory, 0x218, "I"), params(memory, 0x21C, "I")
    assert (at % 4096, size) == (0, 5000)
    assert at == SIZE - 2 * 4096
    assert memory.read(at, 5000) == bytes(initrd)
    assert params(memory, 0x228, "I") == COMMAND_LINE_GPA
    assert memory.read(COMMAND_LINE_GPA, 14) == b"console=ttyS0\0"
    assert params(memory, 0x210, "B") == 0xFF
    assert params(memory, 0x1FE, "H") == 0xAA55
    assert memory.read(BOOT_PARAMS_GPA + 0x202, 4) == b"HdrS"


def test_the_memory_map_is_as_firmware_would_tell_it(memory):
    load_linux(memory, LinuxBoot(elf()), RAM)
    count = params(memory, 0x1E8, "B")
    table = memory.read(BOOT_PARAMS_GPA + 0x2D0, 20 * count)
    assert list(struct.iter_unpack("<QQI", table)) == [(r.gpa, r.size_bytes, r.kind) for r in RAM]


def test_the_entry_state_is_64_bit_with_the_low_4_gib_mapped(memory):
    entry = load_linux(memory, LinuxBoot(elf()), RAM)
    sregs = linux_sregs(kvm_sregs())
    assert (sregs.cs.selector, sregs.cs.l, sregs.ss.selector) == (0x10, 1, 0x18)
    assert sregs.cr3 == PAGE_TABLES_GPA
    gdt = struct.unpack("<4Q", memory.read(GDT_GPA, 32))
    assert (gdt[2] >> 53 & 1, gdt[3] >> 54 & 1) == (1, 1)
    for gpa in (0, TEXT, 0xFFE0_0000):
        pdpt = memory.read_int(PAGE_TABLES_GPA, 8) & -4096
        pd = memory.read_int(pdpt + 8 * (gpa >> 30), 8) & -4096
        entry_2m = memory.read_int(pd + 8 * (gpa >> 21 & 511), 8)
        assert entry_2m & -MIB * 2 == gpa
        assert entry_2m & 0x83 == 0x83
    regs = linux_regs(entry)
    assert (regs.rip, regs.rsi, regs.rflags) == (entry, BOOT_PARAMS_GPA, 2)


@pytest.mark.parametrize(
    ("boot", "said"),
    [
        (LinuxBoot(memoryview(b"x" * 4096)), "kernel: neither an ELF nor a bzImage"),
        (LinuxBoot(elf(bits=32)), "kernel: a 32-bit ELF file"),
        (LinuxBoot(elf()[:100]), "kernel: truncated, program header 0"),
        (LinuxBoot(bzimage(version=0x20B)), "boot protocol 0x20b has no 64-bit entry point"),
        (LinuxBoot(bzimage(xloadflags=0)), "has no 64-bit entry point"),
        (LinuxBoot(bzimage(pref=31 * MIB)), "needs memory up to 0x2100000, has 0x2000000"),
        (LinuxBoot(elf(), memoryview(bytes(16 * MIB))), "an initrd of 16 MiB does not fit"),
        (LinuxBoot(elf(), command_line="x" * COMMAND_LINE_BYTES), "a command line of 2049 bytes"),
    ],
)
def test_what_cannot_be_booted_is_one_line(memory, boot, said):
    with pytest.raises(ImageError, match=said):
        load_linux(memory, boot, RAM)


def test_a_file_that_cannot_be_mapped_is_one_line(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="none: No such file"):
        map_file(tmp_path / "none")
    with pytest.raises(ImageError, match="empty: cannot mmap an empty file"):
        map_file(tmp_path / "empty")
