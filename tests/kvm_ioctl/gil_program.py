"""Waits in KVM_GET_XSAVE for a vCPU that only another Python thread can get out of KVM_RUN.

With an ioctl call that keeps the GIL, that other thread never runs, and this program never ends;
``--keep-gil`` shows it. The caller has a deadline.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import signal
import sys
import threading
import time

from kvm_ioctl.exits import Exit, Interrupted
from kvm_ioctl.handles import Kvm, Vcpu

SPIN = bytes.fromhex("c606002001 ebfe")  # mov byte [0x2000],1; spin
TICKS = 50
DEADLINE_S = 20.0


def main() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    with Kvm() as kvm, kvm.create_vm() as vm:
        ram = mmap.mmap(-1, 0x4000)
        ram[0x1000 : 0x1000 + len(SPIN)] = SPIN
        vm.set_user_memory_region(0, 0, ctypes.addressof(ctypes.c_char.from_buffer(ram)), len(ram))
        vcpu = vm.create_vcpu(0)
        start_at(vcpu, 0x1000)
        exits: list[Exit] = []
        runner = threading.Thread(target=lambda: exits.append(vcpu.enter()))
        runner.start()
        deadline = time.monotonic() + DEADLINE_S
        while ram[0x2000] == 0:
            assert time.monotonic() < deadline, "the guest never ran"
            time.sleep(0.001)
        kicked = threading.Event()
        kicker = threading.Thread(target=kick_later, args=(vcpu, runner, kicked))
        kicker.start()
        get_xsave(vcpu)
        # The wait is for real only if KVM_RUN had to end first.
        assert kicked.is_set(), "KVM_GET_XSAVE did not wait for KVM_RUN"
        for thread in (runner, kicker):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        assert exits == [Interrupted()]
    print("kicked out while waiting")


def start_at(vcpu: Vcpu, address: int) -> None:
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip = address
    vcpu.set_regs(regs)


def kick_later(vcpu: Vcpu, runner: threading.Thread, kicked: threading.Event) -> None:
    for _ in range(TICKS):
        time.sleep(0.005)
    kicked.set()
    vcpu.run.immediate_exit = 1
    assert runner.ident is not None
    signal.pthread_kill(runner.ident, signal.SIGUSR1)


def get_xsave(vcpu: Vcpu) -> None:
    if "--keep-gil" in sys.argv:
        fcntl.ioctl(vcpu.fileno(), Vcpu.KVM_GET_XSAVE.number, bytearray(4096))
    else:
        vcpu.get_xsave()


if __name__ == "__main__":
    main()
