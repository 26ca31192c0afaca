"""A cross-check goes on whatever becomes of its host; nothing of it is lost."""

import pytest

from harness.commands.crosscheck_run import CrosscheckRun, Plan
from harness.crosscheck.complaints import COMPLAINTS, known_complaint, known_death
from harness.crosscheck.generator import sequence
from harness.crosscheck.settings import Setting
from harness.errors import HostLost
from harness.host.session import CallResult
from harness.model.operations import SetNestedState, SetSlot
from harness.report.verdict import Verdict

WARNING = "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/svm/nested.c:1 f+0x1/0x2"
STEPS = 40


class FakeHost:
    """Does ten steps a sequence; `trouble` says what happens at which."""

    kind = "local"

    def __init__(self, trouble=()):
        self.trouble = dict(trouble)
        self.starts = 0

    def start(self):
        self.starts += 1
        return FakeSession(self)

    def describe(self):
        return {"kernel_release": "6.1.0", "kernel_origin": "", "kind": "local", "silicon": ""}


class FakeSession:
    def __init__(self, host):
        self.host = host

    def call(self, target, *, on_event, first, steps, **options):
        result = CallResult("return")
        number, done = first, 0

        def emit(kind, **data):
            on_event({"event": "emit", "kind": kind, "data": data})

        while done < steps:
            emit("begins", number=number)
            trouble = self.host.trouble.pop(number, None)
            if isinstance(trouble, BaseException):
                raise trouble
            if isinstance(trouble, CallResult):
                return trouble
            if trouble is not None:
                on_event({"event": "kmsg", "text": trouble})
            done += 10
            emit("checked", number=number, steps=10, known={"d": 1}, covered=[["A", "b", "ok", 10]])
            number += 1
        result.value = {"asked": ["clean_bits"], "model_s": 1.0, "kernel_s": 1.0, "harness_s": 1.0}
        return result


def go(trouble=()):
    host = FakeHost(trouble)
    run = CrosscheckRun(host, Plan(STEPS, 3, None, Setting("6.1")), lambda text: None)
    return host, run.go(host.start())


def test_nothing_found_is_a_pass():
    host, report = go()
    assert report.verdict is Verdict.PASS
    assert (report.steps, report.sequences, host.starts) == (STEPS, 4, 1)
    assert report.known == {"d": 4}
    assert report.to_plain()["transitions"] == [["A", "b", "ok", 40]]


def test_a_lost_host_is_a_finding_and_not_the_end():
    host, report = go({1: HostLost("the kernel panicked", "the last words")})
    assert report.steps == STEPS
    assert host.starts == 2
    [bundle] = report.bundles
    assert bundle.operations == sequence(3, 1)
    assert "the kernel panicked" in bundle.what
    assert bundle.evidence["console"] == "the last words"
    assert report.verdict is Verdict.FAIL


def test_a_silence_gets_one_more_try():
    _, report = go({1: HostLost("no sign of life", silent=True)})
    assert report.bundles == []
    assert report.hosts_lost == 1
    assert report.verdict is Verdict.PASS


def test_hosts_are_not_started_for_ever():
    host, report = go({number: HostLost("again") for number in range(100)})
    assert report.hosts_lost == 20
    assert host.starts <= 21
    assert report.verdict is Verdict.FAIL


def test_what_the_kernel_complains_of_is_a_finding_of_its_sequence():
    _, report = go({2: WARNING})
    [bundle] = report.bundles
    assert bundle.operations == sequence(3, 2)
    assert bundle.evidence["kernel_log"] == [WARNING]
    assert bundle.evidence["sequence"] == 2


KNOWN = "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/x86.c:1 kvm_check_and_inject_events+0x286/0x4a0"


GP = "WARNING: CPU: 0 PID: 68 at arch/x86/kvm/svm/svm.c:1888 gp_interception+0x3b/0x40 [kvm_amd]"


@pytest.mark.parametrize(
    ("lines", "operations", "known"),
    [
        ([GP], [SetNestedState(0x101, vmcb_pa=0x10_0000)], True),
        ([GP], [SetNestedState(0x100)], False),
        ([KNOWN], [SetNestedState(0x101, vmcb_pa=0x40_0000)], True),
        ([KNOWN], [SetSlot("vmcb_a", False)], True),
        ([KNOWN], [SetSlot("vmcb_a", True), SetNestedState(0x101, vmcb_pa=0x10_0000)], False),
        ([KNOWN, WARNING], [SetSlot("vmcb_a", False)], False),
        ([WARNING], [SetSlot("vmcb_a", False)], False),
    ],
)
def test_only_the_complaint_that_has_a_name_is_known(lines, operations, known):
    assert (known_complaint(lines, operations) is not None) is known


def test_a_known_complaint_is_counted_and_no_finding():
    numbers = range(40)
    provoked = [n for n in numbers if known_complaint([KNOWN], sequence(3, n)) is not None]
    one = provoked[0]
    host = FakeHost({one: KNOWN})
    plan = Plan(10 * (one + 1), 3, None, Setting("6.1"))
    report = CrosscheckRun(host, plan, lambda text: None).go(host.start())
    assert report.known["warn-vmcb12-away-at-smi"] == 1
    assert report.verdict is Verdict.PASS


OOPS = """\
BUG: kernel NULL pointer dereference, address: 0000000000000000
RIP: 0010:0x0
Call Trace:
 kvm_fetch_guest_virt+0x50/0xc0 [kvm]
"""


@pytest.mark.parametrize(
    ("console", "operations", "known"),
    [
        (OOPS, [SetNestedState(0x101)], True),
        (OOPS, [SetNestedState(0x100)], False),
        (OOPS.replace("0010:0x0", "0010:svm_vcpu_run+0x1/0x2"), [SetNestedState(0x101)], False),
        (OOPS.replace("kvm_fetch_guest_virt", "kvm_set_msr"), [SetNestedState(0x101)], False),
        ("", [SetNestedState(0x101)], False),
    ],
)
def test_only_the_death_that_has_a_name_is_known(console, operations, known):
    assert (known_death(console, operations) is not None) is known


def test_a_known_death_is_counted_and_no_finding():
    one = next(n for n in range(99) if known_death(OOPS, sequence(3, n)) is not None)
    host = FakeHost({one: HostLost("the kernel panicked", OOPS)})
    plan = Plan(10 * (one + 2), 3, None, Setting("5.10"))
    report = CrosscheckRun(host, plan, lambda text: None).go(host.start())
    assert report.known["host-lost-without-nested-mmu"] == 1
    assert (report.hosts_lost, host.starts) == (1, 2)
    assert report.verdict is Verdict.PASS
    assert report.steps >= plan.steps


def test_a_run_that_is_given_up_is_no_pass(monkeypatch):
    monkeypatch.setattr("harness.commands.crosscheck_run.known_death", lambda *_: COMPLAINTS[0])
    host = FakeHost({number: HostLost("again", OOPS) for number in range(1, 100)})
    report = CrosscheckRun(host, Plan(500, 3, None, Setting("5.10")), lambda text: None).go(
        host.start()
    )
    assert report.verdict is Verdict.ERROR
    assert "given up: 20 hosts were lost" in report.errors


def test_a_process_that_dies_is_a_finding():
    _, report = go({0: CallResult("died", raw={"status": 70})})
    assert report.steps == STEPS
    assert "died 70" in report.bundles[0].what


@pytest.mark.parametrize(("enough", "bundles", "steps"), [(1, 1, 0), (2, 2, 10), (0, 2, STEPS)])
def test_a_run_may_end_at_the_findings_that_are_enough(enough, bundles, steps):
    died = CallResult("died", raw={"status": 70})
    host = FakeHost({0: died, 2: died})
    plan = Plan(STEPS, 3, None, Setting("6.1"), enough=enough)
    report = CrosscheckRun(host, plan, lambda text: None).go(host.start())
    assert (len(report.bundles), report.steps) == (bundles, steps)


def test_a_finding_that_is_met_again_is_told_to_the_host_and_counted():
    told = []

    class Session(FakeSession):
        def call(self, target, *, on_event, **options):
            told.append(options["told"])
            data = {"number": 0, "steps": 20, "known": {}, "covered": []}
            events = {"begins": {"number": 0}, "checked": data, "again": {"signature": "x"}}
            if not told[-1]:
                events = {"begins": {"number": 0}, "checked": data, "finding": FINDING}
            for kind, values in events.items():
                on_event({"event": "emit", "kind": kind, "data": values})
            value = {"asked": [], "model_s": 1.0, "kernel_s": 1.0, "harness_s": 1.0}
            return CallResult("return", value)

    host = FakeHost()
    kept = []
    plan = Plan(STEPS, 3, None, Setting("6.1"))
    report = CrosscheckRun(host, plan, lambda text: None, kept.append).go(Session(host))
    assert told == [[], ["x"]]
    assert kept == report.bundles
    assert len(kept) == 1
    assert report.again == {"x": 1}
    assert report.verdict is Verdict.FAIL


FINDING = {
    "number": 0,
    "signature": "x",
    "operations": [{"do": "Smi"}],
    "difference": {"step": 0, "operation": "Smi", "name": "gif", "expected": True, "seen": False},
    "explained_by": [],
    "results": ["ok"],
    "reproducible": True,
}


@pytest.mark.parametrize("kind", ["ModelBug", "HarnessError"])
def test_an_error_of_the_harness_is_none_of_the_kernel(kind):
    error = {"type": kind, "message": "impossible"}
    _, report = go({0: CallResult("raise", error=error)})
    assert report.bundles == []
    assert report.errors == [f"sequence 0: {kind}: impossible"]
    assert report.verdict is Verdict.ERROR
    assert report.steps == STEPS
