"""`nsvm shell`: a Python prompt inside a host, with a machine, L1, L2, ... at hand."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from harness.commands.options import host_choice, host_options
from harness.commands.output import log
from harness.errors import HostError
from harness.host.conversation import OPEN_S, Conversation
from harness.host.session import Event, Host
from harness.probe.kmsg import new_taints, splats
from harness.runner.hosts import make_host

STATUS_RAISED = 1
STATUS_INTERRUPTED = 130

_COMPLETION_S = 5.0
_HISTORY_LINES = 2000


@click.command("shell")
@click.option("--vcpus", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N")
@click.option("--smm", is_flag=True, help="With SMRAM and the proxy as SMI handler.")
@click.option("--irqchip", is_flag=True, help="With the interrupt controllers in the kernel.")
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(8, 1024),
    default=64,
    show_default=True,
    metavar="MIB",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds that a statement may take. Default: 60 from a pipe; at a terminal, until ^C.",
)
@host_options
def command(
    vcpus: int,
    smm: bool,
    irqchip: bool,
    memory_mib: int,
    timeout_s: float | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Explore nested SVM by hand: a Python prompt with `machine`, `l1`, `l2`, ..., `kvm`.

    Type help() there. ^C stops a guest that loops. What comes from a pipe runs up to the first
    statement that raises: echo 'l1.cpuid(0x8000000a)' | nsvm shell

    Exit status: that of exit(), else 0; from a pipe 1 if a statement raised. 1, too, if the host's
    kernel complained (WARN, oops, taint). 2: no host, or it was lost. 130: interrupted, by ^C or
    the timeout.
    """
    choice = host_choice(host, kernel, modules)
    piped = None if sys.stdin.isatty() else _read_all()
    line_s = timeout_s or (OPEN_S if piped is None else 60.0)
    printer = Printer()
    with make_host(choice, log=log) as where:
        session = where.start()
        conversation = Conversation(
            session,
            "harness.shell.console:run",
            printer.show,
            line_timeout_s=line_s,
            vcpus=vcpus,
            smm=smm,
            irqchip=irqchip,
            memory_mib=memory_mib,
        )
        with conversation:
            if piped is None:
                click.echo(_banner(where))
                status = Prompt(conversation, timeout_s).run()
            else:
                status = run_all(conversation, piped, line_s)
    taints = new_taints(*conversation.result.tainted) if conversation.result else []
    for taint in taints:
        log(f"the host's kernel is tainted: {taint}")
    sys.exit(status or int(printer.kernel_complained or bool(taints)))


class Printer:
    """Shows what the inner end says while it runs."""

    def __init__(self) -> None:
        self.kernel_complained = False

    def show(self, event: Event) -> None:
        """Print one event."""
        if event["event"] == "emit":
            data = event["data"]
            stream = sys.stderr if data.get("stream") == "stderr" else sys.stdout
            # Not click.echo, which takes colours out: what is printed there is printed here.
            stream.write(data.get("text", ""))
            stream.flush()
        elif event["event"] == "output":
            log(event["text"])
        elif event["event"] == "kmsg" and splats([event["text"]]):
            self.kernel_complained = True
            log(f"kernel log: {event['text']}")


def run_all(conversation: Conversation, source: str, timeout_s: float) -> int:
    """Run statements up to the first that raises; return the exit status."""
    answer = conversation.ask("source", timeout_s, text=source)
    return _status(answer)


def _status(answer: dict[str, Any]) -> int:
    if answer["exit"] is not None:
        return int(answer["exit"])
    if answer["interrupted"]:
        return STATUS_INTERRUPTED
    return STATUS_RAISED if answer["raised"] else 0


class Prompt:
    """Somebody at a terminal."""

    def __init__(self, conversation: Conversation, timeout_s: float | None) -> None:
        self._conversation = conversation
        self._timeout_s = timeout_s
        self._matches: list[str] = []

    def run(self) -> int:
        """Take lines until the end of the input or exit(); return the exit status."""
        with _line_editing(self._complete) as readline_module:
            more = False
            while True:
                self._conversation.look()
                try:
                    with self._conversation.interruptible():
                        line = input("... " if more else ">>> ")
                except EOFError:
                    click.echo()
                    return 0
                except KeyboardInterrupt:
                    click.echo("^C" if readline_module is None else "")
                    more = self._conversation.ask("reset")["more"]
                    continue
                answer = self._conversation.ask("push", self._timeout_s, line=line)
                if answer["exit"] is not None:
                    return int(answer["exit"])
                more = answer["more"]

    def _complete(self, text: str, state: int) -> str | None:
        """Ask the inner end; readline's completer."""
        if state == 0:
            self._matches = self._ask_matches(text)
        return self._matches[state] if state < len(self._matches) else None

    def _ask_matches(self, text: str) -> list[str]:
        import readline

        line = readline.get_line_buffer()[: readline.get_endidx()]
        if not line.strip():
            # At the beginning of a line, the key indents.
            return [f"{text}    "]
        answer = self._conversation.ask("complete", _COMPLETION_S, text=text, line=line)
        return list(answer["matches"])


@contextlib.contextmanager
def _line_editing(completer: Any) -> Iterator[ModuleType | None]:
    """Have `input` edit lines, complete them, and remember them for the next time."""
    try:
        import readline
    except ImportError:
        yield None
        return
    readline.set_completer(completer)
    readline.parse_and_bind("tab: complete")
    history = _history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield readline
    finally:
        readline.set_completer(None)
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _history_file() -> Path:
    """Return where lines are remembered (XDG base directory specification: state)."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "nsvm" / "shell_history"


def _read_all() -> str:
    """Return all of standard input.

    Raises HostError: it is no text.
    """
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise HostError(f"standard input is not UTF-8: {e.reason} at byte {e.start}") from e


def _banner(host: Host) -> str:
    about = host.describe()
    return (
        f"{about['kernel_release']} on {about['silicon']}\n"
        "machine, l1, l2, ..., kvm; help() says more, ^D ends"
    )
