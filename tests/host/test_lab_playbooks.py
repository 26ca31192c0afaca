"""The playbooks on an emulated lab machine, over SSH: kvm_amd's parameters and the nightly timer.

What the machine has no userland for (apt, pip, systemd, sudo) is left out here.
"""

import pytest
from lab_machine import LabMachine
from lab_play import Player

from harness.host.ssh_connection import connect

pytestmark = [pytest.mark.emulated, pytest.mark.nightly]

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
    """Return what applies playbooks there, and says how many tasks changed something."""
    return Player(
        machine.lab,
        tmp_path,
        ansible_python_interpreter=machine.lab.python,
        # The server there has neither sftp nor scp.
        ansible_ssh_transfer_method="piped",
        ansible_become=False,
    )


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
