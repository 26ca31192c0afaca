"""Has Ansible do its part: one run for each host, all at once, ended in good order."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.fleet.errors import FleetError
from harness.fleet.inventory import STRICT, ansible_command, search_path
from harness.fleet.plan import FleetPlan
from harness.host.lifeline import END_S, lifeline

PLAYBOOK = Path(__file__).with_name("playbook.yml")

_LOOK_S = 0.5
#: For Ansible itself, when the runs have ended.
_ANSIBLE_END_S = 60.0


@dataclass(frozen=True)
class Ended:
    """How Ansible says that a host's run ended."""

    #: Exit status of the run; None if there was none.
    status: int | None
    #: In one line; empty if there is nothing to say.
    said: str = ""


class Drive:
    """One run of the playbook; `run` may be called once."""

    def __init__(self, plan: FleetPlan) -> None:
        self._plan = plan
        self.ended: dict[str, Ended] = {}
        #: What Ansible complains about that is no host's, each in one line.
        self.complaints: list[str] = []
        self._enough = threading.Event()
        # Not Thread.join: interrupted by a signal, it takes the thread for ended (Python 3.11).
        self._done = threading.Event()

    def run(self, look: Callable[[], None]) -> None:
        """Run the playbook to its end; `look` is called again and again meanwhile.

        Raises FleetError: Ansible is not there, or does not end.
        """
        ansible_command("ansible-playbook")
        try:
            import ansible_runner  # type: ignore[import-untyped]
        except ImportError:
            raise FleetError("no ansible-runner: pip install 'nsvm-harness[lab]'") from None
        # Beside the results: what a fleet that is killed leaves is in its own directory.
        own = self._plan.directory
        with tempfile.TemporaryDirectory(prefix=".ansible-", dir=own) as scratch:
            # A fleet that is killed ends nothing itself: its runs see the end of the lifeline.
            held = Path(scratch) / "lifeline"
            settings = self._settings(Path(scratch), held)
            ansible = threading.Thread(
                target=self._work, args=[ansible_runner.run, settings], name="ansible", daemon=True
            )
            with lifeline(held):
                ansible.start()
                try:
                    self._watch(look)
                finally:
                    self._end()
                    self._keep_log(Path(scratch))

    def _work(self, run: Callable[..., Any], settings: dict[str, Any]) -> None:
        try:
            status = run(**settings).status
            if status not in ("successful", "failed") and not self._enough.is_set():
                self.complaints.append(f"Ansible ended as {status!r}: see {self._log}")
        except Exception as e:  # the runs of the hosts say for themselves what became of them
            self.complaints.append(f"ansible-runner: {type(e).__name__}: {e}")
        finally:
            self._done.set()

    @property
    def _log(self) -> Path:
        return self._plan.directory / "ansible.log"

    def _settings(self, scratch: Path, held: Path) -> dict[str, Any]:
        plan = self._plan
        inventory = [str(path) for path in plan.inventories]
        return {
            "private_data_dir": str(scratch),
            "playbook": str(PLAYBOOK),
            "inventory": inventory,
            "limit": plan.limit or None,
            "extravars": {**plan.variables(Path.cwd()), "fleet_lifeline": str(held)},
            "forks": len(plan.hosts),
            "quiet": True,
            "envvars": {**STRICT, "PATH": search_path(), "ANSIBLE_RETRY_FILES_ENABLED": "0"},
            "event_handler": self._take,
            "cancel_callback": self._enough.is_set,
        }

    def _watch(self, look: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._plan.longest_s
        while not self._done.is_set():
            look()
            if time.monotonic() > deadline:
                self.complaints.append(f"not done within {self._plan.longest_s:.0f} s")
                return
            self._done.wait(_LOOK_S)

    def _end(self) -> None:
        """End what is still at work: the runs first, which give their hosts back; then Ansible."""
        deadline = time.monotonic() + END_S
        told: set[int] = set()
        while not self._done.is_set() and time.monotonic() < deadline:
            runs = self._runs()
            for run in runs:
                if run.pid not in told:
                    told.add(run.pid)
                    _tell_to_end(run)
            if not runs:
                # No run is left, and Ansible is not to begin another one.
                self._enough.set()
            self._done.wait(_LOOK_S)
        self._enough.set()
        if not self._done.wait(_ANSIBLE_END_S):
            raise FleetError(f"Ansible does not end within {_ANSIBLE_END_S:.0f} s")

    def _runs(self) -> list[psutil.Process]:
        """Return the runs of this fleet that are at work."""
        marks = {str(self._plan.where(host)) for host in self._plan.hosts}
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            # Ansible's own processes have them in one word, if at all.
            if "--results" in words and marks & set(words):
                found.append(process)
        return found

    def _take(self, event: dict[str, Any]) -> bool:
        """Note what an event of Ansible's says of a host; called by its thread."""
        data = event.get("event_data", {})
        host, result = data.get("host"), data.get("res", {})
        if event["event"] in ("runner_on_ok", "runner_on_failed", "runner_on_unreachable") and host:
            status = result.get("rc")
            said = _last_line(str(result.get("stderr") or "")) or str(result.get("msg") or "")
            has_run = "cmd" in result
            if has_run or event["event"] != "runner_on_ok":
                ended = Ended(status if has_run else None, _last_line(said))
                self.ended[host] = ended
        return False

    def _keep_log(self, scratch: Path) -> None:
        for file in sorted(scratch.glob("artifacts/*/stdout")):
            self._log.write_bytes(file.read_bytes())


def _tell_to_end(run: psutil.Process) -> None:
    try:
        os.kill(run.pid, signal.SIGTERM)
    except ProcessLookupError:
        return


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("nsvm: ") if lines else ""
