"""Choosing a host, and keeping sessions on it: fresh for every case, or shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from harness.errors import HostError, HostLost
from harness.facts import HostView, nested_svm
from harness.host.session import Host, Session
from harness.scenarios.case import GUEST_LINUX, GUEST_QEMU

T = TypeVar("T")

#: The kernel that the emulated host boots unless told otherwise.
DEFAULT_KERNEL = "6.1"

#: What the name of a lab machine follows: ``ssh:NAME``.
SSH = "ssh:"

#: Memory of an emulated host that has a Linux guest, in MiB.
GUEST_LINUX_MIB = 1024

#: And more of it for QEMU, which has the guest twice while it moves.
GUEST_QEMU_MIB = 640


def host_name(text: str) -> str:
    """Return what a command line says of the host, as it is.

    Raises:
        ValueError: it is none of auto, local, emulated and ``ssh:NAME``.
    """
    if text in ("auto", "local", "emulated") or (text.startswith(SSH) and text != SSH):
        return text
    raise ValueError(f"{text!r} is not one of auto, local, emulated, ssh:NAME")


@dataclass(frozen=True)
class HostChoice:
    """What the command line says about the host."""

    #: auto, local, emulated, or ``ssh:NAME``, a machine of the lab.
    host: str = "auto"
    kernel: str | None = None
    modules: Path | None = None
    #: The file that describes the lab; None: where `lab_file.lab_path` finds it.
    lab: Path | None = None
    #: kvm_amd's parameters, other than those that the host has; a scenario's own count more.
    params: tuple[tuple[str, str], ...] = ()

    def resolved(self, view: HostView | None = None) -> str:
        """Return ``local``, ``emulated`` or ``ssh:NAME``; ``auto``: local if nested SVM is there.

        Raises:
            HostError: a choice that contradicts itself.
        """
        if self.kernel and self.host not in ("auto", "emulated"):
            raise HostError(
                f"--kernel chooses the emulated host's kernel; it cannot go with {self.host}"
            )
        if self.host != "auto":
            return self.host
        if self.kernel:
            return "emulated"
        return "local" if nested_svm(view or HostView()).holds else "emulated"


def make_host(
    choice: HostChoice,
    params: Mapping[str, str] | None = None,
    log: Callable[[str], None] = lambda text: None,
    *,
    warm: bool = True,
    keep_spare: bool = False,
    cpus: int = 1,
) -> Host:
    """Return the chosen host, not started yet; an emulated one gets `cpus` CPUs.

    `params` are kvm_amd's, and may have GUEST_LINUX and GUEST_QEMU.

    Raises:
        HostError: it cannot be had.
    """
    params = {**dict(choice.params), **(params or {})}
    guest_linux = params.pop(GUEST_LINUX, None) is not None
    guest_qemu = params.pop(GUEST_QEMU, None) is not None
    kind = choice.resolved()
    # Imported here: no kind of host needs what another one does.
    if kind.startswith(SSH):
        return _lab_machine(choice, params, log, guest_linux=guest_linux)
    if kind == "local":
        from harness.host.local import LocalHost

        if not guest_linux:
            return LocalHost(params, log=log)
        from harness.host.guest_payload import build_payload
        from harness.host.kernels import resolve

        return LocalHost(params, build_payload(resolve(DEFAULT_KERNEL)), log)
    from harness.host.emulated import EmulatedHost, Hardware
    from harness.host.kernels import resolve

    kernel = resolve(choice.kernel or DEFAULT_KERNEL, choice.modules)
    hardware = Hardware(cpus=cpus)
    if guest_linux:
        from harness.host.guest_payload import build_payload

        hardware = Hardware(cpus, GUEST_LINUX_MIB, build_payload(kernel))
    if guest_qemu:
        from harness.host.qemu_payload import build_qemu_payload

        hardware = replace(
            hardware,
            memory_mib=hardware.memory_mib + GUEST_QEMU_MIB,
            qemu_disk=build_qemu_payload(),
        )
    return EmulatedHost(kernel, params, hardware, warm=warm, keep_spare=keep_spare, log=log)


def _lab_machine(
    choice: HostChoice, params: Mapping[str, str], log: Callable[[str], None], *, guest_linux: bool
) -> Host:
    from harness.host.lab_file import find_host
    from harness.host.ssh import SshHost

    if guest_linux:
        raise HostError("no image of Linux is carried to lab machines: use the emulated host")
    return SshHost(find_host(choice.host.removeprefix(SSH), choice.lab), params, log)


def on_session(host: Host, use: Callable[[Session], T], log: Callable[[str], None]) -> T:
    """Return what `use` makes of a session of a host; of a fresh one if the host hangs silently.

    The emulated one hangs now and then, with nothing running at all.

    Raises HostError: the host does not come up, or is lost otherwise, or once more.
    """
    try:
        return use(host.start())
    except HostLost as e:
        if not e.silent:
            raise
        log(f"{e}; once more")
    return use(host.start())


class HostPool:
    """Sessions by module parameters; a context manager that ends all hosts it started.

    Used by one thread, but for `cancel`.
    """

    def __init__(
        self,
        choice: HostChoice,
        *,
        fresh: bool = True,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._choice = choice
        self._fresh = fresh
        self._log = log
        self._hosts: dict[tuple[tuple[str, str], ...], Host] = {}
        self._sessions: dict[Host, Session] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # One that cannot be closed must not keep the others open.
        with ExitStack() as stack:
            for host in self._hosts.values():
                stack.callback(host.close)
        self._hosts.clear()
        self._sessions.clear()

    def host(self, params: Mapping[str, str]) -> Host:
        """Return the host for these module parameters, started or not."""
        key = tuple(sorted(params.items()))
        if key not in self._hosts:
            self._hosts[key] = make_host(self._choice, params, self._log, keep_spare=self._fresh)
        return self._hosts[key]

    def has(self, params: Mapping[str, str]) -> bool:
        """Say whether a host for these module parameters was made."""
        return tuple(sorted(params.items())) in self._hosts

    def session(self, params: Mapping[str, str]) -> tuple[Host, Session]:
        """Return a session for one case: a fresh machine each time, if the host can give one.

        Raises:
            HostError: the host does not come up.
        """
        host = self.host(params)
        if host.kind != "emulated":
            self._release_others(host)
        if host not in self._sessions or (self._fresh and host.kind == "emulated"):
            self._sessions[host] = host.start()
        return host, self._sessions[host]

    def _release_others(self, host: Host) -> None:
        """One real machine has one set of parameters at a time.

        Also one whose session was dropped may still have the machine.
        """
        for other in self._hosts.values():
            if other is not host:
                self._sessions.pop(other, None)
                other.close()

    def drop(self, params: Mapping[str, str]) -> None:
        """Forget a session whose host was lost; the next case gets a new one."""
        self._sessions.pop(self.host(params), None)

    def cancel(self) -> None:
        """From another thread: make whoever waits for a session's call get Cancelled."""
        for session in list(self._sessions.values()):
            session.cancel()

    def describe(self) -> list[dict[str, Any]]:
        """Return the descriptions of all hosts that were used."""
        return [host.describe() for host in self._hosts.values()]
