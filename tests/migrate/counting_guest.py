"""A guest that counts in several pages and in a register at once, until it is told to stop.

What it counted is the same everywhere, unless a page or the registers are of another moment. It
is made for migration, and needs nothing but a plain VM.
"""

import time
from contextlib import contextmanager, suppress

import pytest

from harness.facts import HostView
from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.loader import raw_image
from harness.machine.machine import Machine
from harness.machine.threads import VcpuThread
from harness.machine.vcpu import PortOut
from kvm_ioctl.linux_kvm import MemFlags

STOP = Gpa(0x7000)
COUNTERS = [Gpa(at) for at in range(0x1000, 0x7000, 0x1000)]
CODE_GPA = Gpa(0x8000)
STOP_PORT = 0x80
DEADLINE_S = 20.0


def _code():
    body = bytes.fromhex("6641")  # inc ecx
    for counter in COUNTERS:
        body += bytes.fromhex("66ff06") + counter.to_bytes(2, "little")  # inc dword [counter]
    body += bytes.fromhex("803e") + STOP.to_bytes(2, "little") + b"\0"  # cmp byte [STOP], 0
    back = len(body) + 2
    body += bytes([0x74, 256 - back])  # je: to the start
    body += bytes([0xE6, STOP_PORT])  # out
    return body + bytes([0xEB, 256 - len(body) - 2])  # jmp: to the start


CODE = _code()


class Counting:
    """A machine with that guest, running in a thread of its own."""

    def __init__(self, machine):
        self.machine = machine
        self.thread = None

    def start(self):
        self.machine.memory.write_int(STOP, 1, 0)
        self.thread = VcpuThread(self.machine.vcpus[0], lambda vcpu: vcpu.run(DEADLINE_S * 2))
        self.thread.start()
        self.expect_progress()

    def counters(self):
        return [self.machine.memory.read_int(counter, 4) for counter in COUNTERS]

    def expect_progress(self):
        """Wait until the guest has counted on."""
        before, deadline = self.counters()[0], time.monotonic() + DEADLINE_S
        while self.counters()[0] == before:
            assert time.monotonic() < deadline, "the guest does not count"
            time.sleep(0.001)

    def stop(self):
        """Stop the guest and return what it counted, the same everywhere."""
        self.machine.memory.write_int(STOP, 1, 1)
        event = self.thread.join(DEADLINE_S)
        assert isinstance(event, PortOut), event
        assert event.port == STOP_PORT
        counted = set(self.counters()) | {self.machine.vcpus[0].vcpu.get_regs().rcx}
        assert len(counted) == 1, f"counted {self.counters()}, registers {counted}"
        return counted.pop()

    def expect_unharmed(self):
        """The guest goes on correctly, and nothing tracks its memory."""
        self.expect_progress()
        assert all(
            not slot.flags & MemFlags.KVM_MEM_LOG_DIRTY_PAGES
            for slot in self.machine.memory.all_slots()
        )
        self.machine.memory.track_writes()  # raises if they are tracked
        self.machine.memory.forget_writes()
        before = self.counters()[0]
        assert self.stop() >= before
        self.start()


@contextmanager
def counting(kvm, **options):
    image = raw_image(CODE, CODE_GPA)
    with Machine(kvm, image=image, **({"memory_mib": 1} | options)) as machine:
        guest = Counting(machine)
        guest.start()
        try:
            yield guest
        finally:
            # Who waits to run a machine that is still paused gets an error.
            machine.abandon("the test is over")
            with suppress(MachineError):
                guest.thread.stop(DEADLINE_S)


def resumed(machine):
    """The guest of a machine that arrived, running."""
    guest = Counting(machine)
    guest.start()
    return guest


def expect_sound_rings():
    """Skip where dirty rings are not to be relied on: only KVM's two own modules have been seen.

    kvm_pvm, a software KVM, queues every write, and once a ring was full to its last entry it
    queues no more: pages are missed. The emulated host has a kvm_amd of its own for these tests
    (harness/scenarios/test_live_migration.py).
    """
    modules = HostView().kvm_modules()
    if not {"kvm_amd", "kvm_intel"} & set(modules):
        pytest.skip(f"dirty rings of {', '.join(modules) or 'this KVM'} miss pages once full")
