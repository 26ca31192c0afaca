"""A connection to a lab machine through SSH: who it is, who we are, and commands run there.

Only keys that the known_hosts file has are believed. An unknown key and a changed one are refused,
each with the way to mend it.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import shlex
import socket
import time
from typing import NoReturn, Self

import paramiko

from harness.errors import HostUnavailable
from harness.host.lab_file import LabHost

#: For one attempt to connect, and for each step of it.
_ATTEMPT_S = 10.0
_RETRY_S = 1.0
_KEEPALIVE_S = 5
_PIECE = 1 << 16

# It logs, with tracebacks, what it also raises.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class Refused(HostUnavailable):
    """Trying again would not help: a host key, a login, or what a command there says."""


class Unreachable(HostUnavailable):
    """No connection: it may be there later."""


class _KnownOnly(paramiko.MissingHostKeyPolicy):
    """Refuses a host whose key is not known, and says how to make it known."""

    def __init__(self, host: LabHost) -> None:
        self._host = host

    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> NoReturn:
        host = self._host
        scan = shlex.join(["ssh-keyscan", "-p", str(host.port), host.address])
        raise Refused(
            f"{host.name}: the host key of {host.label} is not known; if {fingerprint(key)} is"
            f" really its own, add it: {scan} >> {shlex.quote(str(host.known_hosts))}"
        )


def fingerprint(key: paramiko.PKey) -> str:
    """Return ``ssh-ed25519 SHA256:...``, as ssh-keygen -l prints it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


class Connection:
    """One logged-in connection; a context manager that closes it."""

    def __init__(self, host: LabHost) -> None:
        """Connect once.

        Raises:
            Refused: the host's key is not as it should be, or the login fails.
            Unreachable: there is no connection.
        """
        self.host = host
        self._client = paramiko.SSHClient()
        try:
            self._connect()
        except BaseException:
            self._client.close()
            raise

    def _connect(self) -> None:
        host, client = self.host, self._client
        try:
            client.load_host_keys(str(host.known_hosts))
        except FileNotFoundError:
            pass  # then no key is known
        except (OSError, UnicodeDecodeError) as e:
            raise Refused(f"{host.name}: known_hosts {host.known_hosts}: {e}") from e
        client.set_missing_host_key_policy(_KnownOnly(host))
        try:
            client.connect(
                host.address,
                host.port,
                host.user,
                key_filename=str(host.key) if host.key else None,
                timeout=_ATTEMPT_S,
                banner_timeout=_ATTEMPT_S,
                auth_timeout=_ATTEMPT_S,
                channel_timeout=_ATTEMPT_S,
                allow_agent=host.agent,
                look_for_keys=host.key is None,
            )
        except paramiko.BadHostKeyException as e:
            raise Refused(_changed(host, e)) from e
        except paramiko.PasswordRequiredException as e:
            raise Refused(
                f"{host.name}: the key {host.key} has a passphrase: ssh-add it, or use another"
            ) from e
        except paramiko.AuthenticationException as e:
            if _was_cut_off(e):
                raise Unreachable(f"{host.name}: no connection to {host.label}: {e}") from e
            key = f"the key {host.key}" if host.key else "any key of the SSH agent or of ~/.ssh"
            raise Refused(f"{host.name}: {host.label} does not accept {key}") from e
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise Unreachable(f"{host.name}: no connection to {host.label}: {_words(e)}") from e
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(_KEEPALIVE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; commands that run through it lose their input."""
        self._client.close()

    def open(self, *words: str) -> paramiko.Channel:
        """Start a command there; return the channel of its input and output.

        Raises:
            Unreachable: the connection broke.
        """
        if self.host.sudo:
            words = ("sudo", "-n", "--", *words)
        transport = self._client.get_transport()
        try:
            if transport is None:
                raise EOFError("it was closed")
            channel = transport.open_session(timeout=_ATTEMPT_S)
            channel.exec_command(shlex.join(words))
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise Unreachable(f"{self.host.name}: the connection broke: {_words(e)}") from e
        return channel

    def run(self, *words: str, data: bytes = b"", timeout_s: float = 60.0) -> str:
        """Run a command to its end; return what it printed.

        Raises:
            Refused: it failed; the message has its last line.
            Unreachable: the connection broke.
        """
        channel = self.open(*words)
        channel.settimeout(timeout_s)
        try:
            channel.sendall(data)
            channel.shutdown_write()
            out = b"".join(iter(lambda: channel.recv(_PIECE), b""))
            errors = b"".join(iter(lambda: channel.recv_stderr(_PIECE), b""))
            status = channel.recv_exit_status()
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise Unreachable(f"{self.host.name}: {words[0]}: {_words(e)}") from e
        finally:
            channel.close()
        if status == -1:
            raise Unreachable(f"{self.host.name}: the connection broke")
        if status:
            said = (errors or out).decode(errors="replace").strip().splitlines() or ["(no word)"]
            raise Refused(f"{self.host.name}: {words[0]}: {said[-1]} (status {status})")
        return out.decode(errors="replace")


def connect(host: LabHost, within_s: float) -> Connection:
    """Return a connection, made within so many seconds.

    Raises:
        Refused: at once, when it would not help to wait.
        Unreachable: the time is over.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return Connection(host)
        except Unreachable:
            if time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


def _changed(host: LabHost, e: paramiko.BadHostKeyException) -> str:
    name = host.address if host.port == 22 else f"[{host.address}]:{host.port}"
    forget = shlex.join(["ssh-keygen", "-f", str(host.known_hosts), "-R", name])
    return (
        f"{host.name}: the host key of {host.label} has CHANGED: it is {fingerprint(e.key)}, known"
        f" is {fingerprint(e.expected_key)}; somebody may be in between. If it was installed anew:"
        f" {forget}, and add its new one"
    )


def _was_cut_off(error: paramiko.AuthenticationException) -> bool:
    """Say whether nobody refused us: paramiko has no other error for that (AuthHandler)."""
    return "transport shut down" in str(error) or "timeout" in str(error)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError | socket.timeout):
        return "no answer"
    if isinstance(error, EOFError):
        return "it was closed"
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        return "refused, or nothing is there"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
