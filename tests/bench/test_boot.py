import shutil
import time

import pytest

from harness.bench import boot
from harness.bench.boot import bare_command, bare_start_s
from harness.errors import HarnessError, HostError

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)

CHARDEVS = [
    "-chardev", "file,id=console,path=/tmp/somewhere/console-1.log",
    "-chardev", "socket,id=channel,fd=8",
    "-chardev", "socket,id=monitor,fd=9",
]  # fmt: skip


def machine(script):
    """A command line like QEMU's, for a shell script that speaks over descriptors 8 and 9."""
    return ["sh", "-c", script, "machine", *CHARDEVS]


def test_only_the_console_file_is_another_one(tmp_path):
    command, fds = bare_command(machine("true"), tmp_path / "a,b.log")
    assert fds == {"channel": 8, "monitor": 9}
    changed = [pair for pair in zip(machine("true"), command, strict=True) if pair[0] != pair[1]]
    assert changed == [(CHARDEVS[1], f"file,id=console,path={tmp_path}/a,,b.log")]


def test_a_command_line_without_channel_is_refused(tmp_path):
    with pytest.raises(HarnessError, match="no channel and monitor"):
        bare_command(["qemu-system-x86_64", *CHARDEVS[:2]], tmp_path)


ANSWERS = """
echo '{"event":"beat"}' >&8
read -r command <&8
case "$command" in *'"op": "hello"'*) echo '{"event":"hello","release":"6.1"}' >&8;; esac
exec sleep 60
"""


def test_a_warm_machine_is_asked_at_once():
    assert 0 < bare_start_s(machine(ANSWERS), warm=True) < 30


def test_the_time_is_that_of_the_answer():
    assert bare_start_s(machine("sleep 0.3" + ANSWERS), warm=True) >= 0.3


def test_a_cold_machine_is_asked_when_it_is_ready():
    # Whoever asks earlier is heard by nobody: the command is read before there is a reader.
    ready = 'sleep 0.2\necho \'{"event":"ready"}\' >&8' + ANSWERS
    assert bare_start_s(machine(ready), warm=False) >= 0.2


def test_a_cold_machine_that_is_never_ready_gets_no_question(monkeypatch):
    monkeypatch.setattr(boot, "COLD_BOOT_S", 1)
    start = time.monotonic()
    with pytest.raises(HostError, match="did not answer in time"):
        bare_start_s(machine(ANSWERS), warm=False)
    assert time.monotonic() - start < 15


def test_a_machine_that_ends_is_noticed_with_its_last_words():
    with pytest.raises(HostError, match="no such device; the machine ended") as caught:
        bare_start_s(machine("echo no such device >&2"), warm=True)
    assert "\n" not in str(caught.value)


def test_a_command_that_is_not_there_is_said():
    with pytest.raises(HostError, match="no-such-qemu: No such file"):
        bare_start_s(["no-such-qemu", *CHARDEVS], warm=True)
