"""A PC for Linux on this machine's KVM, with a few instructions in the place of a kernel."""

import pytest
from forged_elf import forge_elf

from harness.machine.linux_boot import LinuxBoot
from harness.machine.linux_pc import SHARED_GPA, LinuxPc
from harness.machine.pc_run import Ending, PcRunner
from kvm_ioctl.handles import Kvm

pytestmark = pytest.mark.kvm

KERNEL_GPA = 16 << 20

# What Linux finds first: boot_params by RSI, in them the header's magic number and the address of
# the command line. Its first letter is printed, then one byte goes out on the second serial port.
TELLS = bytes.fromhex(
    "8b8602020000"  # mov eax, [rsi+0x202]
    "3d48647253 7515"  # cmp eax, "HdrS"; jne to the HLT
    "8b8628020000 8a00"  # mov eax, [rsi+0x228]; mov al, [rax]
    "66baf803 ee"  # mov dx, 0x3f8; out dx, al
    "66baf802 b021 ee"  # mov dx, 0x2f8; mov al, "!"; out dx, al
    "b005 e6f4"  # mov al, 5; out DEBUG_EXIT_PORT, al
    "f4"  # hlt
)


def kernel(code):
    return memoryview(forge_elf(segments=((KERNEL_GPA, code, 4096),), entry=KERNEL_GPA))


@pytest.fixture
def kvm():
    with Kvm() as kvm:
        yield kvm


def test_the_kernel_finds_what_the_protocol_promises(kvm):
    sent = []
    boot = LinuxBoot(kernel(TELLS), command_line="quiet")
    with LinuxPc(kvm, boot, memory_mib=32, on_channel=sent.append) as pc:
        end = PcRunner(pc, lambda text: None).run(20)
        assert (end.ending, end.exit_code) == (Ending.EXIT, 5 << 1 | 1), end
        assert pc.console == "c"  # of "console=ttyS0"
        assert bytes(sent) == b"!"


def test_shared_memory_lies_above_all_other_and_is_not_in_its_map(kvm, tmp_path):
    from harness.nest.payload import Source

    (tmp_path / "image").write_bytes(b"shared" + bytes(4090))
    shared = Source(tmp_path / "image", 0, 4096).map()
    with LinuxPc(kvm, LinuxBoot(kernel(TELLS)), memory_mib=32, shared=shared) as pc:
        assert pc.memory.read(SHARED_GPA, 6) == b"shared"
        assert all(r.end <= SHARED_GPA for r in pc._memory_map())
        assert PcRunner(pc, lambda text: None).run(20).ending is Ending.EXIT


def test_a_run_ends_when_it_is_told_to(kvm):
    spin = bytes.fromhex("ebfe")
    with LinuxPc(kvm, LinuxBoot(kernel(spin)), memory_mib=32) as pc:
        runner = PcRunner(pc, lambda text: None)
        runner.stop()
        end = runner.run(20)
        assert (end.ending, end.text) == (Ending.STOPPED, "stopped from outside")
