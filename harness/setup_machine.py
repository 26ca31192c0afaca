"""First-time set-up, run by the system's python3 before there is a virtual environment.

Installs the system packages that are missing, if it may, then makes `.venv` and installs this
project into it. Standard library only, and nothing newer than Python 3.7 in syntax or library: an
old python3 must get as far as finding a newer one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Sequence  # noqa: UP035

OLDEST = (3, 11)
NEWER_PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

TREE = Path(__file__).resolve().parent.parent
VENV = TREE / ".venv"

_QUICK_S = 60
_UPDATE_S = 600
_INSTALL_S = 3600


class SetupError(Exception):
    """Set-up cannot go on; one line says why and what to do."""


class Need(NamedTuple):
    """A command, or a file if it begins with a slash, and the Debian package that has it."""

    what: str
    package: str


NEEDS = (
    Need("qemu-system-x86_64", "qemu-system-x86"),
    Need("cc", "gcc"),
    Need("objcopy", "binutils"),
    Need("/usr/include/stdio.h", "libc6-dev"),
    Need("setpriv", "util-linux"),
    Need("dpkg-deb", "dpkg"),
    Need("apt-get", "apt"),
    Need("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
)


# System packages


def package_of(what: str) -> str:
    """Return the package that has a command or file of `NEEDS`."""
    return next(need.package for need in NEEDS if need.what == what)


def is_there(what: str) -> bool:
    """Say whether a command is in the path, or a file exists."""
    return Path(what).exists() if what.startswith("/") else shutil.which(what) is not None


def missing_packages(python: str) -> list[str]:
    """Return the packages to install, in the table's order; `python` is to make the environment."""
    packages = [need.package for need in NEEDS if not is_there(need.what)]
    # Debian's python3 has venv without what fills one: that is in a package of its own.
    if not _succeeds([python, "-c", "import ensurepip, venv"]):
        packages.append(venv_package(python))
    return packages


def venv_package(python: str) -> str:
    """Return the package that completes Debian's interpreter `python`."""
    name = Path(python).name
    return f"{name if name in NEWER_PYTHONS else 'python3'}-venv"


def install_command(packages: Sequence[str]) -> list[str]:
    """Return the one command that installs packages, without the rights it takes."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def privilege() -> list[str] | None:
    """Return what to put before a command to run it as root; None if that takes a password."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and _succeeds(["sudo", "-n", "true"]):
        return ["sudo", "-n"]
    return None


def install(packages: Sequence[str], rights: list[str] | None, has_apt: bool) -> None:
    """Install packages with apt-get.

    Raises:
        SetupError: it may not, or apt-get fails.
    """
    if not has_apt:
        raise SetupError(f"missing; install what Debian calls {' '.join(packages)}, and run again")
    if rights is None:
        command = " ".join(["sudo", *install_command(packages)])
        raise SetupError(f"system packages are missing; run: {command}")
    say(f"installing system packages: {' '.join(packages)}")
    quiet = [*rights, "env", "DEBIAN_FRONTEND=noninteractive"]
    wait = ["-o", "DPkg::Lock::Timeout=120"]
    run([*quiet, "apt-get", "-q", *wait, "update"], "apt-get update", _UPDATE_S)
    run([*quiet, *install_command(packages), "-q", *wait], "apt-get install", _INSTALL_S)


# Python


def find_python() -> str:
    """Return this interpreter if it is new enough, else the first newer one in the path.

    Raises:
        SetupError: there is none.
    """
    if tuple(sys.version_info[:2]) >= OLDEST:
        return sys.executable
    for name in NEWER_PYTHONS:
        path = shutil.which(name)
        # It has to run: version managers put names in the path with nothing behind them.
        if path and _succeeds([path, "-c", "pass"]):
            return path
    here = ".".join(map(str, sys.version_info[:3]))
    raise SetupError(
        f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed: {sys.executable} is {here}, and "
        f"{NEWER_PYTHONS[0]} to {NEWER_PYTHONS[-1]} are not there (or name one: make PYTHON=PATH)"
    )


def stamp_of(pyproject: bytes, version: str) -> str:
    """Return what the stamp holds when `.venv` has what pyproject.toml asks for."""
    return hashlib.sha256(version.encode() + b"\n" + pyproject).hexdigest()


def make_environment(python: str, venv: Path = VENV, tree: Path = TREE) -> None:
    """Make `.venv` if there is none that runs; install the project if pyproject.toml changed.

    Raises:
        SetupError: venv or pip fails.
    """
    inner = str(venv / "bin" / "python")
    if not (Path(inner).exists() and _succeeds([inner, "-m", "pip", "--version"])):
        say(f"creating {venv.name} with {python}")
        run([python, "-m", "venv", "--clear", str(venv)], "python -m venv", _QUICK_S * 5)
    stamp = venv / "nsvm-setup.stamp"
    wanted = stamp_of((tree / "pyproject.toml").read_bytes(), str(tree))
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("installing the project and its dependencies (pip)")
    pip = [inner, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--editable", f"{tree}[dev]"], "pip install", _INSTALL_S)
    stamp.write_text(wanted)


# Running things


def say(text: str) -> None:
    """Print one line about the step that begins."""
    print(f"setup: {text}", flush=True)


def run(command: Sequence[str], what: str, timeout_s: float) -> None:
    """Run a step; its output is shown only if it fails.

    Raises:
        SetupError: it failed, or took longer than `timeout_s` seconds.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except OSError as e:
        raise SetupError(f"{what}: cannot run {command[0]}: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        raise SetupError(f"{what}: not done within {timeout_s:.0f} s") from e
    if done.returncode:
        lines = done.stdout.decode(errors="replace").splitlines()
        print("\n".join(f"  | {line}" for line in lines[-20:]), file=sys.stderr)
        raise SetupError(f"{what} failed with status {done.returncode}")


def _succeeds(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_QUICK_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def main() -> int:
    """Set up this machine and tree; 0: ready, 1: not, and a line on stderr says why."""
    try:
        python = find_python()
        packages = missing_packages(python)
        if packages:
            install(packages, privilege(), is_there("apt-get"))
        make_environment(python)
    except SetupError as e:
        print(f"setup: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
