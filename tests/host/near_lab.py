"""This very machine as a lab machine: behind an SSH server of one's own."""

import getpass
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from nsvm_process import wait_until
from ssh_server import ssh_server
from tcp_gate import Gate

from harness.host.lab_file import LabHost

__all__ = ["assert_nothing_is_left", "gate", "near", "processes_of", "ssh_server"]

HERE = Path(__file__).parent


@pytest.fixture
def near(ssh_server, tmp_path):
    """The machine's entry in a lab.toml; its agent finds the tests' targets."""
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("/dev/kmsg is not ours to read")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={HERE} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return LabHost(
        "near",
        "127.0.0.1",
        ssh_server.port,
        user=getpass.getuser(),
        key=ssh_server.here / "client",
        agent=False,
        known_hosts=ssh_server.here / "known",
        python=str(python),
        directory=str(tmp_path / "nsvm"),
        lock=str(tmp_path / "lock"),
        connect_s=5,
        reconnect_s=20,
        boot_s=5,
        linger_s=60,
    )


@pytest.fixture
def gate(near, ssh_server):
    """A way to the machine that can be cut, and the machine's entry by this way."""
    with Gate(near.port) as gate:
        known = ssh_server.here / f"known-{gate.port}"
        text = near.known_hosts.read_text()
        known.write_text(text.replace(f":{near.port} ", f":{gate.port} "))
        yield gate, replace(near, port=gate.port, known_hosts=known)


def processes_of(near):
    """Everything whose command line names the machine's directory: keepers, agents, relays."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(near.directory in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def assert_nothing_is_left(near):
    wait_until(lambda: not processes_of(near), "its processes to end")
    directory = Path(near.directory)
    assert sorted(path.name for path in directory.iterdir()) in (["code"], ["code", "runs"])
    assert not [*directory.glob("runs/*")]
    assert Path(near.lock).read_text() == ""


def inventory_text(machines, **variables):
    """Machines as an inventory of Ansible's; `variables` of all of them come on top."""
    hosts = {}
    for machine in machines:
        hosts[machine.name] = {
            "ansible_host": machine.address,
            "ansible_port": machine.port,
            "ansible_user": machine.user,
            "ansible_ssh_private_key_file": str(machine.key),
        }
        for key, value in vars(machine).items():
            if key not in ("name", "address", "port", "user", "key", "params"):
                plain = value if isinstance(value, bool | int | float) else str(value)
                hosts[machine.name][f"nsvm_{key}"] = plain
    return json.dumps({"all": {"hosts": hosts, "vars": variables}})


def lab_text(machine):
    """A machine's entry as it stands in a lab.toml."""
    lines = [f"[hosts.{machine.name}]"]
    for key, value in vars(machine).items():
        if key not in ("name", "params"):
            plain = value if isinstance(value, bool | int | float) else str(value)
            lines.append(f"{key} = {json.dumps(plain)}")
    return "\n".join(lines) + "\n"
