"""kvm_amd's module parameters: reloaded with others, and given back as they were.

Standard library only: this runs on the host whose parameters they are.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from harness.errors import HostError

MODULE = "kvm_amd"
_DIRECTORY = Path("/sys/module") / MODULE / "parameters"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RELOAD_S = 60.0
_SAME = {"Y": "1", "N": "0"}


def boot_id() -> str:
    """Return what tells this boot of the kernel from every other one."""
    return _BOOT_ID.read_text().strip()


def current() -> dict[str, str]:
    """Return kvm_amd's parameters; none if it is not loaded, or has none to show."""
    found = {}
    for path in sorted(_DIRECTORY.glob("*")):
        try:
            found[path.name] = path.read_text().strip()
        except OSError:
            continue  # write-only ones: nothing to give back
    return found


def of_hello(params: Mapping[str, str]) -> dict[str, str]:
    """Return kvm_amd's parameters among those of all modules that an agent's `hello` has."""
    prefix = f"{MODULE}."
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def differing(wanted: Mapping[str, str], seen: Mapping[str, str]) -> list[str]:
    """Return a line for each parameter that is not as wanted; Y is 1, and N is 0."""
    lines = []
    for name, value in wanted.items():
        if name not in seen:
            lines.append(f"{MODULE} has no parameter {name}")
        elif _same(seen[name]) != _same(value):
            lines.append(f"{MODULE}.{name} is {seen[name]}, not {value}: refused by kernel or CPU")
    return lines


def _same(value: str) -> str:
    return _SAME.get(value.upper(), value)


def require(wanted: Mapping[str, str], seen: Mapping[str, str]) -> None:
    """Check that parameters are as wanted.

    Raises:
        HostError: they are not; all of them in one line.
    """
    if lines := differing(wanted, seen):
        raise HostError("; ".join(lines))


def reload(values: Mapping[str, str]) -> None:
    """Unload kvm_amd and load it with these parameters.

    Raises:
        HostError: it is in use, or cannot be loaded.
    """
    settings = [f"{name}={value}" for name, value in values.items()]
    for command in (["modprobe", "-r", MODULE], ["modprobe", MODULE, *settings]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_RELOAD_S)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise HostError(f"{' '.join(command)}: {e}") from e
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
            raise HostError(f"{' '.join(command)}: {said}")


@contextmanager
def borrowed(wanted: Mapping[str, str], record: Path) -> Iterator[None]:
    """Have kvm_amd with other parameters for a while; afterwards it has all that it had.

    `record` is a file that says meanwhile what to give back, for `give_back` if this process dies.

    Raises:
        HostError: kvm_amd is not loaded, is in use, or does not take one of them.
    """
    before = current()
    if not differing(wanted, before):
        yield
        return
    if not before:
        raise HostError(f"{MODULE} is not loaded: its parameters cannot be changed")
    require({name: before.get(name, "") for name in wanted}, before)
    record.write_text(json.dumps({"boot_id": boot_id(), "params": before}))
    try:
        try:
            reload({**before, **wanted})
            require(wanted, current())
        except HostError as e:
            raise HostError(f"parameters {_words(wanted)}: {e}") from e
        yield
    finally:
        give_back(record)


def give_back(record: Path) -> str:
    """Load kvm_amd as `record` says, if there is such a file; return what was done, in words.

    Parameters do not outlive a boot, so a record of another boot is only removed.

    Raises:
        HostError: kvm_amd cannot be reloaded; the record stays.
    """
    try:
        said = json.loads(record.read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        said = {"boot_id": "", "params": {}}
    changed: dict[str, str] = {}
    if said["boot_id"] == boot_id():
        changed = {name: v for name, v in said["params"].items() if current().get(name) != v}
        if changed:
            reload(said["params"])
            require(said["params"], current())
    record.unlink()
    return _words(changed)


def _words(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())
