"""Plain machines on this machine's KVM; none of this needs SVM."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from guest_images import ElfClass
from harness.machine.console import GuestExit, PortOut
from harness.machine.cpuid import CpuidPolicy
from harness.machine.errors import ImageError, MachineError
from harness.machine.guest_abi import HELLO_STATUS, HELLO_TEXT
from harness.machine.hang import VcpuTimeout
from harness.machine.loader import EntryMode, raw_image
from harness.machine.machine import Machine
from harness.machine.threads import VcpuThread
from harness.machine.vcpu import Kicked, UnexpectedStop
from harness.machine.watchdog import KICK_SIGNAL
from kvm_ioctl.exits import HltExit, MmioExit

pytestmark = pytest.mark.kvm

JMP_SELF = bytes.fromhex("ebfe")


@pytest.fixture
def loop(kvm, images):
    with Machine(kvm, image=images("loop"), vcpus=3, memory_mib=4) as machine:
        yield machine


@pytest.mark.parametrize("elf_class", ElfClass)
def test_hello_prints_and_exits_with_its_status(kvm, images, elf_class):
    with Machine(kvm, image=images("hello", elf_class), memory_mib=4) as machine:
        multiboot = machine.image.mode is EntryMode.MULTIBOOT32
        assert multiboot == (elf_class is ElfClass.ELF32)
        assert machine.vcpus[0].run_until_exit() == GuestExit(HELLO_STATUS)
        assert machine.console == HELLO_TEXT


def assert_spins(hang, machine, index):
    assert hang.index == index
    assert hang.rip == machine.image.symbol("spin")
    assert hang.code[:2] == JMP_SELF
    assert (hang.cs_selector, hang.cs_base) == (8, 0)
    assert hang.efer & 0x500 == 0x500
    assert hang.cr0 & 0x8000_0001 == 0x8000_0001
    assert hang.cr4 & 0x20
    assert f"rip={hang.rip:#x}" in str(hang)


def test_a_loop_in_the_main_thread_is_got_out(loop):
    for index in (2, 0):
        start = time.monotonic()
        with pytest.raises(VcpuTimeout) as caught:
            loop.vcpus[index].run(timeout_s=0.2)
        assert 0.2 <= time.monotonic() - start < 5
        assert_spins(caught.value.hang, loop, index)


def test_loops_in_worker_threads_are_got_out(loop):
    threads = [VcpuThread(v, lambda v: v.run(timeout_s=0.3)) for v in loop.vcpus]
    for thread in threads:
        thread.start()
    for index, thread in enumerate(threads):
        with pytest.raises(VcpuTimeout) as caught:
            thread.join(10)
        assert_spins(caught.value.hang, loop, index)


def test_a_vcpu_runs_on_after_a_timeout(loop):
    vcpu = loop.vcpus[0]
    for _ in range(3):
        with pytest.raises(VcpuTimeout):
            vcpu.run(timeout_s=0.05)
    assert vcpu.vcpu.run.immediate_exit == 0


def test_kicked_threads_return(loop):
    threads = [VcpuThread(v, lambda v: v.run(timeout_s=60)) for v in loop.vcpus]
    for thread in threads:
        thread.start()
    assert [thread.stop(10) for thread in threads] == [Kicked()] * 3


def test_a_body_without_deadline_is_stopped_by_join(loop):
    thread = VcpuThread(loop.vcpus[0], lambda v: v.run(timeout_s=60))
    thread.start()
    with pytest.raises(MachineError, match=r"vCPU 0: stopped after 0\.1 s"):
        thread.join(0.1)
    assert not thread.running


def test_a_stray_signal_does_not_end_a_run(loop):
    vcpu = loop.vcpus[0]
    main = threading.get_ident()
    stray = threading.Timer(0.1, signal.pthread_kill, (main, KICK_SIGNAL))
    stray.start()
    start = time.monotonic()
    with pytest.raises(VcpuTimeout):
        vcpu.run(timeout_s=0.4)
    assert time.monotonic() - start >= 0.4
    stray.join()


def test_many_small_timeouts_lose_no_kick(loop):
    """Deadlines that fall before, around and inside KVM_RUN."""
    for step in range(60):
        with pytest.raises(VcpuTimeout):
            loop.vcpus[0].run(timeout_s=step * 2e-5)


STUCK = """
import os, sys, time
from types import SimpleNamespace
from harness.machine import vcpu as module, watchdog
watchdog.GRACE_S = 0.1

class Deaf:
    run = SimpleNamespace(immediate_exit=0)
    def enter(self):
        time.sleep(30)  # resumes after signals

watchdog.WATCHDOG.install()
module.MachineVcpu(5, Deaf(), None, None, None).run(timeout_s=0.05)
"""


def test_a_stuck_main_thread_ends_the_process_with_one_line():
    done = subprocess.run(
        [sys.executable, "-c", STUCK],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 70
    assert done.stderr == "vCPU 5: KVM_RUN ignores signals, ending the process\n"


def test_real_mode_code_runs_and_ports_are_answered(kvm):
    # in al, 0x10 / add al, 2 / out 0x80, al / hlt
    code = bytes.fromhex("e410 0402 e680 f4")
    with Machine(kvm, image=raw_image(code, 0x8000), memory_mib=1) as machine:
        vcpu = machine.vcpus[0]
        assert vcpu.run() == PortOut(0x80, 1, 0x01)  # 0xff from the empty bus, plus 2
        assert isinstance(vcpu.run(), HltExit)


def test_an_unexpected_stop_says_what_came(kvm):
    waited = pytest.raises(UnexpectedStop, match=r"vCPU 0: waited for the guest to end .*HltExit")
    with Machine(kvm, image=raw_image(b"\xf4", 0x8000), memory_mib=1) as machine, waited:
        machine.vcpus[0].run_until_exit()


def test_io_is_finished_without_running_on(kvm):
    # out 0x80, al / jmp self
    with Machine(kvm, image=raw_image(bytes.fromhex("e680ebfe"), 0x8000), memory_mib=1) as machine:
        vcpu = machine.vcpus[0]
        assert isinstance(vcpu.run(), PortOut)
        vcpu.finish_io()
        assert vcpu.vcpu.get_regs().rip == 0x8002
        assert vcpu.vcpu.run.immediate_exit == 0


def test_mmio_reaches_the_caller(kvm):
    # mov ax, 0xffff / mov ds, ax / mov byte [0xfff0], 7: past the only MiB / hlt
    code = bytes.fromhex("b8ffff 8ed8 c606f0ff07 f4")
    with Machine(kvm, image=raw_image(code, 0x8000), memory_mib=1) as machine:
        event = machine.vcpus[0].run()
        assert isinstance(event, MmioExit)
        assert (event.phys_addr, event.value, event.is_write) == (0xFFFF0 + 0xFFF0, 7, True)


def test_64_vcpus_and_many_machines(kvm, images):
    image = images("hello")
    for _ in range(5):
        with Machine(kvm, image=image, vcpus=64, memory_mib=4) as machine:
            for index in (0, 31, 63):
                assert machine.vcpus[index].run_until_exit().status == HELLO_STATUS
            assert machine.console == HELLO_TEXT * 3


def test_closing_gives_everything_back(kvm, images):
    def used():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("kvm-vcpu" in line for line in maps)

    before = used()
    machine = Machine(kvm, image=images("hello"), vcpus=4, memory_mib=4)
    assert used() != before
    assert signal.getsignal(KICK_SIGNAL) != signal.SIG_DFL
    machine.close()
    machine.close()
    assert used() == before
    assert signal.getsignal(KICK_SIGNAL) == signal.SIG_DFL


def test_a_failed_start_leaves_nothing_behind(kvm, images):
    before = len(os.listdir("/proc/self/fd"))
    handler = signal.getsignal(KICK_SIGNAL)
    with pytest.raises(ImageError, match=r"svme\.elf: segment .* is outside memory"):
        Machine(kvm, image=images("svme"), memory_mib=2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert signal.getsignal(KICK_SIGNAL) is handler


@pytest.mark.parametrize(("vcpus", "memory_mib"), [(-1, 16), (1, 0)])
def test_an_impossible_machine_is_refused(kvm, vcpus, memory_mib):
    with pytest.raises(MachineError, match="no machine has"):
        Machine(kvm, vcpus=vcpus, memory_mib=memory_mib)


def test_cpuid_reaches_the_vcpu(kvm):
    policy = CpuidPolicy(svm=False, physical_address_bits=36)
    with Machine(kvm, vcpus=2, cpuid=policy) as machine:
        for vcpu in machine.vcpus:
            leaves = {e.function: e for e in vcpu.vcpu.get_cpuid2()}
            assert leaves[1].ebx >> 24 == vcpu.index
            assert leaves[0x8000_0008].eax & 0xFF == 36


def test_a_vcpu_that_sleeps_in_the_kernel_is_got_out(kvm):
    """With the irqchip in the kernel HLT does not exit: KVM_RUN sleeps."""
    with Machine(kvm, image=raw_image(b"\xf4", 0x8000), memory_mib=1, irqchip=True) as machine:
        with pytest.raises(VcpuTimeout) as caught:
            machine.vcpus[0].run(timeout_s=0.2)
        assert caught.value.hang.rip == 0x8001


def test_all_vcpus_start_with_an_irqchip_too(kvm, images):
    with Machine(kvm, image=images("hello"), vcpus=2, memory_mib=4, irqchip=True) as machine:
        assert [v.run_until_exit().status for v in machine.vcpus] == [HELLO_STATUS] * 2
