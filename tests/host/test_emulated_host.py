"""The emulated host around a QEMU that is none: what it starts, keeps, notices and removes."""

import errno
import json
import os
import select
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import harness.host.agent
from harness.errors import HostError, HostLost
from harness.host import emulated, initrd_build
from harness.host import session as session_module
from harness.host.bundle import PRELOAD, Bundle
from harness.host.emulated import EmulatedHost, Hardware
from harness.host.kernels import Kernel
from harness.host.qemu import QEMU, last_words, qemu_version

KERNEL = Kernel("6.1.0-9-amd64", "#1 SMP", "forged", "key", Path("/boot/vmlinuz"), None, None)

INSIDE = """
import os, signal, sys, time
def ping(emit):
    return os.getpid()
def say_and_die(emit, status):
    emit("note", what="last words")
    os.kill(os.getppid(), signal.SIGSTOP) if status == "hang" else None
    time.sleep(60)
"""


class FakeQemu:
    """The directory in PATH with the QEMU that is none."""

    def __init__(self, directory):
        self.directory = directory
        source = Path(__file__).with_name("fake_qemu.py").read_text()
        script = directory / QEMU
        script.write_text(f"#!{sys.executable}\n{source}")
        script.chmod(0o755)
        (directory / "agent_dir").write_text(str(Path(harness.host.agent.__file__).parent))
        self.mode = "serves"

    @property
    def mode(self):
        return (self.directory / "mode").read_text()

    @mode.setter
    def mode(self, value):
        (self.directory / "mode").write_text(value)

    def commands(self):
        """Return the command lines of all machines started so far."""
        lines = (self.directory / "command").read_text().splitlines()
        return [line.split("\0") for line in lines]


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()

    def initrd(params):
        # A real one loads kvm_amd with them.
        (directory / "params").write_text(json.dumps(params))
        return tmp_path / "initrd"

    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(emulated.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(EmulatedHost, "_initrd", lambda self: initrd(self.params))
    monkeypatch.setattr(emulated, "userland", lambda: tmp_path / "userland")
    archive = tmp_path / "code.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("forged_inside.py", INSIDE)
        for module in PRELOAD:
            file.writestr(f"{module.replace('.', '/')}.py", "")
    code = Bundle("code", archive)
    monkeypatch.setattr(emulated.bundle, "build_bundle", lambda userland: code)
    return FakeQemu(directory)


@pytest.fixture
def host(qemu):
    with EmulatedHost(KERNEL, warm=False) as host:
        yield host


def is_gone(process):
    return process.poll() is not None


def test_a_started_machine_has_the_code_and_answers(host, qemu):
    session = host.start()
    assert session.hello()["bundle"] == "code"
    assert session.call("forged_inside:ping", timeout_s=30).outcome == "return"
    assert host.console_text == "booting\n"


def test_a_host_says_what_it_is(host):
    before = host.describe()
    assert before["kernel_release"] == KERNEL.release
    assert before["kernel_origin"] == "forged"
    host.start()
    after = host.describe()
    assert after["kind"] == "emulated"
    assert after["kernel_release"] == os.uname().release
    assert after["qemu_version"] == "9.9.9 (forged)"
    assert "QEMU 9.9.9" in after["silicon"]


def test_parameters_and_size_reach_the_machine(qemu):
    with EmulatedHost(KERNEL, {"nested": "0"}, Hardware(3, 555), warm=False) as host:
        assert host.params == {"nested": "0"}
        host.start()
    [command] = qemu.commands()
    assert command[command.index("-smp") + 1] == "3"
    assert command[command.index("-m") + 1] == "555"


def test_starting_again_is_another_machine(host):
    host.start()
    first = host.process
    session = host.start()
    assert is_gone(first)
    assert host.process.pid != first.pid
    assert session.call("forged_inside:ping", timeout_s=30).outcome == "return"


def test_closing_leaves_neither_process_nor_file(qemu, tmp_path):
    with EmulatedHost(KERNEL, warm=False) as host:
        host.start()
        process = host.process
        assert list(tmp_path.glob("nsvm-host-*"))
    assert is_gone(process)
    assert not list(tmp_path.glob("nsvm-host-*"))
    with pytest.raises(HostError, match="not running"):
        host.process  # noqa: B018


def test_a_machine_that_is_killed_loses_nothing_said_before(host):
    session = host.start()
    seen = []

    def kill(event):
        seen.append(event)
        if event["event"] == "emit":
            host.process.kill()

    with pytest.raises(HostLost, match="QEMU was ended by SIGKILL") as caught:
        session.call("forged_inside:say_and_die", timeout_s=60, on_event=kill, status="killed")
    assert seen[-1]["data"] == {"what": "last words"}
    assert not caught.value.silent
    assert host.start().call("forged_inside:ping", timeout_s=30).outcome == "return"


def test_a_machine_that_panics_leaves_its_last_words(host, qemu):
    qemu.mode = "panics"
    with pytest.raises(HostError) as caught:
        host.start()
    assert "did not come up: the emulated host went down (panic or power off)" in str(caught.value)
    assert "Kernel panic - not syncing: forged\nlast line" in str(caught.value)


def test_a_qemu_that_refuses_is_quoted(host, qemu):
    qemu.mode = "refuses"
    with pytest.raises(HostError, match="QEMU ended with status 1: qemu: no such machine"):
        host.start()


@pytest.mark.parametrize(("complaint", "silent"), [("", True), ("BUG: soft lockup\n", False)])
def test_a_hang_is_told_from_one_with_a_complaint(host, monkeypatch, complaint, silent):
    monkeypatch.setattr(session_module.Session.events, "__defaults__", (1.0,))
    session = host.start()
    Path(host._run.console).write_text("booting\n" + complaint)
    with pytest.raises(HostLost, match="the emulated host hangs: no sign of life") as caught:
        session.call("forged_inside:say_and_die", timeout_s=60, status="hang")
    assert caught.value.silent is silent
    assert complaint.strip() in caught.value.console


def test_other_code_than_ones_own_is_refused(host, monkeypatch):
    monkeypatch.setattr(EmulatedHost, "_load", staticmethod(lambda session, code: session))
    with pytest.raises(HostError, match="runs code , not code"):
        host.start()


def test_without_setpriv_no_machine_is_started(host, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="cannot start setpriv: No such file"):
        host.start()


def test_without_qemu_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"not found \(Debian: apt-get install qemu-system-x86\)"):
        qemu_version()


def test_a_qemu_that_does_not_run_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / QEMU
    broken.write_text("#!/bin/sh\necho broken library >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="--version failed: broken library"):
        qemu_version()


# Saved states


def changed_kernel(host, monkeypatch):
    host.kernel = replace(host.kernel, key="another")


def changed_initrd(host, monkeypatch):
    monkeypatch.setattr(EmulatedHost, "_initrd", lambda self: Path("/another/initrd"))


def changed_qemu(host, monkeypatch):
    host.version = "10.0"


def changed_size(host, monkeypatch):
    host.hardware = Hardware(2, 768)


def changed_options(host, monkeypatch):
    monkeypatch.setattr(emulated, "KERNEL_OPTIONS", "another=1")


@pytest.mark.parametrize(
    "change", [changed_kernel, changed_initrd, changed_qemu, changed_size, changed_options]
)
def test_a_state_is_another_one_when_what_went_into_it_is(host, monkeypatch, change):
    before = host._state_path("base")
    assert host._state_path("base") == before
    change(host, monkeypatch)
    assert host._state_path("base") != before


def test_states_of_one_machine_replace_each_other_and_no_others(host, tmp_path):
    paths = {name: host._state_path(name) for name in ("base", "code", "newer")}
    host.params = {"nested": "0"}
    paths["nested=0"] = host._state_path("base")
    for path in paths.values():
        path.write_text("state")
    emulated._forget_older(paths["newer"])
    assert {name for name, path in paths.items() if path.exists()} == {"base", "newer", "nested=0"}


def test_what_is_in_the_initrd_decides_its_name(monkeypatch, tmp_path):
    """The agent, the kernel and the module parameters; built once for each."""
    built = []
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(initrd_build, "userland", lambda: tmp_path / "userland")
    monkeypatch.setattr(emulated, "qemu_version", lambda: "9")
    monkeypatch.setattr(initrd_build.initrd, "compile_tree", lambda *arguments: None)
    monkeypatch.setattr(initrd_build.initrd, "entries", lambda *arguments: built.append(1) or [])
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("agent.py", "init.py"):
        (sources / name).write_text(name)
    monkeypatch.setattr(initrd_build, "SOURCES", sources)

    def name_for(kernel=KERNEL, params=None):
        with EmulatedHost(kernel, params) as host:
            return host._initrd().name

    names = [name_for(), name_for(replace(KERNEL, key="other")), name_for(params={"npt": "0"})]
    for source in ("agent.py", "init.py"):
        (sources / source).write_text("changed")
        names.append(name_for())
    assert len(set(names)) == len(names) == len(built)
    assert name_for() == names[-1]
    assert len(built) == len(names)


class FullDisk:
    def save_machine(self, path):
        path.write_text("half a st")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_without_space_for_a_state_the_machine_goes_on(qemu):
    said = []
    with EmulatedHost(KERNEL, warm=False, log=said.append) as host:
        session = host.start()
        host._run.monitor.close()
        host._run.monitor = FullDisk()
        FullDisk.close = lambda self: None
        state = host._state_path("base")
        host._save(state)
        assert said == ["warm state not saved: No space left on device"]
        assert list(state.parent.iterdir()) == []
        assert session.call("forged_inside:ping", timeout_s=30).outcome == "return"


# Last words


@pytest.mark.parametrize(
    "word", ["BUG: x", "Oops: 0", "Kernel panic - x", "WARNING: CPU", "sysrq: x"]
)
def test_last_words_begin_with_the_first_complaint(word):
    console = "\n".join(["boot"] * 300 + [f"[ 1.0] {word}\r"] + ["trace"] * 10)
    assert last_words(console) == "\n".join([f"[ 1.0] {word}"] + ["trace"] * 10)


def test_last_words_without_a_complaint_are_the_end():
    assert last_words("\n".join(map(str, range(100))), lines=3) == "97\n98\n99"
    assert last_words("") == ""


def test_the_machine_ends_when_its_harness_is_killed(qemu, tmp_path):
    """However that ends: no handler of its own runs at SIGKILL."""
    reader, writer = os.pipe()
    harness_pid = os.fork()
    if harness_pid == 0:
        host = EmulatedHost(KERNEL, warm=False)
        host.start()
        os.write(writer, f"{host.process.pid}\n".encode())
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    pid = int(os.read(reader, 20))
    os.close(reader)
    machine = os.pidfd_open(pid)
    os.kill(harness_pid, signal.SIGKILL)
    os.waitpid(harness_pid, 0)
    assert select.select([machine], [], [], 30)[0], "the machine outlived its harness"
    os.close(machine)
