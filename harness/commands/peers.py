"""The other end of `nsvm send` and `nsvm receive`, and the /dev/kvm of this one."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from harness.errors import HostError
from harness.host import machine_lock
from harness.host.bundle import build_images
from kvm_ioctl.handles import Kvm

_PORTS = 1 << 16


@dataclass(frozen=True)
class Tcp:
    """A TCP port."""

    host: str
    port: int


@dataclass(frozen=True)
class Unix:
    """A UNIX socket."""

    path: Path


@dataclass(frozen=True)
class Command:
    """A command whose standard input and output are the link."""

    argv: tuple[str, ...]


def listening_address(text: str) -> Tcp | Unix:
    """Return what `--listen` names: ``tcp:PORT``, ``tcp:HOST:PORT`` or ``unix:PATH``.

    Raises click.UsageError: neither.
    """
    kind, _, where = text.partition(":")
    if kind == "tcp":
        host, _, port = where.rpartition(":")
        return Tcp(host or "127.0.0.1", _port(text, port, least=0))
    if kind == "unix" and where:
        return Unix(Path(where))
    raise click.UsageError(f"{text!r} is neither tcp:PORT, tcp:HOST:PORT nor unix:PATH")


def destination(text: str) -> Tcp | Unix | Command:
    """Return what `--to` names: ``tcp:HOST:PORT``, ``unix:PATH``, or else a command.

    Raises click.UsageError: none of them.
    """
    kind, _, where = text.partition(":")
    if kind == "tcp":
        host, _, port = where.rpartition(":")
        if not host:
            raise click.UsageError(f"{text!r} is not tcp:HOST:PORT")
        return Tcp(host, _port(text, port, least=1))
    if kind == "unix" and where:
        return Unix(Path(where))
    try:
        argv = shlex.split(text)
    except ValueError as e:
        raise click.UsageError(f"{text!r}: {e}") from e
    if not argv:
        raise click.UsageError("--to is empty")
    return Command(tuple(argv))


def _port(text: str, port: str, *, least: int) -> int:
    if not (port.isascii() and port.isdecimal() and least <= int(port) < _PORTS):
        raise click.UsageError(f"{text!r}: no port {port!r}; from {least} to {_PORTS - 1}, please")
    return int(port)


@contextlib.contextmanager
def local_kvm() -> Iterator[Kvm]:
    """Give this machine's KVM, for machines of proxies, with a share in the machine's lock.

    A share: both ends may be on this machine, several pairs of them too; none measures or judges by
    what another one could disturb. A run does, so there is none meanwhile, nor any of this during a
    run.

    Raises HostError: there is none, it may not be used, a run has it, or it refuses something.
    """
    os.environ.setdefault("NSVM_IMAGES", str(build_images()))
    path, ourselves = machine_lock.local_path(), machine_lock.ourselves()
    # Nobody knows how long a run takes: it is for the user to wait.
    with machine_lock.shared_machine_lock(path, ourselves, patience_s=0), _opened_kvm() as kvm:
        yield kvm


@contextlib.contextmanager
def _opened_kvm() -> Iterator[Kvm]:
    try:
        with Kvm() as kvm:
            yield kvm
    except OSError as e:
        raise HostError(f"this machine's KVM: {e}") from e
