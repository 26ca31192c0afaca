"""The table of kernels, with sessions that only answer."""

from dataclasses import replace
from datetime import date

import pytest

from harness.errors import HostLost
from harness.host.session import CallResult
from harness.runner import matrix
from harness.runner.known_issues import KnownIssue
from harness.runner.known_rows import End, known_row
from harness.runner.matrix import by_file, verdicts

SAVED = {"stream": "bytes", "pages": 1, "size_bytes": 5, "notes": ["msrs.0x1 not given: why"]}
WORKS = {"verdict": "works", "why": "", "changed": [], "changed_count": 0, "notes": []}
WARNING = (
    "------------[ cut here ]------------\nWARNING: CPU: 0 PID: 1 at arch/x86/kvm/svm/nested.c:957"
)


ISSUES = [KnownIssue("lost", ("nsvm migrate: l3-*",), "behaviour", "why", "seen", ("5.10",))]


class Session:
    """Answers what `answers` has for a call's target and place."""

    def __init__(self, name, answers):
        self.name, self.answers = name, answers

    def call(self, target, timeout_s, **arguments):
        target = target.partition(":")[2]
        key = target, arguments.get("place") or arguments["stream"]
        answer = self.answers.get((self.name, *key), self.answers.get(target))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Kernels:
    def __init__(self, specs, answers):
        self.specs = list(specs)
        self.sessions = {spec: Session(spec, answers) for spec in specs}
        self.restarted, self.settled = [], 0

    def session(self, spec):
        return self.sessions[spec]

    def restart(self, spec):
        self.restarted.append(spec)

    def settle(self):
        self.settled += 1

    def issue(self, row):
        ends = [End(spec, "emulated") for spec in (row["from"], row.get("to", ""))]
        return known_row(ISSUES, row["place"], ends)


def returned(value, **more):
    return CallResult("return", value, **more)


def raised(message, *bases):
    return CallResult("raise", error={"message": message, "bases": bases})


ANSWERS = {"depart_from": returned(SAVED), "arrive_at": returned(WORKS)}


def table(answers, specs=("5.10", "7.3"), places=("l2-npt", "l3-npt")):
    kernels = Kernels(specs, {**ANSWERS, **answers})
    told = []
    rows = by_file(kernels, places, told.append)
    assert sorted(map(str, told)) == sorted(map(str, rows))
    return kernels, rows


def test_every_place_goes_from_every_kernel_to_every_kernel():
    kernels, rows = table({})
    assert [(row["place"], row["from"], row["to"]) for row in rows] == [
        ("l2-npt", "5.10", "5.10"), ("l2-npt", "5.10", "7.3"),
        ("l2-npt", "7.3", "5.10"), ("l2-npt", "7.3", "7.3"),
        ("l3-npt", "5.10", "5.10"), ("l3-npt", "5.10", "7.3"),
        ("l3-npt", "7.3", "5.10"), ("l3-npt", "7.3", "7.3"),
    ]  # fmt: skip
    assert {row["verdict"] for row in rows} == {"works"}
    assert rows[0]["not_given"] == SAVED["notes"]
    assert kernels.settled == 1
    assert list(verdicts(rows)) == [("works", 8)]


@pytest.mark.parametrize(
    ("bases", "verdict"),
    [
        (("NoTwin", "ScenarioFailure", "NsvmError"), "no twin"),
        (("ScenarioFailure", "NsvmError"), "differs"),
        (("KvmError", "OSError"), "refused"),
        (("HarnessError", "NsvmError"), "error"),
    ],
)
def test_what_cannot_be_saved_is_one_row(bases, verdict):
    _, rows = table({("5.10", "depart_from", "l3-npt"): raised("it broke", *bases)})
    bad = [row for row in rows if row["verdict"] != "works"]
    assert [(row["place"], row["from"], row["verdict"], row["why"]) for row in bad] == [
        ("l3-npt", "5.10", verdict, "it broke")
    ]
    assert len(rows) == 7


def test_what_differs_for_a_known_issue_of_either_end_is_named():
    """And nothing else: not another place, not another kernel, not what works."""
    differs = returned({**WORKS, "verdict": "differs", "why": "saw less"})
    _, rows = table({"arrive_at": differs}, specs=("5.10", "6.1", "7.3"))
    named = {(row["place"], row["from"], row["to"]) for row in rows if row.get("issue") == "lost"}
    assert named == {
        ("l3-npt", one, other)
        for one in ("5.10", "6.1", "7.3")
        for other in ("5.10", "6.1", "7.3")
        if "5.10" in (one, other)
    }
    assert sum("issue" in row for row in rows) == len(named)
    assert not any("issue" in row for row in table({})[1])


def test_an_issue_that_has_expired_explains_nothing():
    [issue] = ISSUES
    old = replace(issue, expires=date(2026, 1, 31))
    ends = [End("5.10.0", "ssh")]
    assert known_row([old], "l3-npt", ends, date(2026, 1, 31)) is old
    assert known_row([old], "l3-npt", ends, date(2026, 2, 1)) is None


def test_a_host_that_is_lost_is_replaced_and_the_rest_goes_on():
    kernels, rows = table({("7.3", "arrive_at", "bytes"): HostLost("it died")})
    lost = [row for row in rows if row["verdict"] == "host lost"]
    assert {row["to"] for row in lost} == {"7.3"}
    assert len(rows) == 8
    assert kernels.restarted == ["7.3"] * len(lost)


def test_a_machine_that_makes_the_kernel_warn_does_not_work():
    kmsg = [{"text": line} for line in WARNING.splitlines()]
    _, rows = table({("7.3", "arrive_at", "bytes"): returned(WORKS, kmsg=kmsg)})
    assert {row["to"]: row["verdict"] for row in rows} == {"5.10": "works", "7.3": "differs"}
    assert all(row["kernel_log"] for row in rows if row["to"] == "7.3")


def test_threads_started_hosts_are_started_again(monkeypatch):
    started = []

    class Host:
        def start(self):
            started.append(matrix.threading.current_thread().name)
            return object()

    kernels = matrix.Kernels(["7.3"], lambda text: None)
    kernels._hosts["7.3"] = Host()
    thread = matrix.threading.Thread(target=kernels.restart, args=("7.3",), name="pool")
    thread.start()
    thread.join()
    kernels.settle()
    kernels.settle()
    assert started == ["pool", "MainThread"]
