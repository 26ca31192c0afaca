"""Linux under this machine's QEMU: it moves and nothing is lost; whatever ends it is named."""

import os
import select
import signal
import time
from pathlib import Path

import pytest

from harness.errors import HostError, HostLost
from harness.qemu_vmm.errors import VmmLost
from harness.qemu_vmm.over import Over

WAIT_S = 60.0


class Reader:
    """What comes over a guest's channel, line by line."""

    def __init__(self, pc):
        self.pc, self.channel = pc, pc.channel
        self.lines = []
        self.ended = False
        self._rest = b""

    def read_until(self, done):
        deadline = time.monotonic() + WAIT_S
        while not done(self) and not self.ended:
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain; {len(self.lines)} lines"
            if select.select([self.channel], [], [], left)[0]:
                data = self.channel.receive()
                self.ended = not data
                *lines, self._rest = (self._rest + data).split(b"\n")
                self.lines += lines
        return self.lines

    def numbers(self, count):
        """Return the first numbers, `count` at least."""
        lines = self.read_until(lambda seen: len(seen.lines) >= count)
        assert not self.ended, self.pc.why_dead("the guest", "?")
        return [int(line) for line in lines]

    def until_the_end(self):
        self.read_until(lambda seen: False)


@pytest.mark.parametrize(("over", "moves"), [(Over.UNIX, 2), (Over.TCP, 1), (Over.FILE, 1)])
def test_what_a_guest_says_is_whole_wherever_it_says_it(boot, over, moves):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(20)
    seen, pids = 20, {pc.pid}
    for _ in range(moves):
        figures = pc.move(over, WAIT_S)
        seen = len(reader.numbers(seen + 50))
        pids.add(pc.pid)
        assert figures["over"] == over.value
        assert 0 < figures["downtime_s"] < figures["seconds"]
        assert figures["bytes"] > 1 << 20
    numbers = reader.numbers(seen)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(pids) == moves + 1


def test_a_panic_is_told_in_the_kernels_own_words(boot):
    pc = boot(script=None)
    Reader(pc).until_the_end()
    lost = pc.why_dead("L1", "the channel ended")
    assert str(lost).startswith("L1 is lost: Kernel panic - not syncing: ")
    assert "QEMU ended: the guest reset or turned itself off" in str(lost)
    assert "Kernel panic" in lost.console
    assert not isinstance(lost, VmmLost)


def test_a_killed_qemu_is_no_fault_of_the_guests(boot):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(5)
    os.kill(pc.pid, signal.SIGKILL)
    reader.until_the_end()
    lost = pc.why_dead("L1", "the channel ended")
    assert isinstance(lost, VmmLost)
    assert str(lost) == "L1 is lost: QEMU was ended by SIGKILL"


def test_a_monitor_that_dies_is_noticed_though_nobody_asks_anything(boot):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(5)
    pid = pc.pid
    pc._qemu.monitor._socket.shutdown(2)
    reader.until_the_end()
    lost = pc.why_dead("L1", "the channel ended")
    assert isinstance(lost, VmmLost)
    assert "the connection to QEMU's monitor is lost" in str(lost)
    pc.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_guest_that_is_stopped_by_somebody_else_is_noticed(boot):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(5)
    pc._ask(lambda: pc._qemu.monitor.command("stop"), WAIT_S)
    reader.until_the_end()
    assert str(pc.why_dead("L1", "-")) == "L1 is lost: QEMU stopped the guest (paused)"


def test_a_guest_lives_for_so_long_and_no_longer(boot):
    pc = boot(life_s=4.0)
    Reader(pc).until_the_end()
    lost = pc.why_dead("L1", "-")
    assert type(lost) is HostLost
    assert str(lost) == "L1 is lost: it did not end within 4 s"


def test_a_move_of_a_guest_that_is_gone_ends_at_once(boot):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(5)
    os.kill(pc.pid, signal.SIGKILL)
    with pytest.raises(HostError):
        pc.move(Over.UNIX, WAIT_S)


def test_a_destination_that_refuses_leaves_the_guest_where_it_was(boot):
    pc = boot()
    reader = Reader(pc)
    reader.numbers(5)
    pid = pc.pid
    right = pc._options
    # A machine of another size: QEMU says so itself.
    pc._options = type(right)(**{**vars(right), "memory_mib": right.memory_mib + 64})
    with pytest.raises(Exception, match=r"QEMU could not migrate|did not arrive") as refused:
        pc.move(Over.UNIX, WAIT_S)
    assert "Size mismatch" in str(refused.value)
    pc._options = right
    assert pc.pid == pid
    reader.numbers(len(reader.lines) + 50)


def test_all_is_torn_down(boot):
    pc = boot()
    Reader(pc).numbers(5)
    pc.move(Over.UNIX, WAIT_S)
    pid, directory = pc.pid, pc._directory
    pc.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not directory.exists()
    assert not pc._thread.is_alive()


def test_the_console_is_handed_on_in_whole_lines(boot):
    said = []
    pc = boot(on_console=said.append)
    Reader(pc).numbers(200)
    assert all(text.endswith("\n") for text in said)
    assert "said 150\r\n" in "".join(said)
