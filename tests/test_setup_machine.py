"""First-time set-up: what it decides to install, and with what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from harness import setup_machine
from harness.setup_machine import (
    NEEDS,
    SetupError,
    find_python,
    install,
    install_command,
    main,
    make_environment,
    missing_packages,
    privilege,
    run,
    stamp_of,
    venv_package,
)


@pytest.fixture
def calls(monkeypatch):
    """Commands that would have been run, in order."""
    made = []
    monkeypatch.setattr(setup_machine, "run", lambda command, what, timeout_s: made.append(command))
    return made


def script(directory, name, text="exit 0"):
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A directory that is all of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


# What is missing


def test_nothing_is_missing_where_all_is_there(monkeypatch):
    monkeypatch.setattr(setup_machine, "is_there", lambda what: True)
    assert missing_packages(sys.executable) == []


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.package)
def test_each_missing_need_asks_for_its_package(monkeypatch, need):
    monkeypatch.setattr(setup_machine, "is_there", lambda what: what != need.what)
    assert missing_packages(sys.executable) == [need.package]


def test_a_python_that_cannot_fill_an_environment_asks_for_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_machine, "is_there", lambda what: True)
    assert missing_packages(script(tmp_path, "python3", "exit 1")) == ["python3-venv"]


def test_commands_are_looked_for_in_the_path_and_files_where_they_are(path, tmp_path):
    script(path, "setpriv")
    assert setup_machine.is_there("setpriv")
    assert not setup_machine.is_there("cc")
    assert setup_machine.is_there(str(tmp_path))
    assert not setup_machine.is_there(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("python", "package"),
    [
        ("/usr/bin/python3", "python3-venv"),
        ("/usr/bin/python3.12", "python3.12-venv"),
        ("/opt/own/bin/python", "python3-venv"),
    ],
)
def test_debian_completes_each_python_by_a_package_of_its_own(python, package):
    assert venv_package(python) == package


# Installing


def test_root_updates_the_lists_then_installs(calls):
    install(["gcc", "qemu-system-x86"], [], has_apt=True)
    update, installation = calls
    assert update[0] == "env"
    assert update[-1] == "update"
    assert "DEBIAN_FRONTEND=noninteractive" in installation
    wanted = install_command(["gcc", "qemu-system-x86"])
    assert installation[2 : 2 + len(wanted)] == wanted
    assert "--no-install-recommends" in wanted


def test_others_install_with_sudo(calls):
    install(["gcc"], ["sudo", "-n"], has_apt=True)
    assert [command[:2] for command in calls] == [["sudo", "-n"]] * 2


def test_without_rights_the_one_command_to_run_is_said(calls):
    command = "sudo apt-get install --yes --no-install-recommends gcc util-linux"
    with pytest.raises(SetupError, match=command):
        install(["gcc", "util-linux"], None, has_apt=True)
    assert calls == []


def test_without_apt_what_is_missing_is_named(calls):
    with pytest.raises(SetupError, match="what Debian calls gcc"):
        install(["gcc"], [], has_apt=False)
    assert calls == []


def test_root_needs_no_sudo(monkeypatch, path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert privilege() == []


@pytest.mark.parametrize(("status", "rights"), [(0, ["sudo", "-n"]), (1, None)])
def test_others_need_a_sudo_without_password(monkeypatch, path, status, rights):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert privilege() is None
    script(path, "sudo", f"exit {status}")
    assert privilege() == rights


# Python


def test_this_python_is_taken_if_it_is_new_enough():
    assert find_python() == sys.executable


def test_an_old_python_looks_for_a_newer_one_that_runs(monkeypatch, path):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    script(path, "python3.11", "exit 127")
    newer = script(path, "python3.13")
    assert find_python() == newer


def test_without_any_new_python_there_is_one_clear_line(monkeypatch, path):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SetupError, match=r"Python 3\.11 or newer is needed: .* is 3\.9\.2"):
        find_python()


# The environment


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return tmp_path


def with_environment(tree):
    (tree / ".venv" / "bin").mkdir(parents=True)
    script(tree / ".venv" / "bin", "python")
    return tree / ".venv"


def test_an_environment_is_made_and_filled(calls, tree):
    (tree / ".venv").mkdir()
    make_environment("python3.12", tree / ".venv", tree)
    creation, installation = calls
    assert creation[:3] == ["python3.12", "-m", "venv"]
    assert installation[-2:] == ["--editable", f"{tree}[dev]"]
    assert not any("index" in word for word in installation)


def test_it_is_left_alone_until_pyproject_changes(calls, tree):
    venv = with_environment(tree)
    make_environment("python3", venv, tree)
    make_environment("python3", venv, tree)
    assert len(calls) == 1
    (tree / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    make_environment("python3", venv, tree)
    assert len(calls) == 2


def test_a_failed_installation_is_tried_again(tree, monkeypatch, calls):
    venv = with_environment(tree)

    def fail(command, what, timeout_s):
        raise SetupError(what)

    with monkeypatch.context() as patch:
        patch.setattr(setup_machine, "run", fail)
        with pytest.raises(SetupError, match="pip install"):
            make_environment("python3", venv, tree)
    make_environment("python3", venv, tree)
    assert len(calls) == 1


def test_a_tree_that_was_moved_is_installed_anew():
    assert stamp_of(b"[project]", "/here") != stamp_of(b"[project]", "/there")


# Running


def test_a_failing_step_shows_its_output_and_says_which(capfd):
    with pytest.raises(SetupError, match="apt-get install failed with status 3"):
        run(["sh", "-c", "echo why; exit 3"], "apt-get install", 30)
    assert "  | why" in capfd.readouterr().err


def test_a_step_that_succeeds_is_silent(capfd):
    run(["sh", "-c", "echo noise"], "step", 30)
    assert capfd.readouterr() == ("", "")


def test_a_step_has_a_deadline():
    with pytest.raises(SetupError, match="pip install: not done within 0 s"):
        run(["sleep", "60"], "pip install", 0.1)


def test_what_goes_wrong_is_one_line(monkeypatch, capsys):
    def fail():
        raise SetupError("no Python")

    monkeypatch.setattr(setup_machine, "find_python", fail)
    assert main() == 1
    assert capsys.readouterr().err == "setup: no Python\n"


def test_it_runs_before_anything_is_installed(tmp_path):
    """Nothing but the standard library, and not this package, is imported."""
    code = f"import runpy; runpy.run_path({setup_machine.__file__!r})"
    # -S: no site-packages; -I: no environment, no current directory.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_old_pythons_can_read_it():
    ast.parse(Path(setup_machine.__file__).read_text(), feature_version=(3, 7))
