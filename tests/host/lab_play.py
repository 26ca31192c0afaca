"""The playbooks of `ansible/`, applied to a machine over SSH."""

import os
import re
import subprocess

from near_lab import inventory_text

from harness.fleet.inventory import ansible_command, search_path
from harness.host.bundle import tree_root

ANSIBLE = tree_root() / "ansible"
#: Under TCG, perhaps beside other work: only a hang takes so long.
_PLAY_S = 900


class Player:
    """Applies playbooks to one machine; `variables` are the inventory's."""

    def __init__(self, lab, here, **variables):
        self._inventory = here / "inventory.json"
        variables = {
            "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={lab.known_hosts}",
            **variables,
        }
        self._inventory.write_text(inventory_text([lab], **variables))

    def __call__(self, *words, **variables):
        """Apply playbooks; return how many tasks changed something."""
        # Each playbook has a recap, with what those before it changed.
        return int(re.findall(r"changed=(\d+)", self.said(*words, **variables))[-1])

    def said(self, *words, **variables):
        """Apply playbooks; return what Ansible says."""
        extra = [word for item in variables.items() for word in ("-e", "=".join(map(str, item)))]
        done = subprocess.run(
            [ansible_command("ansible-playbook"), "-i", self._inventory, *words, *extra],
            cwd=ANSIBLE,
            env={
                **os.environ,
                "PATH": search_path(),
                "ANSIBLE_ROLES_PATH": str(ANSIBLE / "roles"),
                "ANSIBLE_NOCOLOR": "1",
                # Each step saved counts under TCG.
                "ANSIBLE_PIPELINING": "1",
            },
            capture_output=True,
            text=True,
            timeout=_PLAY_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
