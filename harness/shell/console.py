"""The prompt itself: takes lines and questions as JSON on standard input, runs them, answers.

Everything leaves through one channel, so that what a line prints comes before its answer.
"""

from __future__ import annotations

import ast
import codeop
import io
import json
import linecache
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import CodeType
from typing import Any, Final

from harness.errors import NsvmError
from harness.machine.vcpu import Kicked
from harness.proxy.cpu import ProxyTimeout
from harness.proxy.failure import GuestStopped, LevelBusy, ProxyFailure
from harness.proxy.vmexit import MissingVmExit, UnexpectedVmExit
from harness.shell.completion import complete
from harness.shell.interrupts import INPUT_PREFIX, Interrupts
from harness.shell.namespace import Workbench
from harness.shell.show import text_of
from kvm_ioctl.request import KvmError

Emit = Callable[..., None]

_HARMLESS: Final = (MissingVmExit, UnexpectedVmExit)
"""Failures after which all levels are where they wait for more."""


@dataclass
class Answer:
    """What became of a request."""

    more: bool = False
    """The line begins a statement that goes on."""
    raised: bool = False
    interrupted: bool = False
    exit: int | None = None
    """The exit status that the user asked for."""
    matches: tuple[str, ...] = ()


class EmittedText(io.TextIOBase):
    """A text stream whose lines leave the host as events."""

    def __init__(self, emit: Emit, stream: str) -> None:
        self._emit = emit
        self._stream = stream
        self._pending = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        """Tell that it is."""
        return True

    def write(self, text: str) -> int:
        """Take text; whole lines leave at once."""
        with self._lock:
            self._pending += text
            if "\n" in text:
                self.flush()
        return len(text)

    def flush(self) -> None:
        """Let go what was written so far."""
        with self._lock:
            text, self._pending = self._pending, ""
            if text:
                self._emit("text", stream=self._stream, text=text)


class Console:
    """Runs what is typed in the names of a workbench."""

    def __init__(self, bench: Workbench, interrupts: Interrupts) -> None:
        self._bench = bench
        self._interrupts = interrupts
        self._compile = codeop.CommandCompiler()
        self._buffer: list[str] = []
        self._count = 0

    def push(self, line: str) -> Answer:
        """Take one line; run the statement that it completes."""
        self._buffer.append(line)
        source = "\n".join(self._buffer)
        name = self._name_of(source)
        try:
            code = self._compile(source, name, "single")
        except (SyntaxError, ValueError, OverflowError) as e:
            self._buffer.clear()
            return _syntax_error(_told_plainly(source, name, e))
        if code is None:
            return Answer(more=True)
        self._buffer.clear()
        return self._run(code)

    def reset(self) -> Answer:
        """Forget a statement that was begun."""
        self._buffer.clear()
        return Answer()

    def run_all(self, source: str) -> Answer:
        """Run statements one by one, each as at the prompt, up to the first that raises."""
        name = self._name_of(source)
        try:
            tree = ast.parse(source, name)
            codes = [compile(ast.Interactive([node]), name, "single") for node in tree.body]
        except (SyntaxError, ValueError, OverflowError) as e:
            return _syntax_error(e)
        answers = (self._run(code) for code in codes)
        return next((answer for answer in answers if answer != Answer()), Answer())

    def display(self, value: object) -> None:
        """Show the value of an expression, as `sys.displayhook`, and keep it as `_`."""
        if value is not None:
            self._bench.names["_"] = value
            print(text_of(value))

    def complete(self, text: str, line: str) -> Answer:
        """Return the completions of a word."""
        try:
            found = complete(self._bench.names.for_completion(), text, line)
        except Exception:
            # Whatever the attributes of a half-written expression raise.
            found = []
        return Answer(matches=tuple(found))

    def _name_of(self, source: str) -> str:
        """Return a file name for what was typed; tracebacks find its lines by that."""
        self._count += 1
        name = f"{INPUT_PREFIX}{self._count}>"
        lines = [f"{line}\n" for line in source.splitlines()]
        linecache.cache[name] = (len(source), None, lines, name)
        return name

    def _run(self, code: CodeType) -> Answer:
        try:
            try:
                exec(code, self._bench.names)
            finally:
                # Before anything else runs a vCPU.
                self._interrupts.line_ended()
        except SystemExit as e:
            return Answer(exit=_status_of(e))
        except BaseException as e:
            return self._report(e)
        return Answer()

    def _report(self, error: BaseException) -> Answer:
        """Say what was raised: one of ours in its own words, else with the traceback."""
        kick = _kick_behind(error)
        if isinstance(error, KeyboardInterrupt) and kick is None:
            _complain("interrupted")
            if not self._bench.at_rest:
                self._recover()
            return Answer(raised=True, interrupted=True)
        if kick is not None:
            first, _, where = str(kick).partition("\n")
            _complain(f"interrupted: {first.partition(' did not report')[0]}\n{where}")
            self._recover()
            return Answer(raised=True, interrupted=True)
        if isinstance(error, NsvmError | KvmError):
            _complain(f"{type(error).__name__}: {error}")
            if isinstance(error, ProxyTimeout):
                self._recover()
            elif isinstance(error, ProxyFailure | LevelBusy) and not isinstance(error, _HARMLESS):
                _complain("(restart() starts the levels again, reboot() makes a new machine)")
            return Answer(raised=True)
        trace = error.__traceback__
        while trace and not trace.tb_frame.f_code.co_filename.startswith(INPUT_PREFIX):
            trace = trace.tb_next
        _complain("".join(traceback.format_exception(error.with_traceback(trace))).rstrip())
        return Answer(raised=True)

    def _recover(self) -> None:
        try:
            started = self._bench.recover()
        except (NsvmError, KvmError) as e:
            _complain(f"(it does not come up again: {e}; reboot() makes a new machine)")
            return
        if started:
            _complain(f"(started again: {', '.join(started)})")


def _kick_behind(error: BaseException | None) -> GuestStopped | None:
    """Return what a kick has raised, be it this error or what it came from."""
    while error is not None:
        if isinstance(error, GuestStopped) and isinstance(error.event, Kicked):
            return error
        error = error.__cause__ or error.__context__
    return None


def _complain(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


def _syntax_error(error: Exception) -> Answer:
    _complain("".join(traceback.format_exception_only(error)).rstrip())
    return Answer(raised=True)


def _told_plainly(source: str, name: str, error: Exception) -> Exception:
    """Return what `compile` says of a wrong line: codeop calls some "incomplete input"."""
    try:
        compile(source, name, "single")
    except (SyntaxError, ValueError, OverflowError) as e:
        return e
    return error


def _status_of(request: SystemExit) -> int:
    if request.code is None or isinstance(request.code, int):
        return int(request.code or 0)
    _complain(str(request.code))
    return 1


_ACTIONS: Final[dict[str, Callable[[Console, dict[str, str]], Answer]]] = {
    "push": lambda console, request: console.push(request["line"]),
    "reset": lambda console, request: console.reset(),
    "source": lambda console, request: console.run_all(request["text"]),
    "complete": lambda console, request: console.complete(request["text"], request["line"]),
}


def serve(console: Console, emit: Emit) -> int:
    """Answer requests until one is to exit or there are no more; return the exit status."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = _ACTIONS[request["do"]](console, request)
        sys.stdout.flush()
        sys.stderr.flush()
        emit("answer", number=request["number"], **asdict(answer))
        if answer.exit is not None:
            return answer.exit
    return 0


def run(emit: Emit, line_timeout_s: float, **options: Any) -> int:
    """Be the inner end of a prompt; `nsvm shell` calls it with a standard input.

    Args:
        emit: takes `text` events, and an `answer` for each request.
        line_timeout_s: how long a program in a guest may run.
        options: of `ProxyMachine`.

    Raises KvmOpenError: there is no /dev/kvm to be had.

    """
    outer, outer_hook = (sys.stdout, sys.stderr), sys.displayhook
    sys.stdout, sys.stderr = EmittedText(emit, "stdout"), EmittedText(emit, "stderr")
    try:
        with Workbench(line_timeout_s, **options) as bench:
            console = Console(bench, Interrupts(bench.kick))
            sys.displayhook = console.display
            emit("ready")
            return serve(console, emit)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (sys.stdout, sys.stderr), sys.displayhook = outer, outer_hook
