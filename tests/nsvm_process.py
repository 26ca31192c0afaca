"""`nsvm` as a process of its own, and what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import waiting

from harness.host.bundle import tree_root
from harness.host.qemu import QEMU
from harness.report.results import read_results

#: Boots and runs under TCG, perhaps beside other work: only a hang takes so long.
DEADLINE_S = 900


def wait_until(condition, what, deadline_s=DEADLINE_S):
    """Wait as `waiting.wait_until` does, for as long as the emulated host may take."""
    return waiting.wait_until(condition, what, deadline_s)


def nsvm(*arguments, **environment):
    """Run `nsvm` to its end, as a user does; return it with its output."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=tree_root(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


class Nsvm:
    """One `nsvm` process; a context manager that ends it."""

    def __init__(self, *arguments, results=None, **options):
        self.results = results
        where = ["--results", str(results)] if results else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness", *map(str, [*arguments, *where])],
            cwd=tree_root(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            # Not SIGKILL: it is to end its machine.
            self.process.send_signal(signal.SIGTERM)
        self.end()

    def end(self):
        """Wait for the end; return the exit status and the output."""
        try:
            output, _ = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        except ValueError:  # was read to its end before
            output = ""
        return self.process.returncode, output

    def machines(self):
        """Return the QEMU processes that it runs: the one in use, then any kept in reserve."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        machines = []
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith(QEMU[:15]):
                    machines.append(child)
        return sorted(machines, key=lambda machine: machine.create_time())

    def events(self):
        """Return what is in its results so far."""
        path = self.results / "results.jsonl"
        return read_results(path) if path.exists() else []

    def ends(self):
        """Return the last event of each case that has one, by the case's name."""
        return {event["case"]: event for event in self.events() if event["event"] == "end"}


def load_json(path):
    return json.loads(path.read_text())
