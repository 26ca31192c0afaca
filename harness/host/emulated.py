"""The emulated host: a virtual AMD machine on which a real kernel runs its own `kvm_amd`.

QEMU's TCG emulates SVM, nested paging and SMM. A cold boot takes seconds; at its end the whole
machine, agent running, is saved to a file (a *warm state*), and later machines start from that in a
fraction of a second. A warm state is keyed by everything that went into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.errors import HarnessError, HostError, HostLost
from harness.host import bundle, initrd
from harness.host.cache import build_file, cache_dir, locked
from harness.host.kernels import Kernel, module_closure, read_module
from harness.host.monitor import Monitor, shell_quoted
from harness.host.session import Event, Session
from harness.host.userland import userland

QEMU = "qemu-system-x86_64"

#: What the channel and KVM need, in any order; built-in ones are skipped.
WANTED_MODULES = ("virtio_pci", "virtio_console", "kvm_amd")

#: Features KVM's nested SVM uses and TCG has. `max` brings the rest.
CPU = "max,+svm,+npt,+vgif"

# Each saves boot time under TCG or noise in a measurement. `no_timer_check`: without it a boot has
# panicked ("IO-APIC + timer doesn't work!"). `panic=-1` with QEMU's -no-reboot ends the process.
KERNEL_OPTIONS = (
    "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check "
    "cryptomgr.notests rcupdate.rcu_expedited=1 audit=0 nowatchdog random.trust_cpu=on "
    "8250.nr_uarts=1 cgroup.memory=nosocket apparmor=0"
)

#: The beginning of the end, on a console.
_COMPLAINTS = ("BUG:", "Oops", "Kernel panic", "WARNING:", "sysrq:", "nsvm-init:")

COLD_BOOT_S = 120.0
WARM_START_S = 30.0
#: For a command, code included, to be taken by a host that is alive.
SEND_S = 60.0


@dataclass(frozen=True)
class Hardware:
    """The emulated machine's size."""

    cpus: int = 1
    memory_mib: int = 768


class SocketPipe:
    """The channel over one end of a socket pair; QEMU inherited the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # Reading waits elsewhere; this is for writing to a host that no longer reads.
        sock.settimeout(SEND_S)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._socket.recv(1 << 16)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(data)


@dataclass
class _Running:
    """One QEMU process and what belongs to it."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    monitor: Monitor
    console: Path
    session: Session = field(init=False)


def qemu_version() -> str:
    """Return QEMU's version, e.g. ``7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)``.

    Raises:
        HostError: QEMU is not installed or does not run.
    """
    path = shutil.which(QEMU)
    if path is None:
        raise HostError(f"{QEMU} not found (Debian: apt-get install qemu-system-x86)")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    first = done.stdout.splitlines()[0] if done.stdout else ""
    if done.returncode or "version " not in first:
        raise HostError(f"{path} --version failed: {done.stderr.strip() or first}")
    return first.split("version ", 1)[1]


class EmulatedHost:
    """A virtual AMD machine with `kernel`; `params` are kvm_amd's, e.g. ``{"nested": "0"}``.

    Use as a context manager. `start` gives a session with the tree's code loaded; called again, it
    gives a fresh machine, whatever became of the one before.
    """

    kind = "emulated"

    def __init__(
        self,
        kernel: Kernel,
        params: Mapping[str, str] | None = None,
        hardware: Hardware | None = None,
        *,
        warm: bool = True,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.kernel = kernel
        self.params = {"nested": "1", **(params or {})}
        self.hardware = hardware or Hardware()
        self.version = qemu_version()
        self._warm = warm
        self._log = log
        self._run: _Running | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="nsvm-host-"))
        self._starts = 0
        self._hello: Event = {}
        self._code: bundle.Bundle | None = None
        self.started_warm = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Return what results record of this host."""
        return {
            "kind": self.kind,
            "kernel_release": self._hello.get("release", self.kernel.release),
            "kernel_version": self._hello.get("version", ""),
            "kernel_origin": self.kernel.origin,
            "module_parameters": self._hello.get("params", {}),
            "cpus": self.hardware.cpus,
            "memory_mib": self.hardware.memory_mib,
            "qemu_version": self.version,
            "silicon": f"emulated (QEMU {self.version}, TCG, -cpu {CPU})",
        }

    @property
    def console_text(self) -> str:
        """All that the current machine has written to its serial console."""
        if self._run is None or not self._run.console.exists():
            return ""
        return self._run.console.read_text(errors="replace")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The QEMU process of the current machine."""
        if self._run is None:
            raise HostError("the emulated host is not running")
        return self._run.process

    def start(self) -> Session:
        """Start a machine with the tree's code loaded in its agent.

        The nearest saved state is taken: one with this very code, else one without any, else none;
        the states that were missing are saved on the way. One that does not come up is forgotten,
        and the machine booted cold.

        Raises:
            HostError: it does not come up.
        """
        self._stop()
        if self._code is None:
            # Once: all machines of a run have the same code, whatever is edited meanwhile.
            self._code = bundle.build_bundle(userland())
        try:
            try:
                return self._started(self._code)
            except HostLost as e:
                if not self.started_warm:
                    raise
                self._log(f"warm state forgotten: {e}")
                self._stop()
                self._forget(self._code)
                return self._started(self._code)
        except HostLost as e:
            raise HostError(f"the emulated host did not come up: {e}\n{e.console}".rstrip()) from e

    def _started(self, code: bundle.Bundle) -> Session:
        session = self._start_with(code)
        self._hello = session.hello(WARM_START_S)
        if self._hello["bundle"] != code.name:
            raise HostError(f"the host runs code {self._hello['bundle']}, not {code.name}")
        return session

    def _forget(self, code: bundle.Bundle) -> None:
        for name in (code.name, "base"):
            self._state_path(name).unlink(missing_ok=True)

    def _start_with(self, code: bundle.Bundle) -> Session:
        if not self._warm:
            return self._load(self._boot(), code)
        ready, base = self._state_path(code.name), self._state_path("base")
        if ready.exists():
            return self._resume(ready)
        with locked(base.name):
            if ready.exists():
                return self._resume(ready)
            if base.exists():
                session = self._resume(base)
            else:
                self._log(f"cold boot of {self.kernel.release}")
                session = self._boot()
                self._save(base)
            self._load(session, code)
            self._save(ready)
        return session

    @staticmethod
    def _load(session: Session, code: bundle.Bundle) -> Session:
        session.send_bundle(code.name, code.path.read_bytes())
        session.preload(list(bundle.PRELOAD))
        return session

    def close(self) -> None:
        """End the machine and remove what it left."""
        self._stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # --- starting

    def _boot(self) -> Session:
        self.started_warm = False
        session = self._launch([])
        session.wait_for("ready", COLD_BOOT_S)
        return session

    def _resume(self, state: Path) -> Session:
        self.started_warm = True
        return self._launch(["-incoming", f"exec:cat {shell_quoted(state)}"])

    def _save(self, state: Path) -> None:
        """Save the running machine; without space, say so and go on without."""
        if self._run is None:
            raise HarnessError("no machine to save")
        temporary = state.with_name(f".{state.name}.{os.getpid()}")
        try:
            self._run.monitor.save_machine(temporary)
            _forget_older(state)
            temporary.rename(state)
        except OSError as e:
            # Only the next start will be a slower one.
            self._log(f"warm state not saved: {e.strerror or e}")
        finally:
            temporary.unlink(missing_ok=True)

    def _launch(self, extra: list[str]) -> Session:
        self._starts += 1
        console = self._scratch / f"console-{self._starts}.log"
        channel, their_channel = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        command = [
            # The machine ends with this process, however this process ends.
            "setpriv", "--pdeathsig", "KILL",
            *self._command(),
            "-chardev", f"file,id=console,path={str(console).replace(',', ',,')}",
            "-chardev", f"socket,id=channel,fd={their_channel.fileno()}",
            "-chardev", f"socket,id=monitor,fd={their_monitor.fileno()}",
            *extra,
        ]  # fmt: skip
        errors = open(self._scratch / f"qemu-{self._starts}.err", "wb")  # noqa: SIM115
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(their_channel.fileno(), their_monitor.fileno()),
                # A ^C at the terminal is the harness's to handle.
                start_new_session=True,
            )
        except OSError as e:
            channel.close()
            monitor.close()
            raise HostError(f"cannot start {command[0]}: {e.strerror}") from e
        finally:
            errors.close()
            their_channel.close()
            their_monitor.close()
        self._run = _Running(process, channel, Monitor(monitor), console)
        self._run.session = Session(SocketPipe(channel), self._why_dead)
        return self._run.session

    def _command(self) -> list[str]:
        """Return the part of the command line that a warm state depends on."""
        return [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35,smm=on", "-accel", "tcg,thread=multi", "-cpu", CPU,
            "-smp", str(self.hardware.cpus), "-m", str(self.hardware.memory_mib),
            "-kernel", str(self.kernel.vmlinux or self.kernel.bzimage),
            "-initrd", str(self._initrd()), "-append", KERNEL_OPTIONS,
            "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=channel,name=nsvm",
            "-serial", "chardev:console",
            "-mon", "chardev=monitor,mode=control",
        ]  # fmt: skip

    def _initrd(self) -> Path:
        options = " ".join(f"{name}={value}" for name, value in sorted(self.params.items()))
        here = Path(__file__).parent
        agent_files = {name: (here / name).read_bytes() for name in ("agent.py", "init.py")}
        digest = hashlib.sha256(repr((self.kernel.key, options)).encode())
        digest.update(str(userland()).encode())
        digest.update(Path(initrd.__file__).read_bytes())
        for content in agent_files.values():
            digest.update(content)

        def write(path: Path) -> None:
            modules = [
                initrd.Module(
                    module.stem.split(".")[0].replace("-", "_"),
                    read_module(module),
                    options if module.name.startswith("kvm-amd.") else "",
                )
                for module in module_closure(self.kernel, WANTED_MODULES)
            ]
            with tempfile.TemporaryDirectory(prefix="nsvm-agent-") as scratch:
                tree = Path(scratch)
                for name, content in agent_files.items():
                    (tree / name).write_bytes(content)
                initrd.compile_tree(userland(), tree, "/nsvm")
                with open(path, "wb") as out:
                    for piece in initrd.cpio(initrd.entries(userland(), tree, modules)):
                        out.write(piece)

        return build_file(cache_dir() / "initrd" / f"{digest.hexdigest()[:16]}.cpio", write)

    def _state_path(self, code: str) -> Path:
        key = hashlib.sha256(repr((self._command(), self.version, self.kernel.key)).encode())
        params = "-".join(f"{name}{value}" for name, value in sorted(self.params.items()))
        size = f"{self.hardware.cpus}c{self.hardware.memory_mib}m"
        kind = "base" if code == "base" else "ready"
        directory = cache_dir() / "warm"
        directory.mkdir(exist_ok=True)
        name = f"{self.kernel.release}-{params}-{size}-{kind}"
        return directory / f"{name}.{key.hexdigest()[:16]}-{code}"

    # --- ending

    def _why_dead(self, reason: str) -> HostLost:
        """Tell a host that ended from one that hangs, with its console's last words."""
        run = self._run
        if run is None:
            return HostLost(reason)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A panicked kernel closes the channel a moment before QEMU is gone.
            run.process.wait(2)
        status = run.process.poll()
        console = last_words(self.console_text)
        if status is None:
            complained = any(mark in console for mark in _COMPLAINTS)
            return HostLost(f"the emulated host hangs: {reason}", console, silent=not complained)
        if status < 0:
            name = signal.Signals(-status).name
            return HostLost(f"QEMU was ended by {name}", console)
        if status == 0:
            return HostLost("the emulated host went down (panic or power off)", console)
        errors = (self._scratch / f"qemu-{self._starts}.err").read_text(errors="replace")
        detail = errors.strip().splitlines()[-1] if errors.strip() else "no message"
        return HostLost(f"QEMU ended with status {status}: {detail}", console)

    def _stop(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        run.channel.close()
        run.monitor.close()
        run.process.kill()
        run.process.wait(30)


def last_words(console: str, lines: int = 60) -> str:
    """Return the end of a console's text, from the kernel's first complaint if it is there."""
    text = [line.rstrip() for line in console.splitlines()]
    for number, line in enumerate(text):
        if any(mark in line for mark in _COMPLAINTS):
            return "\n".join(text[number : number + 2 * lines])
    return "\n".join(text[-lines:])


def _forget_older(state: Path) -> None:
    """Remove saved states of the same machine made from other inputs; each is large."""
    for other in state.parent.glob(state.name.rsplit(".", 1)[0] + ".*"):
        if other != state:
            other.unlink(missing_ok=True)
