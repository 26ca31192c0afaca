"""Runs the experiments: each in a process of its own, which may hang or die."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Final

from harness.errors import NsvmError
from harness.identify import by_host, by_ioctl, by_save_area, by_smm, by_vmrun
from harness.identify.finding import EXPERIMENTS, Experiment, Finding, unseen
from harness.identify.report import Report
from kvm_ioctl.handles import Kvm, KvmError

MODULES: Final = (by_ioctl, by_vmrun, by_save_area, by_smm, by_host)
"""Where experiments are declared; importing them fills `EXPERIMENTS`."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHUNK_BYTES = 1 << 16

Told = Callable[[Finding], None]


def identify(kvm: Kvm, told: Told = lambda finding: None) -> Report:
    """Run every experiment on an open /dev/kvm; return what is known of the running kernel.

    `told` gets each finding as it is made: the host may die at any moment. Takes up to
    `finding.DEADLINE_S` for each experiment that hangs, and under a second for all others.
    """
    findings: list[Finding] = []
    for each in EXPERIMENTS.values():
        for finding in conduct(each, kvm):
            told(finding)
            findings.append(finding)
    return Report.of(findings)


def conduct(each: Experiment, kvm: Kvm) -> list[Finding]:
    """Run one experiment in a child process; return a finding for each of its knobs."""
    lines, end = _in_child(lambda: each.function(kvm), each.deadline_s)
    found = {line["knob"]: Finding.from_plain(line) for line in lines}
    return [found.get(knob, unseen(knob, end)) for knob in each.knobs]


def _in_child(
    work: Callable[[], Iterable[Finding]], deadline_s: float
) -> tuple[list[dict[str, str]], str]:
    """Return the findings of a child as plain data, and in words how it ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _child(work, theirs)
    os.close(theirs)
    try:
        data, in_time = _read_all(ours, time.monotonic() + deadline_s)
    finally:
        os.close(ours)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    lines = [json.loads(line) for line in data.splitlines() if line.endswith(b"}")]
    last = lines.pop()["end"] if lines and "end" in lines[-1] else ""
    if last:
        return lines, last
    if not in_time:
        return lines, f"the experiment did not end within {deadline_s:.0f} s"
    return lines, f"the experiment's process died, wait status {status:#x}"


def _read_all(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """Read until the other end is closed, and say whether that was before the deadline."""
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            chunk = os.read(pipe, _CHUNK_BYTES)
            if not chunk:
                return data, True
            data += chunk
    return data, False


def _child(work: Callable[[], Iterable[Finding]], pipe: int) -> None:
    """Do the work, say what was found, and never return."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for finding in work():
            _say(pipe, finding.to_plain())
        _say(pipe, {"end": "the experiment did not get to it"})
    except (NsvmError, KvmError) as e:
        _say(pipe, {"end": f"the experiment broke off: {e}".partition("\n")[0]})
    except BaseException:
        _say(pipe, {"end": f"the experiment is broken: {traceback.format_exc()}"})
    finally:
        os._exit(0)


def _say(pipe: int, plain: dict[str, object]) -> None:
    os.write(pipe, json.dumps(plain).encode() + b"\n")
