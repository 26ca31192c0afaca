"""The playbooks on an emulated lab machine, over SSH: kvm_amd's parameters and the nightly timer.

What the machine has no userland for (apt, pip, systemd, sudo) is left out here.
"""

import os
import re
import subprocess

import pytest
from lab_machine import LabMachine
from near_lab import inventory_text

from harness.fleet.inventory import ansible_command, search_path
from harness.host.bundle import tree_root
from harness.host.ssh_connection import connect

pytestmark = [pytest.mark.emulated, pytest.mark.nightly]

ANSIBLE = tree_root() / "ansible"

KVM_AMD = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: svm_host
        tasks_from: kvm_amd.yml
      vars:
        svm_host_kvm_amd_parameters: { nested: 1, vgif: 0 }
"""


@pytest.fixture(scope="module")
def machine(one_kernel, tmp_path_factory):
    with LabMachine(one_kernel.kernel, tmp_path_factory.mktemp("lab")) as machine:
        yield machine


@pytest.fixture
def play(machine, tmp_path):
    """Return a function that applies a playbook there, and says how many tasks changed it."""
    lab = machine.lab
    inventory = tmp_path / "inventory.json"
    inventory.write_text(
        inventory_text(
            [lab],
            ansible_python_interpreter=lab.python,
            ansible_ssh_common_args=f"-F none -o UserKnownHostsFile={lab.known_hosts}",
            # The server there has neither sftp nor scp.
            ansible_ssh_transfer_method="piped",
            ansible_become=False,
        )
    )

    def apply(playbook, *words, **variables):
        extra = [word for item in variables.items() for word in ("-e", "=".join(map(str, item)))]
        done = subprocess.run(
            [ansible_command("ansible-playbook"), "-i", inventory, playbook, *extra, *words],
            cwd=ANSIBLE,
            env={
                **os.environ,
                "PATH": search_path(),
                "ANSIBLE_ROLES_PATH": str(ANSIBLE / "roles"),
                "ANSIBLE_NOCOLOR": "1",
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return int(re.search(r"changed=(\d+)", done.stdout)[1])

    return apply


def there(machine, *words):
    with connect(machine.lab, 30) as connection:
        return connection.run(*words)


def test_kvm_amd_is_reloaded_with_its_parameters_and_only_once(machine, play, tmp_path):
    playbook = tmp_path / "kvm_amd.yml"
    playbook.write_text(KVM_AMD)
    where = [f"/etc/{name}" for name in ("modprobe.d", "modules-load.d", "tmpfiles.d")]
    there(machine, "mkdir", "-p", *where)
    vgif = ("cat", "/sys/module/kvm_amd/parameters/vgif")
    assert there(machine, *vgif).strip() in ("1", "Y")
    assert play(playbook, "--check") == 3
    assert play(playbook) == 5
    assert there(machine, *vgif).strip() in ("0", "N")
    assert play(playbook) == 0


def test_nightly_units_are_written_once(machine, play):
    there(machine, "mkdir", "-p", "/var/lib/nsvm", "/etc/systemd/system")
    assert play("nightly.yml") == 2
    assert play("nightly.yml") == 0
    service = there(machine, "cat", "/etc/systemd/system/nsvm-nightly.service")
    assert "run --host local --require nested_svm\n" in service
