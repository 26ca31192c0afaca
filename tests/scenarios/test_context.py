"""What a scenario is given, and what becomes of it inside a host."""

import pytest

from harness.errors import HarnessError, ScenarioFailure
from harness.inside import run_case
from harness.scenarios.context import Context


class Emitted(list):
    def __call__(self, kind, **data):
        self.append((kind, data))


def test_a_note_is_emitted_at_once():
    emitted = Emitted()
    context = Context(emitted)
    context.note("bytes", on=1, off=2)
    assert emitted == [("note", {"what": "bytes", "on": 1, "off": 2})]


def test_an_expectation_names_both_values():
    context = Context(Emitted())
    context.expect("x", 1, 1)
    with pytest.raises(ScenarioFailure, match=r"^x: expected 0x10, saw 0x11$"):
        context.expect("x", 17, 16, hex)


@pytest.mark.parametrize("seen", [90, 110, 100])
def test_what_is_within_the_tolerance_is_as_expected(seen):
    Context(Emitted()).expect_within("x", seen, 100, 10)


@pytest.mark.parametrize("seen", [89.5, 110.5])
def test_what_is_not_names_both_values(seen):
    with pytest.raises(ScenarioFailure, match=rf"^x: expected 100 \(within 10\), saw {seen}$"):
        Context(Emitted()).expect_within("x", seen, 100, 10)


class Thing:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"+{self.name}")
        return self

    def __exit__(self, *error):
        self.log.append(f"-{self.name}")


def test_what_was_entered_is_left_in_reverse_whatever_happens():
    log = []

    def fail():
        with Context(Emitted()) as context:
            context.enter(Thing(log, "a"))
            context.enter(Thing(log, "b"))
            raise ScenarioFailure("x")

    with pytest.raises(ScenarioFailure):
        fail()
    assert log == ["+a", "+b", "-b", "-a"]


# Inside a host: from what a scenario raises to its verdict


HEAD = """
from harness.errors import *
from harness.facts import Fact
from harness.scenarios import scenario
from kvm_ioctl.request import KvmError
def yes(host): return Fact(True, "seen")
def no(host): return Fact(False, "svm=0", "mend it")
def refused(host): raise HostError("/dev/kvm: Permission denied")
"""


def run(body, needs="[yes]", axes="{}", values=None):
    arguments = "".join(f", {name}" for name in values or {})
    text = (
        f"{HEAD}\n@scenario(needs={needs}, axes={axes})\n"
        f"def test_it(context{arguments}):\n    'A claim.'\n    {body}\n"
    )
    return run_case(Emitted(), "/their/file.py", "test_it", values or {}, text)


@pytest.mark.parametrize(
    ("body", "verdict", "reason"),
    [
        ("pass", "PASS", ""),
        ("raise ScenarioFailure('x: 1, not 2')", "FAIL", "x: 1, not 2"),
        ("raise Unsupported('no vgif')", "SKIP", "no vgif"),
        ("raise HostError('no tracefs')", "ERROR", "no tracefs"),
        ("raise HarnessError('lost events')", "ERROR", "HarnessError: lost events"),
        ("raise KvmError(22, 'KVM_RUN', 'vcpu')", "FAIL", "KVM_RUN on vcpu fd: EINVAL"),
        ("1 / 0", "ERROR", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_it_raises_decides_its_verdict(body, verdict, reason):
    answer = run(body)
    assert answer["verdict"] == verdict
    assert answer["reason"].startswith(reason) if reason else answer["reason"] == ""
    if verdict in ("FAIL", "ERROR"):
        # Lines of a user's own file, which the host does not have, are in the traceback.
        assert '"/their/file.py"' in answer["trace"]
        assert body in answer["trace"]


def test_a_need_that_says_no_is_a_skip_with_its_evidence():
    assert run("1 / 0", needs="[yes, no]") == {"verdict": "SKIP", "reason": "no: svm=0"}


def test_a_host_that_cannot_answer_is_no_skip():
    answer = run("pass", needs="[refused]")
    assert (answer["verdict"], answer["reason"]) == ("ERROR", "/dev/kvm: Permission denied")


def test_axes_arrive_as_arguments():
    body = "assert (path, n) == ('a', 2), (path, n)"
    answer = run(body, axes="{'path': ('a',), 'n': (2,)}", values={"path": "a", "n": 2})
    assert answer["verdict"] == "PASS"


def test_a_name_that_is_no_scenario_is_the_harnesss_fault():
    with pytest.raises(HarnessError, match="is no scenario"):
        run_case(Emitted(), "harness.scenarios.case", "cases_of", {})


CLEANS_UP_BADLY = """
    class Bad:
        def __enter__(self): return self
        def __exit__(self, *error): raise HostError("cannot undo")
    context.enter(Bad())
"""


def test_a_host_error_while_cleaning_up_is_not_hidden():
    answer = run(CLEANS_UP_BADLY)
    assert (answer["verdict"], answer["reason"]) == ("ERROR", "cannot undo")
