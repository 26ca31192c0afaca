"""`nsvm run` on a lab machine, as a user does it: this machine, behind an SSH server."""

import json
import os

import pytest
from near_lab import assert_nothing_is_left, gate, lab_text, near, ssh_server  # noqa: F401
from nsvm_process import nsvm

SCENARIOS = '''
import time
from pathlib import Path
from harness.scenarios import scenario

@scenario()
def test_talks(context):
    """It says something for some seconds."""
    for number in range(400):
        context.note("line", number=number)
        time.sleep(0.01)

@scenario(params={"no_such": "1"})
def test_wants_a_parameter(context):
    """It never runs."""

@scenario()
def test_comes_last(context):
    """It runs after all that."""
'''


@pytest.fixture
def lab(tmp_path, near):  # noqa: F811
    """A directory with a lab.toml and scenarios."""
    (tmp_path / "lab.toml").write_text(lab_text(near))
    (tmp_path / "scenarios.py").write_text(SCENARIOS)
    return tmp_path


def run(lab, *options):
    where = ("--host", "ssh:near", "--lab", lab / "lab.toml", "--results", lab / "results")
    return nsvm("run", *where, *options, lab / "scenarios.py")


def events(lab):
    text = (lab / "results" / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_scenarios_run_there(lab, near):  # noqa: F811
    done = run(lab)
    ends = {e["case"]: e for e in events(lab) if e["event"] == "end"}
    assert {name: end["verdict"] for name, end in ends.items()} == {
        "talks": "PASS",
        "wants_a_parameter": "ERROR",
        "comes_last": "PASS",
    }, done.stdout + done.stderr
    assert done.returncode == 2
    assert "kvm_amd" in ends["wants_a_parameter"]["reason"]
    host = ends["talks"]["host"]
    assert (host["kind"], host["name"]) == ("ssh", "near")
    assert host["kernel_release"] == os.uname().release
    notes = [e["data"]["number"] for e in events(lab) if e["event"] == "emit"]
    assert notes == list(range(400))
    assert_nothing_is_left(near)


def test_a_lab_that_cannot_be_used_is_one_line(lab):
    (lab / "lab.toml").write_text('[hosts.near]\naddress = "near"\nport = "22"\n')
    done = run(lab)
    assert done.returncode == 2
    place = f"{lab / 'lab.toml'}:3: hosts.near.port"
    assert done.stderr.strip() == f"nsvm: {place}: '22' is no port (1 to 65535)"


def test_a_machine_that_the_lab_does_not_have(lab):
    done = nsvm("memory", "--host", "ssh:far", "--lab", lab / "lab.toml")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("lab.toml: no host 'far'; there are: near")
