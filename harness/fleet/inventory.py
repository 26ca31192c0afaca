"""Which hosts an inventory has, as Ansible reads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.fleet.errors import FleetError
from harness.host.lab_file import is_name

_READ_S = 120.0
_REFUSED = re.compile(r"Failed to parse inventory with '\w+' plugin: (.+)")
_ORIGIN = re.compile(r"Origin: .*:(\d+):\d+$")

#: A file that is not understood is an error, not one without hosts.
STRICT = {
    "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FATAL": "1",
    "ANSIBLE_INVENTORY_UNPARSED_FAILED": "1",
    "ANSIBLE_NOCOLOR": "1",
}


def search_path() -> str:
    """Return a PATH on which Ansible's commands of this Python come first."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


def ansible_command(name: str) -> str:
    """Return the path of one of Ansible's commands.

    Raises FleetError: it is not installed.
    """
    found = shutil.which(name, path=search_path())
    if found is None:
        raise FleetError(f"no {name}: pip install 'nsvm-harness[lab]'")
    return found


def read_hosts(inventories: Sequence[Path], limit: str = "") -> list[str]:
    """Return the names of the hosts, sorted; `limit` is a pattern of Ansible's.

    Raises FleetError: an inventory cannot be read, has no host, or one whose name is none here.
    """
    shown = ", ".join(map(str, inventories))
    for path in inventories:
        if not path.exists():
            raise FleetError(f"inventory {path}: no such file or directory")
    words = [word for path in inventories for word in ("-i", str(path))]
    content = _listed([*words, "--list", *(["--limit", limit] if limit else [])], shown)
    hosts = sorted({host for name in content for host in _hosts_of(content, name)})
    if not hosts:
        raise FleetError(f"inventory {shown}: no host" + (f" matches {limit}" if limit else ""))
    for host in hosts:
        if not is_name(host):
            raise FleetError(
                f"inventory {shown}: {host!r}: a host's name has letters, digits, '.', '_' and"
                " '-'; its address is ansible_host"
            )
    return hosts


def _listed(words: Sequence[str], shown: str) -> dict[str, Any]:
    command = [ansible_command("ansible-inventory"), *words]
    environment = {**os.environ, **STRICT}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_READ_S
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise FleetError(f"inventory {shown}: ansible-inventory: {e}") from e
    if done.returncode:
        raise FleetError(f"inventory {shown}: {_said(done.stderr)}")
    try:
        content = json.loads(done.stdout)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise FleetError(f"inventory {shown}: ansible-inventory did not list it as JSON")
    return content


def _hosts_of(content: dict[str, Any], group: str) -> list[str]:
    if group == "_meta":
        return []
    return list(content[group].get("hosts", ()))


def _said(text: str) -> str:
    """Return in one line why Ansible did not take an inventory: what its first plugin says of it.

    All its plugins try one after the other; the last line only says that none could.
    """
    lines = [re.sub(r"^\[\w+\]: ", "", line.strip()) for line in text.splitlines()]
    where = next((found[1] for line in lines if (found := _ORIGIN.match(line))), "")
    for line in lines:
        if found := _REFUSED.match(line):
            return found[1] + (f" (line {where})" if where else "")
    return next((line for line in reversed(lines) if line), "it cannot be read")
