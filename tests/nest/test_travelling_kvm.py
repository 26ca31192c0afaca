"""A guest of a few instructions goes to and fro between two processes on this machine's KVM."""

import io
import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import HostError, HostLost, ScenarioFailure
from harness.nest.guest import LinuxGuest
from harness.nest.payload import Source
from harness.nest.running import LinuxSpec
from harness.nest.travelling import TravellingGuest
from harness.qemu_vmm.errors import VmmLost

sys.path.insert(0, str(Path(__file__).parents[1] / "machine"))
from forged_elf import forge_elf

pytestmark = pytest.mark.kvm
KERNEL_GPA = 16 << 20
LIFE_S = 40.0

# Prints "k" on the console; then what comes on the second serial port goes back by it, and EBX
# counts: after "e" comes how many bytes there have been, after "x" the machine is reset.
ECHO = bytes.fromhex(
    "66baf803 b06b ee 31db"  # mov dx, 0x3f8; mov al, "k"; out dx, al; xor ebx, ebx
    "66bafd02 ec a801 74f7"  # 1: mov dx, 0x2fd; in al, dx; test al, 1; jz 1b
    "66baf802 ec ffc3 ee"  # mov dx, 0x2f8; in al, dx; inc ebx; out dx, al
    "3c65 7503 88d8 ee"  # cmp al, "e"; jne 2f; mov al, bl; out dx, al
    "3c78 75e4"  # 2: cmp al, "x"; jne 1b
    "b0fe e664 ebfe"  # mov al, 0xfe; out 0x64, al: reset
)


@pytest.fixture
def spec(tmp_path):
    files = {
        "kernel": forge_elf(segments=((KERNEL_GPA, ECHO, 4096),), entry=KERNEL_GPA),
        "initrd": bytes(4096),
    }
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % 4096))
    source = Source(path, 0, path.stat().st_size)
    return LinuxSpec("L1", source, False, 1, 32, lambda tsc_khz: "", LIFE_S, LIFE_S)


@pytest.fixture
def guest(kvm, spec):
    said = []
    with TravellingGuest(spec, said.append) as guest:
        guest.said = said
        yield guest


def ask(guest, data, size):
    guest._ours.settimeout(20)
    guest.session._pipe.transmit(data)
    answer = b""
    while len(answer) < size:
        got = guest._ours.recv(size)
        assert got, guest._why
        answer += got
    return answer


def test_it_goes_on_where_it_was(guest):
    assert ask(guest, b"abc\n", 4) == b"abc\n"
    for number in range(1, 5):
        figures = guest.move()
        assert figures["downtime_s"] > 0
        assert figures["bytes"] > 0
        # EBX, in the CPU, knows of all that came before, wherever that was.
        assert ask(guest, b"e\n", 3) == bytes((ord("e"), 3 + 2 * number, ord("\n")))
    assert "".join(guest.said) == "k"


def test_what_is_sent_while_it_moves_arrives_once(guest):
    guest._ours.sendall(bytes(range(128, 192)))
    guest.move()
    guest._ours.sendall(bytes(range(192, 256)))
    assert ask(guest, b"e\n", 131)[-2] == 129


def test_a_guest_that_ends_is_told_with_its_end(guest):
    guest.move()
    guest._ours.sendall(b"x")
    with pytest.raises(HostLost, match=r"L1 is lost: .*asks for a reset"):
        guest.session.wait_for("ready", 20)
    assert guest._whose is HostLost  # and not what ran it
    with pytest.raises(ScenarioFailure, match=r"L1: move: .*asks for a reset"):
        guest.move()


def test_a_process_that_is_killed_is_told(guest):
    ask(guest, b"\n", 1)
    os.kill(guest._processes._pids[0], 9)
    with pytest.raises(VmmLost, match=r"L1 is lost: .*SIGKILL"):
        guest.session.wait_for("ready", 20)
    with pytest.raises(HostError, match=r"L1: move: .*SIGKILL"):
        guest.move()


@pytest.mark.parametrize("make", [LinuxGuest, lambda kvm, *rest: TravellingGuest(*rest)])
def test_counts_wait_for_no_vcpu(kvm, spec, make):
    # The second vCPU is inside KVM_RUN, where it waits for INIT until the end.
    with make(kvm, replace(spec, vcpus=2), lambda text: None) as guest:
        ask(guest, b"abc\n", 4)
        started = time.monotonic()
        before = guest.counts()
        ask(guest, b"abc\n", 4)
        assert guest.counts()["exits"] > before["exits"] > 0
        assert time.monotonic() - started < 5


def test_nothing_is_left(kvm, spec):
    before = len(os.listdir("/proc/self/fd"))
    with TravellingGuest(spec, lambda text: None) as guest:
        guest.move()
        pids = list(guest._processes._pids)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_end_with_the_one_that_made_them(kvm, spec):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        guest = TravellingGuest(spec, lambda text: None)
        guest.move()
        os.write(write, " ".join(map(str, guest._processes._pids)).encode())
        os._exit(0)  # without a word to them
    os.waitpid(pid, 0)
    pids = [int(word) for word in os.read(read, 100).split()]
    os.close(read)
    os.close(write)
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}") and not is_zombie(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert len(pids) == 2


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
