"""A whole PC on this machine's KVM; none of this needs SVM."""

import base64
import errno
import threading
import time

import pytest

from guest_images import ElfClass
from harness.errors import HostError
from harness.machine.boot import boot, pack_image, unpack_image
from harness.machine.loader import EntryMode, raw_image
from harness.machine.pc import TEST_MEMORY, Pc
from harness.machine.pc_run import Ending, PcRunner

pytestmark = pytest.mark.kvm

LINES = [
    "serial loop-back: ok",
    "multiboot information: ok",
    "arguments: {arguments}",
    "fw_cfg signature: ok",
    "memory MiB: {memory_mib}",
    "multiboot memory information: ok",
    "mem_upper is the map's: ok",
    "memory map: ok",
    "the last word of low memory: ok",
    "fw_cfg file etc/e820: ok",
    "cmos: ok",
    "PIT by PIC: ok",
    "PIT by I/O APIC: ok",
    "APIC timer: ok",
    "CPUs online: {cpus}",
    "IPIs: ok",
]


@pytest.fixture
def run(kvm, images):
    """A function that boots guest `pc` to its end; returns that and what it printed."""

    def run(arguments="", vcpus=1, memory_mib=16, timeout_s=20.0, name="pc"):
        printed = []
        line = f"image {arguments}"
        image = images(name, ElfClass.ELF32)
        with Pc(kvm, image, vcpus=vcpus, memory_mib=memory_mib, command_line=line) as pc:
            end = PcRunner(pc, printed.append).run(timeout_s)
        return end, "".join(printed)

    return run


@pytest.mark.parametrize(("cpus", "memory_mib"), [(1, 16), (2, 128), (5, 5 << 10)])
def test_an_image_finds_all_that_a_pc_has(run, cpus, memory_mib):
    end, text = run("status=5", vcpus=cpus, memory_mib=memory_mib)
    expected = "\n".join(LINES).format(arguments="status=5", cpus=cpus, memory_mib=memory_mib)
    assert text == expected + "\n"
    assert (end.ending, end.exit_code) == (Ending.EXIT, 11)


def test_a_triple_fault_is_told(run):
    end, _ = run("triple-fault", vcpus=2)
    assert end.ending is Ending.SHUTDOWN
    assert end.text == "vCPU 0: triple fault (KVM_EXIT_SHUTDOWN)"
    assert len(end.where) == 2


def test_a_request_for_a_reset_is_told(run):
    end, _ = run("reset")
    assert end.ending is Ending.RESET
    assert "OUT of 0x6 (1 bytes) to port 0xcf9" in end.text


def test_a_hang_says_where_every_vcpu_is(run, images):
    from harness.machine.loader import read_image

    image = read_image(images("pc", ElfClass.ELF32))
    start = time.monotonic()
    end, text = run("hang", vcpus=2, timeout_s=2)
    assert 2 <= time.monotonic() - start < 10
    assert end.ending is Ending.TIMEOUT
    assert end.text == "the guest did not end within 2 s"
    assert text.endswith("IPIs: ok\n"), "the console is complete all the same"
    first, second = end.where
    assert first.rip == image.symbol("hang")
    assert first.text.startswith(f"at {first.rip:#x}, cr0=")
    assert "code eb fe" in first.text
    assert image.symbol_at(first.rip) == "hang+0x0"
    assert second.text.startswith("in HLT before 0x")
    assert image.symbol_at(second.rip).startswith("ap_main+")


def test_a_cpu_that_nobody_starts_waits(run):
    end, text = run(vcpus=3, name="loop", timeout_s=0.5)
    assert text == ""
    assert [w.text for w in end.where[1:]] == ["waits for INIT"] * 2


@pytest.mark.parametrize("elf_class", ElfClass)
def test_plain_elf_images_run_too(kvm, images, elf_class):
    printed = []
    with Pc(kvm, images("hello", elf_class), memory_mib=4) as pc:
        end = PcRunner(pc, printed.append).run(10)
    assert (end.exit_code, "".join(printed)) == (85, "hello from the guest\n")


def code32(code):
    return raw_image(bytes.fromhex(code), 0x100000, EntryMode.PROTECTED32)


def test_memory_that_is_not_there_reads_as_ones(kvm):
    # mov eax, [0xd0000000] / mov [0xd0000000], eax / inc eax / out 0xf4, eax
    code = "a1 000000d0 a3 000000d0 40 e7f4 f4"
    with Pc(kvm, code32(code), memory_mib=2) as pc:
        assert PcRunner(pc, print).run(10).exit_code == 1


def test_the_memory_of_the_test_device_keeps_what_is_written(kvm):
    # mov dword [0xff000010], 0x15 / mov eax, [0xff000010] / out 0xf4, eax
    code = "c705 100000ff 15000000 a1 100000ff e7f4 f4"
    with Pc(kvm, code32(code), memory_mib=2) as pc:
        assert PcRunner(pc, print).run(10).exit_code == 0x2B
        assert pc.test_memory[0x10] == 0x15
        assert pc.read_mmio(TEST_MEMORY.stop - 1, 4) == b"\0\xff\xff\xff"


def test_what_kvm_cannot_go_on_with_is_told(kvm):
    # jmp 0xd0000000: code outside memory cannot be fetched by the emulator
    code = "b8 000000d0 ffe0"
    with Pc(kvm, code32(code), memory_mib=2) as pc:
        end = PcRunner(pc, print).run(10)
    assert end.ending is Ending.STOPPED
    assert end.text.startswith("vCPU 0: InternalErrorExit(")


def test_the_console_comes_while_the_guest_runs(kvm):
    # mov dx, 0x3f8 / mov al, 'a' / out dx, al / mov al, 0xff / out dx, al / jmp self
    code = "66ba f803 b061 ee b0ff ee ebfe"
    seen = threading.Event()
    printed = []

    def on_text(text):
        printed.append(text)
        seen.set()

    with Pc(kvm, code32(code), memory_mib=2) as pc:
        thread = threading.Thread(target=PcRunner(pc, on_text).run, args=(3,))
        thread.start()
        assert seen.wait(2), "nothing came before the end"
        thread.join(20)
    assert "".join(printed).encode("utf-8", "surrogateescape") == b"a\xff"


def test_an_image_travels_as_text():
    data = bytes(range(256)) * 40
    assert unpack_image(pack_image(data)) == data
    assert len(pack_image(data)) < len(base64.b64encode(data))


def test_boot_emits_the_console_and_returns_the_end(images):
    events = []
    data = images("pc", ElfClass.ELF32).read_bytes()
    end = boot(
        lambda kind, **data: events.append((kind, data)),
        image=pack_image(data),
        name="pc",
        command_line="status=3",
        vcpus=2,
        memory_mib=16,
        timeout_s_of_guest=20,
    )
    assert (end["ending"], end["exit_code"], end["where"]) == ("exit", 7, ())
    assert {kind for kind, _ in events} == {"console"}
    assert "arguments: status=3\n" in "".join(data["text"] for _, data in events)


def test_a_host_that_cannot_give_such_a_pc_is_at_fault(kvm, images, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("harness.machine.boot.Pc", refuse)
    image = pack_image(images("pc", ElfClass.ELF32).read_bytes())
    with pytest.raises(HostError, match=r"no PC with 7 vCPUs and 99 MiB here: .*Cannot allocate"):
        boot(print, image, "pc", "", vcpus=7, memory_mib=99, timeout_s_of_guest=1)


def test_more_cpus_than_the_image_has_stacks_for_are_refused_by_it(run):
    end, text = run(vcpus=65)
    assert text.endswith("a stack for every CPU: FAILED\n")
    assert end.exit_code == 3


def test_a_pc_tells_what_its_devices_hold_and_another_takes_it(kvm):
    with Pc(kvm, None, memory_mib=16) as pc, Pc(kvm, None, memory_mib=16) as other:
        pc.bus.out(0xE0, 1, b"\x5a")
        pc.bus.out(0x510, 2, b"\x00\x00")
        pc.bus.out(0x70, 1, b"\x40")
        pc.bus.out(0x3FB, 1, b"\x03")
        pc.write_mmio(TEST_MEMORY.start, b"kept")
        assert other.device_state() != pc.device_state()
        other.restore_devices(pc.device_state())
        assert other.device_state() == pc.device_state()
        assert set(pc.device_state()) == {"fw_cfg", "cmos", "latch", "com1", "test_memory"}
        assert other.bus.read(0xE0, 1) == b"\x5a"
        assert other.bus.read(0x511, 1) == b"Q"
