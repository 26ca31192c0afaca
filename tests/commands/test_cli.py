"""Used wrongly, or on a machine that lacks something: one line, status 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli
from harness.errors import HostError, HostLost
from harness.host.bundle import tree_root
from harness.host.emulated import QEMU


def nsvm(*arguments, **environment):
    """Run `nsvm` as a user does; return it with its output."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=tree_root(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


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
def no_network(tmp_path):
    """A cache without anything in it, and an archive that is never asked."""
    return {"NSVM_CACHE": str(tmp_path / "cache")}


@pytest.mark.parametrize("command", ["run", "memory"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--kernel", "no-such-kernel"], "kernel no-such-kernel: neither a version"),
        (["--kernel", __file__], "is no kernel"),
        (["--kernel", "/dev/null"], "/dev/null"),
        (["--modules", "/tmp"], "--modules goes with --kernel PATH"),
        (["--modules", "/nonexistent", "--kernel", "6.1"], "--modules"),
        (["--host", "local", "--kernel", "6.1"], "cannot go with local"),
        (["--host", "elsewhere"], "'elsewhere' is not one of"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_a_host_that_does_not_make_sense(command, options, text, tmp_path):
    results = ["--results", tmp_path / "results"] if command == "run" else []
    if command == "run" and options[0] == "--kernel":
        pytest.skip("a run makes its host with the first case: see below")
    is_one_line(nsvm(command, *options, *results), text)


@pytest.mark.parametrize("options", [["--kernel", "no-such-kernel"], ["--kernel", __file__]])
def test_a_run_on_a_kernel_that_is_none_is_an_error_of_every_case(options, tmp_path):
    done = nsvm("run", *options, "-k", "many_toggles", "--results", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "ERROR  many_toggles_leave_nothing_behind: host: " in done.stdout
    assert options[1] in done.stdout


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
def test_arguments_that_do_not_make_sense(arguments, text):
    is_one_line(nsvm(*arguments, "--host", "emulated") if arguments[0] in ("run", "memory")
                else nsvm(*arguments), text)  # fmt: skip


def test_a_report_that_could_not_be_written_is_found_out_before_anything_runs(tmp_path):
    # With nothing in PATH a host would be another error.
    done = nsvm("memory", "--json", tmp_path / "no" / "x.json", PATH=str(tmp_path))
    is_one_line(done, f"no directory {tmp_path / 'no'}")


def test_without_qemu_the_package_is_named(tmp_path):
    kernels = Path(os.environ.get("HOME", "/root"))
    assert kernels
    done = nsvm("memory", "--host", "emulated", PATH=str(tmp_path))
    is_one_line(done, QEMU if "apt-get install" in done.stderr else "")
    assert done.stderr.startswith("nsvm: ")


def test_a_cache_that_cannot_be_made_names_the_variable():
    done = nsvm("memory", "--host", "emulated", NSVM_CACHE="/dev/null/cache")
    is_one_line(done, "(set NSVM_CACHE)")


# Files with scenarios


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("x = 1\ndef f(:\n    pass\n", 2, "invalid syntax"),
        ("import no_such_module\n", 1, "No module named 'no_such_module'"),
        ("from harness.scenarios import nothing_like_it\n", 1, "cannot import name"),
        ("\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        (
            "from harness.scenarios import scenario\n@scenario()\ndef test_x(context): pass\n",
            2,
            "scenario x has no docstring",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path, text, line, complaint):
    file = tmp_path / "mine.py"
    file.write_text(text)
    done = nsvm("run", "--host", "emulated", "--results", tmp_path / "results", file)
    assert done.returncode == 2
    found = [row for row in done.stdout.splitlines() if row.startswith(f"{file}:{line}: ")]
    assert len(found) == 1, done.stdout
    assert complaint in found[0]
    output = done.stdout + done.stderr
    assert "Traceback" not in output
    assert "site-packages" not in output


def test_a_file_without_scenarios_is_nothing_ran(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    done = nsvm("run", "--host", "emulated", "--results", tmp_path / "results", file)
    assert done.returncode == 4
    assert "nothing ran" in done.stdout


@pytest.mark.parametrize("name", ["bisect.py", "json.py", "scenarios.py", "with space-and.dash.py"])
def test_a_file_may_have_any_name(tmp_path, name):
    """Also one of a module that is loaded already."""
    file = tmp_path / name
    file.write_text(
        "from harness.scenarios import scenario\n@scenario()\ndef test_mine(context):\n    'A.'\n"
    )
    options = ["--kernel", "no-such-kernel", "--results", tmp_path / "results"]
    done = nsvm("run", *options, file)
    assert "ERROR  mine: host: kernel no-such-kernel" in done.stdout, done.stdout


# A device that refuses, errors, signals


@pytest.fixture
def main(monkeypatch, capsys):
    """Run `cli.main` in this process; return its status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nsvm", *map(str, arguments)])
        monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", ["memory", "run"])
@pytest.mark.parametrize("host", ["auto", "local"])
def test_a_device_without_permission_says_what_to_do(main, monkeypatch, tmp_path, command, host):
    def refuse(view):
        raise HostError("/dev/kvm: Permission denied (run as root, or join the device's group)")

    monkeypatch.setattr("harness.runner.hosts.nested_svm", refuse)
    monkeypatch.setattr("harness.host.local.kvm_device", refuse)
    results = ["--results", tmp_path / "results", "-k", "toggles"] if command == "run" else []
    status, out, error = main(command, "--host", host, *results)
    assert status == 2
    said = out if command == "run" and host == "local" else error
    assert "/dev/kvm: Permission denied (run as root, or join the device's group)" in said
    assert "Traceback" not in out + error


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
    assert main("list") == (status, "", text)


def test_a_bug_is_shown_as_one(main, monkeypatch):
    """What is nobody's fault but ours keeps its traceback."""
    monkeypatch.setattr("harness.commands.list.all_scenarios", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main("list")


def test_every_command_is_there_and_has_help(main):
    for name in cli._COMMANDS:
        status, out, error = main(name, "--help")
        assert (status, error) == (0, "")
        assert out.startswith(f"Usage: nsvm {name}")
    status, out, _ = main("--help")
    assert status == 0
    for name, line in cli._COMMANDS.items():
        assert f"{name}" in out
        assert line.split()[0] in out


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
