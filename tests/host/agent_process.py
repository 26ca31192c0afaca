"""An agent served over the pipes of a subprocess."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import harness.host.agent

AGENT = Path(harness.host.agent.__file__)
HERE = Path(__file__).parent
DEADLINE_S = 30

#: The same with its bundles somewhere else than in /run.
_WITH_BUNDLES = """
import os, sys
from pathlib import Path
sys.path.insert(0, {directory!r})
import agent
agent._BUNDLES = Path({bundles!r})
agent.serve(0, os.dup(1))
"""


class AgentProcess:
    """A context manager; `send` and `until` are the outer end of its channel."""

    def __init__(self, bundles=None):
        script = _WITH_BUNDLES.format(directory=str(AGENT.parent), bundles=str(bundles))
        self.process = subprocess.Popen(
            [sys.executable, *([str(AGENT)] if bundles is None else ["-c", script])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )
        self._buffer = b""

    def __enter__(self):
        self.until("ready")
        return self

    def __exit__(self, *error):
        self.close()
        self.process.stdout.close()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()

    def close(self):
        """Close the agent's input, as an outer end does that goes away."""
        self.process.stdin.close()

    def write(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, op, payload=b"", **arguments):
        self.write(json.dumps({"op": op, **arguments}).encode() + b"\n" + payload)

    def events(self):
        """Yield events; fail when none comes for a while."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            while b"\n" not in self._buffer:
                left = max(0, deadline - time.monotonic())
                assert select.select([self.process.stdout], [], [], left)[0], "nothing came"
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return
                self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\n")
            yield json.loads(line)

    def until(self, kind):
        """Return all events up to the next of this kind, heartbeats left out."""
        seen = []
        for event in self.events():
            if event["event"] != "beat":
                seen.append(event)
            if event["event"] == kind:
                return seen
        raise AssertionError(f"no {kind!r}, only {seen}")

    def call(self, target, timeout_s=DEADLINE_S, call_id=1, **kwargs):
        """Start a call of agent_targets."""
        self.send(
            "call",
            id=call_id,
            target=f"agent_targets:{target}",
            kwargs=kwargs,
            timeout_s=timeout_s,
        )

    def end_of(self, target, timeout_s=DEADLINE_S, **kwargs):
        """Call and return the events of the call, the last of which is its end."""
        self.call(target, timeout_s, **kwargs)
        return self.until("end")


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def text_of(events):
    return "\n".join(event["text"] for event in of_kind(events, "output"))
