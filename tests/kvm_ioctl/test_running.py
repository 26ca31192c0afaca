"""KVM_RUN on a real /dev/kvm: exits, completions, interruptions."""

from __future__ import annotations

import errno
import signal
import threading

import pytest
from real_mode_code import HLT, OUT_IN_STORE_HLT, SPIN

from kvm_ioctl import exits
from kvm_ioctl.exit_codes import ExitReason
from kvm_ioctl.handles import KvmError, Vcpu
from kvm_ioctl.linux_kvm import GuestDebug
from kvm_ioctl.request import Ioctl

pytestmark = pytest.mark.kvm


def test_port_mmio_and_hlt_exits(guest) -> None:
    vcpu = guest(OUT_IN_STORE_HLT).vcpu
    exit_ = vcpu.enter()
    assert (exit_.port, exit_.data, exit_.is_out) == (0xF8, b"A", True)
    exit_ = vcpu.enter()
    assert (exit_.port, exit_.size, exit_.is_out) == (0xF9, 1, False)
    vcpu.complete_io(b"\x5a")
    assert vcpu.enter() == exits.MmioExit(0x9000, b"\x5a", 1, True)
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rax & 0xFF == 0x5A


def test_mmio_read_is_completed(guest) -> None:
    vcpu = guest("a10090 f4").vcpu  # mov ax,[0x9000]; hlt
    assert vcpu.enter() == exits.MmioExit(0x9000, b"", 2, False)
    with pytest.raises(ValueError, match="the guest reads 2 bytes, got 1"):
        vcpu.complete_mmio(b"\x01")
    vcpu.complete_mmio(b"\x34\x12")
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rax & 0xFFFF == 0x1234


def test_string_out_has_all_its_data(guest) -> None:
    machine = guest("fc b90300 be0020 baf803 f36e f4")  # cld; cx=3; si=0x2000; dx=0x3f8; rep outsb
    machine.ram[0x2000:0x2003] = b"abc"
    data = b""
    while isinstance(exit_ := machine.vcpu.enter(), exits.IoExit):
        data += exit_.data
    assert data == b"abc"
    assert exit_ == exits.HltExit()


def test_triple_fault_is_shutdown(guest) -> None:
    machine = guest("0f0b")  # ud2, in protected mode with an empty IDT
    sregs = machine.vcpu.get_sregs()
    sregs.cr0 |= 1
    sregs.idt.limit = 0
    machine.vcpu.set_sregs(sregs)
    assert machine.vcpu.enter() == exits.ShutdownExit()


def test_single_step_is_a_debug_exit(guest) -> None:
    vcpu = guest("90 90 f4").vcpu
    vcpu.set_guest_debug(GuestDebug.KVM_GUESTDBG_ENABLE | GuestDebug.KVM_GUESTDBG_SINGLESTEP)
    exit_ = vcpu.enter()
    assert isinstance(exit_, exits.DebugExit)
    assert exit_.pc == 0x1001


def test_immediate_exit_is_interrupted(guest) -> None:
    vcpu = guest(SPIN).vcpu
    vcpu.run.immediate_exit = 1
    assert vcpu.enter() == exits.Interrupted()


def test_signal_is_interrupted(guest) -> None:
    vcpu = guest(SPIN).vcpu
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        assert vcpu.enter() == exits.Interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seen


def test_interrupt_is_delivered(guest) -> None:
    machine = guest("fb 90 ebfd")  # sti; nop; spin
    machine.ram[0x20 * 4 : 0x20 * 4 + 4] = (0x2000).to_bytes(4, "little")
    machine.ram[0x2000:0x2001] = b"\xf4"
    vcpu = machine.vcpu
    vcpu.run.request_interrupt_window = 1
    assert vcpu.enter() == exits.IrqWindowOpenExit()
    vcpu.run.request_interrupt_window = 0
    vcpu.interrupt(0x20)
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rip == 0x2001


def test_translate_walks_the_guests_mapping(guest) -> None:
    translation = guest(HLT).vcpu.translate(0x1234)
    assert (translation.valid, translation.physical_address) == (1, 0x1234)


def test_nmi_and_kvmclock_ctrl_are_requests(guest) -> None:
    vcpu = guest(HLT).vcpu
    vcpu.nmi()
    events = vcpu.get_vcpu_events()
    assert events.nmi.pending + events.nmi.injected >= 1
    # No guest clock was set up, which KVM says.
    assert vcpu.try_call(Vcpu.KVM_KVMCLOCK_CTRL) == errno.EINVAL


def test_signal_mask_lets_a_blocked_signal_end_kvm_run(guest) -> None:
    vcpu = guest(SPIN).vcpu
    vcpu.set_signal_mask([signal.SIGRTMIN + 3])
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert vcpu.enter() == exits.Interrupted()
        assert signal.sigtimedwait({signal.SIGUSR2}, 0) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def test_memory_fault_is_explained_once(guest, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = guest(HLT).vcpu
    monkeypatch.setattr(Ioctl, "raw", lambda *_: -errno.EFAULT)
    vcpu.run.exit_reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    vcpu.run.memory_fault.gpa = 0x5000
    exit_ = vcpu.enter()
    assert isinstance(exit_, exits.MemoryFaultExit)
    assert (exit_.gpa, exit_.error) == (0x5000, errno.EFAULT)
    with pytest.raises(KvmError, match="KVM_RUN on vcpu fd: EFAULT"):
        vcpu.enter()
