"""A pool of hosts that do what a scenario's source says they did.

A scenario that is run here has its fate as its only statement: `fate("splat")`. Nothing of it is
executed; the fake session looks it up.
"""

import re
from pathlib import Path

from harness.errors import HostError, HostLost
from harness.host.session import CallResult

HEAD = """
from harness.scenarios import scenario
def fate(name): raise AssertionError("a scenario's body ran outside of a host")
"""


def scenario_source(name, fate, **options):
    """Return a scenario's text."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return (
        f"@scenario({arguments})\ndef test_{name}(context):\n"
        f'    """Claim of {name}."""\n    fate({fate!r})\n'
    )


def returned(verdict, reason="", **more):
    return CallResult("return", value={"verdict": verdict, "reason": reason, **more}, seconds=0.5)


def note(text):
    return {"event": "emit", "kind": "note", "data": {"what": text}}


class FakeHost:
    def __init__(self, kind):
        self.kind = kind

    def describe(self):
        return {"kind": self.kind, "kernel_release": "6.1.0-fake"}


class FakeSession:
    """One call at a time; `attempts` counts them by scenario."""

    def __init__(self, pool):
        self.pool = pool

    def call(
        self, target, *, timeout_s, on_event, module, name, values, source=None, lifecycle=None
    ):
        assert target == "harness.inside:run_case"
        assert source == Path(module).read_text()
        case = name.removeprefix("test_")
        self.pool.calls.append((case, values, timeout_s))
        [fate] = re.findall(rf"def {name}\(.*?fate\('(.*?)'\)", source, re.S)
        for kind in ("emit", "output", "kmsg"):
            event = {"emit": note("noted")}.get(kind, {"event": kind, "text": kind, "level": 6})
            on_event({"id": 1, **event})
        on_event({"id": 1, "event": "begin", "pid": 7})
        return self.fates()[fate](sum(c[0] == case for c in self.pool.calls))

    def fates(self):
        kmsg = [{"text": "WARNING: CPU: 0 PID: 1"}]
        return {
            "pass": lambda n: returned("PASS"),
            "fail": lambda n: returned("FAIL", "x: expected 1, saw 2", trace="Traceback"),
            "skip": lambda n: returned("SKIP", "svm: no cpu flag svm"),
            "error": lambda n: returned("ERROR", "no tracefs"),
            "splat": lambda n: CallResult("return", {"verdict": "PASS", "reason": ""}, kmsg=kmsg),
            "timeout": lambda n: CallResult("timeout", output=["a stack"], seconds=9),
            "lost": lambda n: self.lose(HostLost("QEMU was ended by SIGKILL", "Kernel panic")),
            "hang once": lambda n: (
                self.lose(HostLost("it hangs", silent=True)) if n == 1 else returned("PASS")
            ),
            "hang": lambda n: self.lose(HostLost("it hangs", silent=True)),
            "interrupt": lambda n: self.lose(KeyboardInterrupt()),
        }

    @staticmethod
    def lose(error):
        raise error


class FakePool:
    """In place of HostPool. `refuse`: no host comes up."""

    def __init__(self, choice=None, *, fresh=True, log=None, kind="emulated", refuse=""):
        self.choice, self.fresh, self.kind, self.refuse = choice, fresh, kind, refuse
        self.calls, self.dropped = [], []
        self.closed = False
        self.cancelled = False
        self._host = FakeHost(kind)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def session(self, params):
        if self.refuse:
            raise HostError(self.refuse)
        return self._host, FakeSession(self)

    def host(self, params):
        return self._host

    def cancel(self):
        self.cancelled = True

    def has(self, params):
        return not self.refuse

    def drop(self, params):
        self.dropped.append(params)

    def describe(self):
        return [self._host.describe()]
