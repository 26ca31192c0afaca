"""`lab.toml`: the machines of a lab, one line or one table for each.

    [defaults]                      # for all hosts that do not say otherwise
    user = "root"
    key = "~/.ssh/lab"

    [hosts]
    zen2 = "zen2.lab"               # a name and an address are enough

    [hosts.zen4]
    address = "192.0.2.14"
    port = 2222
    params = { vgif = 0 }

Keys: those of `LabHost`. Whatever is wrong is one error with file, line and key.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HostError
from harness.host import machine_lock

FILE_NAME = "lab.toml"
VARIABLE = "NSVM_LAB"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PARAMETER = re.compile(r"[a-z][a-z0-9_]*")


class LabError(HostError):
    """A lab.toml that cannot be used; the message has file, line and key."""


@dataclass(frozen=True)
class LabHost:
    """One machine of the lab, and how to reach it and run there."""

    name: str
    #: Host name or IP address.
    address: str
    port: int = 22
    user: str = "root"
    #: File of the private key; None: those of the SSH agent and of ~/.ssh.
    key: Path | None = None
    #: Whether to ask the SSH agent for keys.
    agent: bool = True
    known_hosts: Path = Path("~/.ssh/known_hosts")
    #: The host's Python, 3.11 or newer.
    python: str = "python3"
    #: What the harness keeps there; relative to the user's home directory.
    directory: str = ".nsvm"
    #: Whose lock keeps two runs apart; one for the whole machine.
    lock: str = str(machine_lock.PATH)
    #: Run there as root, through `sudo -n`.
    sudo: bool = False
    #: How long to try to connect when a run begins, in seconds.
    connect_s: float = 20.0
    #: How long to try to get a lost connection back, in seconds.
    reconnect_s: float = 120.0
    #: How long to wait for a host that was lost to be up again, in seconds.
    boot_s: float = 300.0
    #: How long the host waits for a client that has gone, in seconds, before it ends the run.
    linger_s: float = 600.0
    #: kvm_amd's parameters on this host, other than those that it has.
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``user@address``, with the port unless it is 22."""
        return f"{self.user}@{self.address}" + (f":{self.port}" if self.port != 22 else "")


class _Wrong(Exception):
    """What is wrong about one value."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Wrong("a text, please")
    if any(ord(c) < 32 for c in value):
        raise _Wrong("no control characters, please")
    return value


def _word(value: Any) -> str:
    if _text(value).startswith("-") or re.search(r"\s", value):
        raise _Wrong(f"{value!r} has a space or begins with '-'")
    return str(value)


def _port(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 16:
        raise _Wrong(f"{value!r} is no port (1 to 65535)")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1 << 20:
        raise _Wrong(f"{value!r} is no number of seconds")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"{value!r} is neither true nor false")
    return value


def _file(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _existing_file(value: Any) -> Path:
    path = _file(value)
    if not path.is_file():
        raise _Wrong(f"no file {path}")
    return path


def _params(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong("a table, please: { npt = 0 }")
    return dict(parameter(f"{name}={_plain(setting)}") for name, setting in value.items())


def _plain(setting: Any) -> str:
    return str(int(setting)) if isinstance(setting, bool) else str(setting)


def parameter(text: str) -> tuple[str, str]:
    """Return name and value of a module parameter, given as ``npt=0``.

    Raises:
        ValueError: it is none; the message says why.
    """
    name, equals, value = text.partition("=")
    if not equals or not _PARAMETER.fullmatch(name) or not re.fullmatch(r"[A-Za-z0-9]+", value):
        raise _BadParameter(f"{text!r} is not of the form npt=0")
    return name, value


class _BadParameter(_Wrong, ValueError):
    pass


_KEYS: dict[str, Callable[[Any], Any]] = {
    "address": _word,
    "port": _port,
    "user": _word,
    "key": _existing_file,
    "agent": _flag,
    "known_hosts": _file,
    "python": _word,
    "directory": _text,
    "lock": _text,
    "sudo": _flag,
    "connect_s": _seconds,
    "reconnect_s": _seconds,
    "boot_s": _seconds,
    "linger_s": _seconds,
    "params": _params,
}


def is_name(text: str) -> bool:
    """Say whether a machine can be called so."""
    return bool(_NAME.fullmatch(text))


def lab_path(given: Path | None = None) -> Path:
    """Return the file to read: `given`, else $NSVM_LAB, else ./lab.toml."""
    return given or Path(os.environ.get(VARIABLE) or FILE_NAME)


def find_host(name: str, given: Path | None = None) -> LabHost:
    """Return one host of the lab.

    Raises:
        LabError: there is no such file or host, or something in the file is wrong.
    """
    path = lab_path(given)
    hosts = read_lab(path)
    if name not in hosts:
        there = ", ".join(sorted(hosts)) or "none"
        raise LabError(f"{path}: no host {name!r}; there are: {there}")
    return hosts[name]


def read_lab(path: Path) -> dict[str, LabHost]:
    """Return the hosts of a lab by name.

    Raises:
        LabError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = path.read_text()
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise LabError(f"{path}: no such file (--lab FILE, or ${VARIABLE})") from None
    except (OSError, UnicodeDecodeError) as e:
        raise LabError(f"{path}: {getattr(e, 'strerror', None) or 'no text'}") from e
    except tomllib.TOMLDecodeError as e:
        raise LabError(f"{path}: {e}") from e
    return _Reader(path, text).hosts(content)


class _Reader:
    """Turns a parsed file into hosts; knows where in the text a key stands."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()

    def hosts(self, content: Mapping[str, Any]) -> dict[str, LabHost]:
        for name in content:
            if name not in ("defaults", "hosts"):
                raise self._error((name,), "no such table; there are defaults and hosts")
        defaults = self._values(("defaults",), content.get("defaults", {}))
        if "address" in defaults:
            raise self._error(("defaults", "address"), "each host has one of its own")
        hosts = content.get("hosts", {})
        if not isinstance(hosts, dict):
            raise self._error(("hosts",), "a table, please")
        return {name: self._host(name, value, defaults) for name, value in hosts.items()}

    def _host(self, name: str, value: Any, defaults: Mapping[str, Any]) -> LabHost:
        where = ("hosts", name)
        if not is_name(name):
            raise self._error(where, "a host's name has letters, digits, '.', '_' and '-'")
        own = self._values(where, {"address": value} if isinstance(value, str) else value)
        if "address" not in own:
            raise self._error(where, "no address")
        known = LabHost.known_hosts.expanduser()
        return LabHost(**{"known_hosts": known, **defaults, **own, "name": name})

    def _values(self, where: tuple[str, ...], table: Any) -> dict[str, Any]:
        if not isinstance(table, dict):
            raise self._error(where, "a table, please")
        values = {}
        for key, value in table.items():
            if key not in _KEYS:
                raise self._error((*where, key), f"no such key; there are {', '.join(_KEYS)}")
            try:
                values[key] = _KEYS[key](value)
            except _Wrong as e:
                raise self._error((*where, key), str(e)) from None
        return values

    def _error(self, key: tuple[str, ...], what: str) -> LabError:
        line = self._line(key)
        place = f"{self._path}:{line}" if line else str(self._path)
        return LabError(f"{place}: {'.'.join(key)}: {what}")

    def _line(self, key: tuple[str, ...]) -> int | None:
        """Return the line of a key, or of the nearest table or inline table that holds it.

        tomllib does not tell; this finds what people write, and None for the rest.
        """
        table: tuple[str, ...] = ()
        best, line = 0, None
        for number, text in enumerate(self._lines, start=1):
            if found := re.match(r"\s*\[\s*([^\]]+?)\s*\]", text):
                table = _dotted(found[1])
                here = table
            elif found := re.match(r"\s*([^=#]+?)\s*=", text):
                here = (*table, *_dotted(found[1]))
            else:
                continue
            if key[: len(here)] == here and len(here) > best:
                best, line = len(here), number
        return line


def _dotted(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))
