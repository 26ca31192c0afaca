"""Runs the ioctl benchmarks inside a host: C and Python in turn, in one go.

Standard library only. The C side arrives as a static executable and runs from memory.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Self

from harness.bench.loops import IOCTL_BENCHMARKS, IoctlBenchmark, Work, refused_parts
from harness.errors import HarnessError, HostError
from kvm_ioctl.handles import Kvm

#: Of one answer of the C side; it ends itself before (DEADLINE_S in ioctl_loops.c).
ANSWER_S = 150.0

_FIRST_COUNT = 2
_WARM_UP_COUNT = 64
_STOP_S = 10.0


class CSide:
    """A process of ioctl_loops.c, or of another one that answers lines; a context manager."""

    def __init__(self, executable: bytes, name: str = "ioctl_loops") -> None:
        memory = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.write(memory, executable)
            self._process = subprocess.Popen(
                [name],
                executable=f"/proc/self/fd/{memory}",
                pass_fds=(memory,),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError as e:
            raise HostError(f"the C side cannot be run: {e.strerror}") from e
        finally:
            os.close(memory)
        if self._process.stdin is None or self._process.stdout is None:
            raise HarnessError("the C side was started without pipes")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(_STOP_S)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def run(self, loop: str, count: int, parts: Iterable[str] = ()) -> Work:
        """Run one loop.

        Raises:
            HostError: the kernel refused something, or no answer came.
        """
        answer = self.ask(loop, f"{loop} {count} {','.join(parts) or '-'}")
        done, witness, ns = map(int, answer.split())
        return Work(done, witness, ns / 1e9)

    def ask(self, what: str, request: str) -> str:
        """Have a line answered; `what` is how messages call it.

        Raises:
            HostError: the kernel refused something, or no answer came.
        """
        try:
            self._stdin.write(f"{request}\n".encode())
            self._stdin.flush()
        except BrokenPipeError as e:
            raise HostError(f"the C side of {what} is gone") from e
        verdict, _, rest = self._answer(what).partition(" ")
        if verdict != "ok":
            raise HostError(f"the C side of {what}: {rest}")
        return rest

    def _answer(self, loop: str) -> str:
        fd, deadline = self._stdout.fileno(), time.monotonic() + ANSWER_S
        while b"\n" not in self._pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                raise HostError(f"the C side of {loop} did not answer within {ANSWER_S:.0f} s")
            chunk = os.read(fd, 4096)
            if not chunk:
                raise HostError(f"the C side of {loop} ended")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace")


def fitting_count(run: Callable[[int], float], sample_s: float, most: int) -> int:
    """Return the count for which `run(count)`, which returns its seconds, takes about `sample_s`.

    Too short runs say nothing of a longer one, so the count is doubled until a quarter is reached.
    """
    count = min(_FIRST_COUNT, most)
    while True:
        seconds = run(count)
        if seconds >= sample_s / 4:
            return max(1, min(most, round(count * sample_s / seconds)))
        if count == most:
            return most
        count = min(2 * count, most)


def compare(
    benchmark: IoctlBenchmark, c_side: CSide, kvm: Kvm, count: int, *, c_first: bool
) -> tuple[Work, Work]:
    """Run both sides once; return C's work and Python's.

    Raises:
        HarnessError: they did not do the same.
    """

    def in_c() -> Work:
        return c_side.run(benchmark.c_loop, count, benchmark.parts)

    def in_python() -> Work:
        return benchmark.run(kvm, count, benchmark.parts)

    if c_first:
        c, python = in_c(), in_python()
    else:
        python, c = in_python(), in_c()
    if not c.same_as(python):
        raise HarnessError(
            f"benchmark {benchmark.name}: C did {c.done} (witness {c.witness}),"
            f" Python {python.done} (witness {python.witness})"
        )
    return c, python


def run_ioctl_benchmarks(
    emit: Callable[..., None],
    executable: str,
    names: list[str],
    repeat: int,
    sample_s: float,
    count: int | None = None,
) -> None:
    """Run the named benchmarks; emit a `pair` for every repetition, `skipped` for what is refused.

    Args:
        emit: the agent's.
        executable: ioctl_loops.c, compiled for any x86-64 Linux, in base64.
        names: of `IOCTL_BENCHMARKS`.
        repeat: repetitions of each, C first in every other one.
        sample_s: seconds that a sample in C shall take.
        count: rounds of each sample; by default as many as `sample_s` asks for.

    Raises HostError: C was refused something. Raises KvmError: Python was. Raises HarnessError: the
    two did not do the same.

    """
    with Kvm() as kvm, CSide(base64.b64decode(executable)) as c_side:
        refused = refused_parts(kvm)
        for benchmark in IOCTL_BENCHMARKS:
            if benchmark.name not in names:
                continue
            reasons = [refused[part] for part in benchmark.parts if part in refused]
            here = benchmark.without(refused)
            if benchmark.parts and not here.parts:
                emit("skipped", name=benchmark.name, reason="; ".join(reasons))
                continue
            _repeat(emit, here, c_side, kvm, repeat, sample_s, count)


def _repeat(
    emit: Callable[..., None],
    benchmark: IoctlBenchmark,
    c_side: CSide,
    kvm: Kvm,
    repeat: int,
    sample_s: float,
    count: int | None,
) -> None:
    def seconds(trial: int) -> float:
        return c_side.run(benchmark.c_loop, trial, benchmark.parts).seconds

    rounds = count or fitting_count(seconds, sample_s, benchmark.most)
    # C is warm by now.
    benchmark.run(kvm, min(rounds, _WARM_UP_COUNT), benchmark.parts)
    for number in range(repeat):
        c, python = compare(benchmark, c_side, kvm, rounds, c_first=number % 2 == 0)
        emit(
            "pair",
            name=benchmark.name,
            count=rounds,
            parts=list(benchmark.parts),
            ours={"done": python.done, "witness": python.witness, "seconds": python.seconds},
            theirs={"done": c.done, "witness": c.witness, "seconds": c.seconds},
        )
