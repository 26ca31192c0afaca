"""A PC for Linux on this machine's KVM, with a few instructions in the place of a kernel."""

import io
import mmap
import threading

import pytest
from forged_elf import forge_elf

from harness.errors import ScenarioFailure
from harness.machine.errors import MachineError
from harness.machine.linux_boot import LinuxBoot
from harness.machine.linux_pc import SHARED_GPA, LinuxPc
from harness.machine.pc import TEST_MEMORY
from harness.machine.pc_run import Ending, PcRunner
from harness.machine.smi_counter import Way, count_smis, send_smi
from harness.migrate.transfer import load, save
from kvm_ioctl.capabilities import Cap
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


def test_the_kernel_may_lie_in_the_shared_memory(kvm):
    """As it does where a guest is shown the image that it was booted from."""
    shared = mmap.mmap(-1, 8192)
    image = bytes(kernel(bytes.fromhex("f4")))
    shared[: len(image)] = image
    with LinuxPc(kvm, LinuxBoot(memoryview(shared)[: len(image)]), memory_mib=32, shared=shared):
        pass
    assert shared.closed


def test_a_run_ends_when_it_is_told_to(kvm):
    spin = bytes.fromhex("ebfe")
    with LinuxPc(kvm, LinuxBoot(kernel(spin)), memory_mib=32) as pc:
        runner = PcRunner(pc, lambda text: None)
        runner.stop()
        end = runner.run(20)
        assert (end.ending, end.text) == (Ending.STOPPED, "stopped from outside")


def test_a_machine_that_came_from_elsewhere_has_its_devices_again(kvm):
    spin = LinuxBoot(kernel(bytes.fromhex("ebfe")))
    with LinuxPc(kvm, spin, memory_mib=32) as source:
        source.cmos.write(0x70, 1, 0x40)
        source.cmos.write(0x71, 1, 0x5A)
        source.com2.receive(b"waits")
        source.write_mmio(TEST_MEMORY.start + 3, b"kept")
        sides = source.device_state()
        with source.paused():
            loaded = moved(source)
    with LinuxPc.adopt(loaded, sides) as pc:
        assert pc.cmos.read(0x71, 1) == 0x5A
        assert pc.device_state() == sides
        assert pc.read_mmio(TEST_MEMORY.start + 3, 4) == b"kept"
        assert pc.vcpus[0].vcpu.get_regs().rip == KERNEL_GPA


@pytest.mark.parametrize(
    "broken", [{"cmos": {}}, {"com1": {}}, {"test_memory": "x"}, {"test_memory": "00" * 65537}]
)
def test_devices_that_are_malformed_are_refused(kvm, broken):
    with LinuxPc(kvm, LinuxBoot(kernel(b"\xf4")), memory_mib=32) as source:
        sides = {**source.device_state(), **broken}
        with source.paused():
            loaded = moved(source)
    with pytest.raises(MachineError, match="malformed state"):
        LinuxPc.adopt(loaded, sides)


def moved(machine):
    file = io.BytesIO()
    save(machine, file)
    file.seek(0)
    return load(machine.kvm, file).machine


@pytest.fixture
def smm_kvm(kvm):
    if not kvm.check_extension(Cap.KVM_CAP_X86_SMM):
        pytest.skip("this machine's KVM has no SMM")
    return kvm


@pytest.mark.parametrize("way", Way)
def test_every_smi_is_counted_and_leaves_no_trace(smm_kvm, way):
    spin = bytes.fromhex("ffc0 ebfc")  # 1: inc eax; jmp 1b
    with LinuxPc(smm_kvm, LinuxBoot(kernel(spin)), memory_mib=32, vcpus=1, smm=True) as pc:
        runner = PcRunner(pc, lambda text: None)
        thread = threading.Thread(target=runner.run, args=(30,))
        thread.start()
        try:
            sent = [send_smi(pc, 0, way, timeout_s=10) for _ in range(5)]
        finally:
            runner.stop()
            thread.join(20)
        assert count_smis(pc, 0) == 5
        assert not any(smi.svm_guest for smi in sent)
        assert pc.vcpus[0].vcpu.get_regs().rip in range(KERNEL_GPA, KERNEL_GPA + 4)


def test_an_smi_that_is_not_taken_is_told(smm_kvm):
    with (
        LinuxPc(smm_kvm, LinuxBoot(kernel(b"\xf4")), memory_mib=32, smm=True) as pc,
        pytest.raises(ScenarioFailure, match="did not take an SMI"),
    ):
        send_smi(pc, 0, Way.MESSAGE, timeout_s=0.1)
