"""A lab machine as a host: the agent runs there, held by a keeper, and is reached through SSH.

The harness goes there as one file (`artefact.py`). A run has the machine's lock, and outlives
broken connections (`keeper.py`, `ssh_link.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import paramiko

from harness.errors import HostError, HostLost, HostUnavailable
from harness.host import kvm_parameters
from harness.host.artefact import ATTACHER, RECEIVER, build_artefact
from harness.host.bundle import PRELOAD, Bundle
from harness.host.keeper import ACKNOWLEDGED
from harness.host.lab_file import LabHost
from harness.host.machine_lock import ourselves, whose
from harness.host.session import SILENCE_S, Event, Host, Session
from harness.host.ssh_connection import Connection, connect
from harness.host.ssh_link import Link

_INVENTORY = "harness.host.inventory:inventory"
#: For the keeper to clean up and give the machine back.
_END_S = 60.0
_TAKE_S = 150.0


class _KeptSession(Session):
    """A session whose agent's end the keeper tells; a connection's end is none."""

    kept: Event | None = None

    def successor(self) -> _KeptSession:
        """Return one that goes on where this one stands, and that no `cancel` reaches."""
        made = _KeptSession(self._pipe, self._why_dead, self.silence_s)
        made._buffer = self._buffer
        return made

    def events(self, silence_s: float | None = None) -> Iterator[Event]:
        """Yield events as they come; see `Session.events`."""
        for event in super().events(silence_s):
            if event["event"] == "kept":
                self.kept = event
                last = (event["log"].strip().splitlines() or ["no word"])[-1]
                raise self._why_dead(f"the agent ended with status {event['status']}: {last}")
            yield event


class SshHost(Host):
    """A lab machine; `params` are kvm_amd's while this has it. Use as a context manager.

    `start` may be called again after the host was lost; it then waits for it to be up again.
    """

    kind = "ssh"

    def __init__(
        self,
        lab: LabHost,
        params: Mapping[str, str] | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.lab = lab
        self.params = {**lab.params, **(params or {})}
        self.link: Link | None = None
        self._tell = log
        self._session: _KeptSession | None = None
        self._code: Bundle | None = None
        self._run = ""
        self._boot_id = ""
        self._was_lost = False
        self._hello: Event = {}
        self._inventory: dict[str, Any] = {}

    def _log(self, text: str) -> None:
        self._tell(f"{self.lab.name}: {text}")

    def describe(self) -> dict[str, Any]:
        """Return what results record of this host."""
        return {
            "kind": self.kind,
            "name": self.lab.name,
            "address": self.lab.label,
            "kernel_release": self._hello.get("release", "unknown"),
            "kernel_version": self._hello.get("version", ""),
            "kernel_origin": f"{self.lab.name} ({self.lab.label})",
            "module_parameters": self._hello.get("params", {}),
            "qemu_version": None,
            "silicon": "unknown",
            **self._inventory,
        }

    def start(self) -> Session:
        """Take the machine and start the agent there.

        Raises:
            HostError: it cannot be reached or had, is in use by another run, or does not have what
                the harness needs; one line says what.
        """
        self.close()
        if self._code is None:
            # Once: a host that is started again has the same code, whatever is edited meanwhile.
            self._code = build_artefact()
        patience_s = self.lab.boot_s if self._was_lost else self.lab.connect_s
        with connect(self.lab, patience_s) as connection:
            artefact = self._carry(connection, self._code)
            self._take(connection, artefact)
        self.link = Link(
            lambda offset: self._attach(artefact, offset),
            self.lab.reconnect_s,
            self._boot_id,
            self._log,
        )
        session = _KeptSession(self.link, self._why_dead, self.lab.reconnect_s + 3 * SILENCE_S)
        self._session = session
        try:
            session.wait_for("ready", self.lab.reconnect_s + SILENCE_S)
            self._hello = session.hello()
            self._check(session)
            session.preload(list(PRELOAD))
        except HostLost as e:
            raise HostError(f"{self.lab.name}: the agent did not come up: {e}") from e
        self._was_lost = False
        return session

    def _check(self, session: Session) -> None:
        if not self._hello["kernel_log"]:
            # It takes part in every verdict.
            raise HostError(f"{self.lab.name}: /dev/kmsg: Permission denied (root, or sudo = true)")
        kvm_parameters.require(self.params, kvm_parameters.of_hello(self._hello["params"]))
        asked = session.call(_INVENTORY, timeout_s=SILENCE_S)
        self._inventory = asked.unwrap(f"{self.lab.name}: asking what it is")

    def _carry(self, connection: Connection, code: Bundle) -> str:
        """Have the artefact there; return its path."""
        data = code.path.read_bytes()
        directory, name = self.lab.directory, code.path.name
        arguments = (RECEIVER, directory, name, hashlib.sha256(data).hexdigest())
        if connection.run(self.lab.python, "-c", *arguments, "ask").strip() != "there":
            self._log(f"carrying the harness there ({len(data) >> 10} KiB)")
            connection.run(self.lab.python, "-c", *arguments, data=data)
        return posixpath.join(directory, "code", name)

    def _take(self, connection: Connection, artefact: str) -> None:
        run = secrets.token_hex(8)
        options = {
            "lock": self.lab.lock,
            "params": self.params,
            "linger_s": self.lab.linger_s,
            "owner": {"run": run, **ourselves()},
            # Our own former run may still hold it, if its host was lost and is back.
            "replaces": self._run,
        }
        words = (self.lab.python, artefact, "take", self.lab.directory, json.dumps(options))
        answer = json.loads(connection.run(*words, timeout_s=_TAKE_S))
        if "error" in answer:
            kind = HostUnavailable if answer.get("unavailable") else HostError
            raise kind(f"{self.lab.name}: {answer['error']}")
        if answer["stale"]:
            self._log(f"cleaned up after {whose(answer['stale'])}, which never gave it back")
        self._run, self._boot_id = run, answer["boot_id"]

    def _attach(self, artefact: str, offset: int) -> tuple[Connection, paramiko.Channel]:
        connection = Connection(self.lab)
        try:
            words = (artefact, "attach", self.lab.directory, self._run, str(offset))
            return connection, connection.open(self.lab.python, "-c", ATTACHER, *words)
        except BaseException:
            connection.close()
            raise

    def _why_dead(self, reason: str) -> HostLost:
        self._was_lost = True
        if self.link and self.link.reason:
            return HostLost(self.link.reason, unreachable=self.link.unreachable)
        return HostLost(reason)

    def close(self) -> None:
        """End the run there, and wait until the machine is as it was."""
        session, link = self._session, self.link
        self._session = self.link = None
        if session is None or link is None:
            return
        try:
            if not link.reason:
                # Also after a call that was cancelled: the machine would be ours for `linger_s`.
                self._hand_back(session.successor(), link)
        finally:
            link.close()

    def _hand_back(self, session: _KeptSession, link: Link) -> None:
        link.transmit(json.dumps({"op": "power_off"}).encode() + b"\n")
        with contextlib.suppress(HostLost):
            session.wait_for("kept", _END_S)
        said = session.kept
        if said is None:
            self._log(f"not handed back; it ends by itself within {self.lab.linger_s:.0f} s")
            return
        link.is_over = True
        link.transmit(ACKNOWLEDGED)
        # The end of the channel is the end of the lock, or nearly.
        with contextlib.suppress(HostError):
            for _ in session.events(SILENCE_S):
                pass
        for what in (
            *(f"killed {name}, left behind" for name in said["killed"]),
            said.get("error"),
        ):
            if what:
                self._log(what)
