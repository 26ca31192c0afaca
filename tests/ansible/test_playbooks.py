"""The playbooks: clean to ansible-lint, and what needs no AMD machine is applied to this one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.fleet import drive
from harness.host.bundle import tree_root

ANSIBLE = tree_root() / "ansible"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PLAYBOOKS = sorted(p.name for p in ANSIBLE.glob("*.yml") if not p.name.startswith("inventory"))

KVM_AMD = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: svm_host
        tasks_from: kvm_amd.yml
      vars:
        svm_host_etc: "{{ etc }}"
        svm_host_kvm_amd_parameters: { nested: 1, vgif: 0 }
"""


def ansible(tool, *arguments, here=ANSIBLE):
    if (found := shutil.which(tool, path=PATH)) is None:
        pytest.fail(f"no {tool}: make setup installs it")
    environment = {**os.environ, "PATH": PATH, "ANSIBLE_NOCOLOR": "1", "NO_COLOR": "1"}
    environment["ANSIBLE_ROLES_PATH"] = str(ANSIBLE / "roles")
    return subprocess.run(
        [found, *map(str, arguments)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def play(playbook, *arguments, here=ANSIBLE, status=0, **variables):
    """Apply a playbook to this machine; return how many tasks changed something, and its words."""
    words = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    words += ["-e", f"ansible_python_interpreter={sys.executable}", "-e", "ansible_become=false"]
    done = ansible(
        "ansible-playbook", "-i", "localhost,", "-c", "local", *words, playbook, *arguments,
        here=here,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    found = re.search(r"changed=(\d+)", done.stdout)
    return int(found[1]) if found else 0, done.stdout


def test_ansible_lint_has_nothing_to_say(tmp_path):
    tree = tmp_path / "ansible"
    shutil.copytree(ANSIBLE, tree)
    shutil.copy(drive.PLAYBOOK, tree / "fleet.yml")
    shutil.copy(drive.PLAYBOOK.with_name("lab.toml.j2"), tree)
    done = ansible("ansible-lint", "--offline", "-c", tree / ".ansible-lint", tree, here=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_playbooks_can_be_read():
    play(PLAYBOOKS[0], *PLAYBOOKS[1:], "--syntax-check")


def test_nightly_units_are_written_once_and_are_what_systemd_takes(tmp_path):
    where = {"nightly_units": tmp_path, "nightly_results": tmp_path / "nsvm/results"}
    assert play("nightly.yml", "--check", **where)[0] == 2
    assert not [*tmp_path.iterdir()]
    assert play("nightly.yml", **where)[0] == 2
    assert play("nightly.yml", **where)[0] == 0
    service = (tmp_path / "nsvm-nightly.service").read_text()
    assert "run --host local --require nested_svm\n" in service
    assert f"WorkingDirectory={tmp_path}/nsvm\n" in service
    if shutil.which("systemd-analyze"):
        units = sorted(tmp_path.glob("nsvm-nightly.*"))
        command = ["systemd-analyze", "verify", "--man=no", *units]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        # The command itself is not installed here.
        complaints = [line for line in done.stderr.splitlines() if "not executable" not in line]
        assert not complaints


def test_kvm_amd_gets_its_parameters_once(tmp_path):
    for directory in ("modprobe.d", "modules-load.d", "tmpfiles.d"):
        (tmp_path / "etc" / directory).mkdir(parents=True)
    playbook = tmp_path / "play.yml"
    playbook.write_text(KVM_AMD)
    where = {"etc": tmp_path / "etc"}
    assert play(playbook, "--check", **where)[0] == 3
    tools = tmp_path / "tools"
    tools.mkdir()
    # The handler reloads; this machine's own module is none of this test's business.
    (tools / "modprobe").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    (tools / "modprobe").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "PATH", f"{tools}:{PATH}")
        assert play(playbook, **where)[0] == 5
        assert play(playbook, **where)[0] == 0
    options = (tmp_path / "etc/modprobe.d/nsvm.conf").read_text().splitlines()[-1]
    assert options == "options kvm_amd nested=1 vgif=0"
    assert (tmp_path / "calls").read_text().splitlines() == ["-r kvm_amd", "kvm_amd"]


@pytest.mark.nightly
def test_the_harness_is_installed_once_and_whole(tmp_path):
    where = {"harness_directory": tmp_path / "nsvm", "harness_python": sys.executable}
    assert play("install.yml", **where)[0] == 5
    assert play("install.yml", **where)[0] == 0
    venv = tmp_path / "nsvm/venv"
    # As one that was broken off: the wheel is there, and another one is installed.
    (venv / "wheel").write_text("another")
    assert play("install.yml", **where)[0] == 2
    [site] = venv.glob("lib/python*/site-packages")
    assert (site / "harness/fleet/playbook.yml").exists()
    words = [venv / "bin/nsvm", "list"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert " scenarios, " in done.stdout.splitlines()[-1]


def test_results_are_fetched_by_host_and_night(tmp_path):
    night = tmp_path / "there/20261122T030000Z"
    night.mkdir(parents=True)
    (night / "results.jsonl").write_text("{}\n")
    (night / "junk").write_text("")
    where = {"results_from": tmp_path / "there", "results_to": tmp_path / "here"}
    assert play("collect.yml", **where)[0] == 1
    assert play("collect.yml", **where)[0] == 0
    got = tmp_path / "here/localhost/20261122T030000Z"
    assert [path.name for path in got.iterdir()] == ["results.jsonl"]


def test_a_host_on_which_nothing_ran_is_red(tmp_path):
    where = {"results_from": tmp_path, "results_to": tmp_path / "here"}
    _, said = play("collect.yml", status=2, **where)
    assert "localhost has no results of the last 7d: nothing ran" in said
