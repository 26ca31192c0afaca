"""Benchmarks of the emulated host: its start against a bare QEMU's, and where `nsvm memory` goes.

The bare QEMU is given the very command line that the harness has just used, by bare_start.c, which
waits for the same answer. What the harness adds is then its own: finding the state to start from,
speaking with the agent, and after a cold boot loading the tree's code, which a bare QEMU never
does.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.bench.native import executable
from harness.bench.ratios import Comparison, Pair, parts_of_whole
from harness.errors import HarnessError, HostError
from harness.host.emulated import COLD_BOOT_S, EmulatedHost
from harness.host.kernels import Kernel

AGAINST = "bare QEMU"
COLD, WARM, MEMORY = "start_cold", "start_warm", "memory"
BOOT_BENCHMARKS = (COLD, WARM, MEMORY)

_SETTLE_S = 15.0
_ONLY_OURS = "finding or building the code's archive; after a cold boot, loading it"
_MEMORY_CALL = "harness.inside:measure_nested_memory"
_MEMORY_CALL_S = 120.0
_IMPORTS = "import harness.commands.memory, harness.host.emulated, harness.host.kernels"
_IMPORTS_S = 30.0

_CONSOLE = re.compile(r"^(file,id=console,path=)(.*)$")
_CHARDEV_FD = re.compile(r"^socket,id=(channel|monitor),fd=(\d+)$")


def bare_command(arguments: list[str], console: Path) -> tuple[list[str], dict[str, int]]:
    """Return QEMU's command line with another console file, and the descriptors that it names.

    Raises HarnessError: it is not as the emulated host writes it.
    """
    fds: dict[str, int] = {}
    changed = []
    for argument in arguments:
        if found := _CHARDEV_FD.match(argument):
            fds[found[1]] = int(found[2])
        # QEMU writes a comma in a value as two.
        changed.append(_CONSOLE.sub(lambda m: m[1] + str(console).replace(",", ",,"), argument))
    if set(fds) != {"channel", "monitor"}:
        raise HarnessError(f"no channel and monitor on QEMU's command line: {' '.join(arguments)}")
    return changed, fds


def bare_start_s(arguments: list[str], *, warm: bool) -> float:
    """Start QEMU with the harness's command line but without the harness; return the seconds.

    Raises HostError: it did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="nsvm-bench-") as scratch:
        command, fds = bare_command(arguments, Path(scratch) / "console.log")
        mode = "warm" if warm else "cold"
        numbers = [str(fds["channel"]), str(fds["monitor"])]
        try:
            done = subprocess.run(
                [executable("bare_start"), mode, f"{COLD_BOOT_S:.0f}", *numbers, *command],
                capture_output=True,
                text=True,
                timeout=COLD_BOOT_S + _SETTLE_S,
            )
        except subprocess.TimeoutExpired as e:
            raise HostError(f"bare QEMU: bare_start did not end within {e.timeout:.0f} s") from e
    if done.returncode:
        raise HostError("bare QEMU: " + "; ".join(done.stderr.split("\n")).strip("; "))
    return int(done.stdout) / 1e9


def harness_start_s(kernel: Kernel, *, warm: bool) -> tuple[float, list[str]]:
    """Start the emulated host; return the seconds and QEMU's command line."""
    with EmulatedHost(kernel, warm=warm) as host:
        start = time.monotonic()
        host.start()
        seconds = time.monotonic() - start
        if host.started_warm != warm:
            raise HostError("there is no warm state to start from: it could not be saved")
        return seconds, _arguments(host)


def _arguments(host: EmulatedHost) -> list[str]:
    arguments = host.process.args
    if not isinstance(arguments, list):
        raise HarnessError("QEMU was not started with a list of arguments")
    return [str(argument) for argument in arguments]


def _save_warm_states(kernel: Kernel) -> None:
    """Have the states that are missing saved now: that is not what is measured."""
    with EmulatedHost(kernel) as host:
        host.start()


def compare_start(kernel: Kernel, *, warm: bool, repeat: int) -> Comparison:
    """Compare `repeat` starts with as many bare ones, in turn.

    Raises HostError: a machine did not come up.
    """
    row = Comparison(WARM if warm else COLD, "emulated", AGAINST)
    row.details = {"until": "the agent's hello", "only_ours": _ONLY_OURS}
    if warm:
        _save_warm_states(kernel)
    for _ in range(repeat):
        ours_s, arguments = harness_start_s(kernel, warm=warm)
        row.pairs.append(Pair(ours_s, bare_start_s(arguments, warm=warm)))
    return row


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[name] = phases.get(name, 0.0) + time.monotonic() - start


def _import_in_new_python() -> None:
    try:
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True, timeout=_IMPORTS_S)
    except subprocess.SubprocessError as e:
        raise HarnessError(f"importing what nsvm memory needs: {e}") from e


def memory_phases(find_kernel: Callable[[], Kernel]) -> dict[str, float]:
    """Do what ``nsvm memory`` does; return the seconds of each of its phases.

    `python`: interpreter and imports. `kernel`: finding the kernel. `start`: the host's warm start.
    `measuring`: inside the host. `rest`: sending the call, its results, and ending the host.
    """
    phases: dict[str, float] = {}
    with _timed(phases, "python"):
        _import_in_new_python()
    with _timed(phases, "kernel"):
        kernel = find_kernel()
    with _timed(phases, "start"):
        host = EmulatedHost(kernel)
        try:
            session = host.start()
        except BaseException:
            host.close()
            raise
    with _timed(phases, "rest"), host:
        result = session.call(_MEMORY_CALL, timeout_s=_MEMORY_CALL_S, vcpus=8, vms=1)
        result.unwrap("measuring nested-state memory")
    phases["measuring"] = result.seconds
    phases["rest"] -= result.seconds
    return phases


def split_memory(find_kernel: Callable[[], Kernel], repeat: int) -> list[Comparison]:
    """Return each phase's share of the time of a whole ``nsvm memory``."""
    _save_warm_states(find_kernel())
    return parts_of_whole("emulated", MEMORY, [memory_phases(find_kernel) for _ in range(repeat)])


def run_boot_benchmarks(
    names: list[str],
    find_kernel: Callable[[], Kernel],
    repeat: int,
    done: Callable[[list[Comparison]], None],
) -> None:
    """Run the named ones of `BOOT_BENCHMARKS`; give `done` the rows of each.

    A cold boot takes as long as ten warm starts, so there are fewer of those.

    Raises HostError: a machine did not come up.
    """
    kernel = find_kernel()
    if WARM in names:
        done([compare_start(kernel, warm=True, repeat=repeat)])
    if COLD in names:
        cold_repeat = max(1, (repeat + 1) // 3)
        done([compare_start(kernel, warm=False, repeat=cold_repeat)])
    if MEMORY in names:
        done(split_memory(find_kernel, max(1, (repeat + 1) // 2)))
