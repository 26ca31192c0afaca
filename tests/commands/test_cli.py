"""Used wrongly, or on a machine that lacks something: one line, status 2, no traceback."""

import signal
import subprocess
import sys

import pytest
from nsvm_process import nsvm

from harness import cli
from harness.errors import HostError, HostLost
from harness.host.bundle import tree_root
from harness.host.kernels import Kernel
from harness.host.qemu import QEMU


def is_one_line(done, text):
    """Check for status 2 and one line of complaint that holds `text`."""
    assert done.returncode == 2, done
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    # What click says of a wrong option begins with the command's usage.
    complaints = [line for line in lines if not line.startswith(("Usage:", "Try ")) and line]
    assert len(complaints) == 1, done.stderr
    assert text in complaints[0]


@pytest.fixture
def main(monkeypatch, capsys):
    """Run `cli.main` in this process; return it as `subprocess.run` does."""

    def run(*arguments):
        words = ["nsvm", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(signal, "signal", lambda *arguments: None)
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code or 0
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    return run


KERNELS = [
    (["--kernel", "no-such-kernel"], "kernel no-such-kernel: neither a version"),
    (["--kernel", __file__], "not a kernel image"),
    (["--kernel", "/dev/null"], "/dev/null: "),
    (["--modules", "/tmp"], "--modules goes with --kernel PATH"),
    (["--modules", "/nonexistent", "--kernel", "6.1"], "--modules goes with the path of a kernel"),
    (["--host", "local", "--kernel", "6.1"], "cannot go with local"),
    (["--host", "elsewhere"], "'elsewhere' is not one of"),
    (["--no-such-option"], "No such option"),
]


@pytest.mark.parametrize(("options", "text"), KERNELS)
def test_a_host_that_does_not_make_sense(main, tmp_path, options, text):
    is_one_line(main("memory", *options), text)
    is_one_line(main("run", *options, "--results", tmp_path / "results"), text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["memory", "--json", "/nonexistent/x.json"], "cannot write /nonexistent/x.json"),
        (["memory", "--json", "/"], "cannot write /: it is a directory"),
        (["memory", "--vcpus", "0"], "0 is not in the range"),
        (["memory", "--vcpus", "many"], "'many' is not a valid integer"),
        (["memory", "--path", "cpuid"], "'cpuid' is not one of"),
        (["run", "--results", "/dev/null/x"], "cannot write results to /dev/null/x/results.jsonl"),
        (["run", "--results", __file__], "cannot write results to"),
        (["run", "/nonexistent.py"], "'/nonexistent.py' does not exist"),
        (["kernel", "fetch", "no-such"], "kernel no-such: neither a version"),
        (["no-such-command"], "No such command 'no-such-command'"),
    ],
)
def test_arguments_that_do_not_make_sense(main, arguments, text):
    is_one_line(main(*arguments), text)


def test_a_users_shell_sees_the_same():
    is_one_line(nsvm("memory", "--kernel", "no-such-kernel"), "nsvm: kernel no-such-kernel: ")


def test_a_report_that_could_not_be_written_is_found_out_before_anything_runs(main, tmp_path):
    done = main("memory", "--kernel", "no-such-kernel", "--json", tmp_path / "no" / "x.json")
    is_one_line(done, f"no directory {tmp_path / 'no'}")


def test_a_report_without_permission_is_found_out_before_anything_runs(main, monkeypatch, tmp_path):
    monkeypatch.setattr("harness.commands.output.os.access", lambda path, mode: False)
    done = main("memory", "--kernel", "no-such-kernel", "--json", tmp_path / "x.json")
    is_one_line(done, f"cannot write {tmp_path / 'x.json'}: no permission")


def test_without_qemu_the_package_is_named(main, monkeypatch, tmp_path):
    kernel = Kernel("6.1.0-9-amd64", "#1", "forged", "key", tmp_path / "vmlinuz", None, None)
    monkeypatch.setattr("harness.host.kernels.resolve", lambda spec, modules: kernel)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = f"{QEMU} not found (Debian: apt-get install qemu-system-x86)"
    is_one_line(main("memory", "--host", "emulated"), text)
    is_one_line(main("run", "--host", "emulated", "--results", tmp_path / "results"), text)


def test_a_cache_that_cannot_be_made_names_the_variable(main, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", "/dev/null/cache")
    is_one_line(main("memory", "--host", "emulated"), "(set NSVM_CACHE)")


# A device that refuses, errors, signals


@pytest.mark.parametrize("command", ["memory", "run"])
@pytest.mark.parametrize("host", ["auto", "local"])
def test_a_device_without_permission_says_what_to_do(main, monkeypatch, tmp_path, command, host):
    def refuse(view):
        raise HostError("/dev/kvm: Permission denied (run as root, or join the device's group)")

    monkeypatch.setattr("harness.runner.hosts.nested_svm", refuse)
    monkeypatch.setattr("harness.host.local.kvm_device", refuse)
    results = ["--results", tmp_path / "results", "-k", "toggles"] if command == "run" else []
    done = main(command, "--host", host, *results)
    assert done.returncode == 2
    said = done.stdout if command == "run" and host == "local" else done.stderr
    assert "/dev/kvm: Permission denied (run as root, or join the device's group)" in said
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (HostError("no tracefs"), 2, "nsvm: no tracefs\n"),
        (HostLost("it is gone", "last\nwords"), 2, "last\nwords\nnsvm: it is gone\n"),
        (KeyboardInterrupt(), 130, "nsvm: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_every_end_has_its_status_and_no_traceback(main, monkeypatch, error, status, text):
    def fail():
        raise error

    monkeypatch.setattr("harness.commands.list.all_scenarios", fail)
    done = main("list")
    assert (done.returncode, done.stdout, done.stderr.lstrip("\n")) == (status, "", text)


def test_a_bug_is_shown_as_one(main, monkeypatch):
    """What is nobody's fault but ours keeps its traceback."""
    monkeypatch.setattr("harness.commands.list.all_scenarios", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main("list")


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_command_is_there_and_has_help(main, name):
    done = main(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: nsvm {name}")
    assert name in main("--help").stdout


def test_the_output_of_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m harness list --json | head -c 10"],
        cwd=tree_root(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("[")
