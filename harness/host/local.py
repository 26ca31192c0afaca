"""The machine itself as a host: the agent runs as a child process, on the machine's own kernel.

A started host has the machine's lock (`machine_lock.py`): two runs would disturb each other's
figures, and find each other's lines in the kernel log.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, HostError, HostLost
from harness.facts import HostView, kvm_device
from harness.host import kvm_parameters, machine_lock
from harness.host.bundle import PRELOAD, build_images, tree_root
from harness.host.cache import cache_dir
from harness.host.inventory import inventory
from harness.host.session import Event, Host, Session

_STOP_S = 10.0


class ProcessPipe:
    """The channel over a child's standard input and output."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise HarnessError("the agent was started without pipes")
        self._in = process.stdin
        self._out = process.stdout

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._out.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return os.read(self._out.fileno(), 1 << 16)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        self._in.write(data)
        self._in.flush()


class LocalHost(Host):
    """The machine itself. `params` are kvm_amd's while this host is started, and given back."""

    kind = "local"

    def __init__(
        self,
        params: Mapping[str, str] | None = None,
        payload: Path | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepare it; `payload` is an image of Linux for guests (`guest_payload`)."""
        self._payload = payload
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._taken = contextlib.ExitStack()
        self._params = dict(params or {})
        self._hello: Event = {}

    def describe(self) -> dict[str, Any]:
        """Return what results record of this host."""
        return {
            "kind": self.kind,
            "kernel_release": self._hello.get("release", os.uname().release),
            "kernel_version": self._hello.get("version", os.uname().version),
            "kernel_origin": "this machine",
            "module_parameters": self._hello.get("params", {}),
            "cpus": os.cpu_count(),
            "qemu_version": None,
            "silicon": inventory()["silicon"],
            **self._guest_linux(),
        }

    def _guest_linux(self) -> dict[str, str]:
        if self._payload is None:
            return {}
        # What makes images is not needed here otherwise.
        from harness.host.guest_payload import payload_release

        return payload_release(self._payload)

    def start(self) -> Session:
        """Take the machine, and start the agent.

        Raises:
            HostError: another run has the machine, /dev/kvm is there and may not be used, the agent
                does not come up, or kvm_amd cannot be had with `params`.
        """
        self.close()
        self._take()
        kvm_device(HostView())
        agent = Path(__file__).with_name("agent.py")
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree_root()),
            "NSVM_IMAGES": str(build_images()),
            **({"NSVM_PAYLOAD": str(self._payload)} if self._payload else {}),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(agent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        session = Session(ProcessPipe(self._process), self._why_dead)
        try:
            session.wait_for("ready", 30)
            self._hello = session.hello()
            if not self._hello["kernel_log"]:
                # It takes part in every verdict.
                raise HostError("/dev/kmsg: Permission denied (run as root)")
            session.preload(list(PRELOAD))
        except HostLost as e:
            raise HostError(f"the local agent did not come up: {e}") from e
        return session

    def _take(self) -> None:
        """Have the machine, and kvm_amd with the parameters that were asked for, until `close`."""
        with contextlib.ExitStack() as stack:
            path, ourselves = machine_lock.local_path(), machine_lock.ourselves()
            # Nobody knows how long the other run takes: it is for the user to wait.
            stale = stack.enter_context(machine_lock.machine_lock(path, ourselves, patience_s=0))
            if stale:
                self._log(f"{machine_lock.whose(stale)} had this machine, and never gave it back")
            record = cache_dir() / "parameters.json"
            kvm_parameters.give_back(record)
            stack.enter_context(kvm_parameters.borrowed(self._params, record))
            self._taken = stack.pop_all()

    def _why_dead(self, reason: str) -> HostLost:
        status = self._process.poll() if self._process else None
        return HostLost(reason if status is None else f"the agent ended with status {status}")

    def close(self) -> None:
        """End the agent; a running call is told to clean up first. Give the machine back."""
        with self._taken:
            self._end_agent()
        self._taken = contextlib.ExitStack()

    def _end_agent(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)
