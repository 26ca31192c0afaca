"""The playbooks on a real Debian under systemd: apt, users, sudo, kvm_amd, the nightly timer."""

import os
import shlex

import pytest
from debian_machine import TO_BE_HAD, DebianMachine
from lab_play import Player

from harness.host.ssh_connection import connect

pytestmark = [pytest.mark.emulated, pytest.mark.nightly]

#: In the place of `nsvm`, whose dependencies are no matter of this test; it runs as it would.
NIGHT = """#!/bin/sh
mkdir -p results/20270131T030000Z && echo "$@" > results/20270131T030000Z/results.jsonl
"""
COMMAND = "/usr/local/bin/night"


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    if os.geteuid():
        pytest.skip("making a Debian needs root")
    with DebianMachine(tmp_path_factory.mktemp("debian")) as machine:
        yield machine


def there(debian, *words):
    with connect(debian.lab, 30) as connection:
        return connection.run(*words, timeout_s=120)


def test_a_debian_becomes_a_machine_of_the_lab(debian, tmp_path):
    """Twice: the second time nothing is changed. Then the night runs, and is collected."""
    play = Player(debian.lab, tmp_path, svm_host_packages=[*TO_BE_HAD], nightly_command=COMMAND)
    with connect(debian.lab, 30) as connection:
        connection.run("tee", COMMAND, data=NIGHT.encode())
        connection.run("chmod", "755", COMMAND)
    setup = ("prepare.yml", "nightly.yml")
    # Packages, three files, the user, sudo, kvm_amd's two; results, two units, the timer.
    assert play(*setup) == 11
    assert play(*setup) == 0

    assert there(debian, "cat", "/sys/module/kvm_amd/parameters/nested").strip() in ("1", "Y")
    as_user = ("runuser", "-u", "nsvm", "--", "sudo", "-n", "id", "-u")
    assert there(debian, *as_user).strip() == "0"
    assert "kvm" in there(debian, "id", "-Gn", "nsvm").split()
    for question, answer in (("is-enabled", "enabled"), ("is-active", "active")):
        assert there(debian, "systemctl", question, "nsvm-nightly.timer").strip() == answer
    there(debian, "systemd-analyze", "verify", "nsvm-nightly.timer", "nsvm-nightly.service")

    there(debian, "systemctl", "start", "nsvm-nightly.service")
    play("collect.yml", results_to=tmp_path / "nights")
    night = tmp_path / "nights" / debian.name / "20270131T030000Z/results.jsonl"
    assert shlex.split(night.read_text()) == ["run", "--host", "local", "--require", "nested_svm"]
