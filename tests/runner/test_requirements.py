"""`--require`: what must hold, or the run is an ERROR."""

from dataclasses import asdict

import pytest

from harness import facts
from harness.errors import HarnessError, HostError
from harness.facts import Answer
from harness.host.session import CallResult
from harness.runner import requirements
from harness.runner.hosts import HostChoice

ANSWERS = {
    "svm": Answer("svm", True, "cpu flag svm"),
    "npt": Answer("npt", False, "kvm_amd.npt=N", "modprobe kvm_amd npt=1"),
    "tracefs": Answer("tracefs", None, "no permission"),
}


@pytest.fixture
def host(monkeypatch):
    """A host that answers with `ANSWERS`, or does not start."""

    class Fake:
        refuse = ""
        closed = False

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

        def start(self):
            if self.refuse:
                raise HostError(self.refuse)
            return self

        def call(self, target, timeout_s):
            module, _, name = target.partition(":")
            assert module == facts.__name__
            assert callable(getattr(facts, name))
            return CallResult("return", [asdict(answer) for answer in ANSWERS.values()])

    fake = Fake()
    monkeypatch.setattr(requirements, "make_host", lambda choice, log: fake)
    return fake


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(HarnessError, match=r"--require nptt: no such fact; there are .*npt, .*"):
        requirements.check_names(["npt", "nptt"])


def test_every_answer_of_a_host_can_be_required():
    requirements.check_names(requirements.NAMES)
    assert {"nested_svm", "npt", "tracefs"} <= set(requirements.NAMES)


def test_what_is_asked_is_answered_once_and_the_host_ended(host):
    assert requirements.ask(HostChoice(), ["npt", "svm", "npt"]) == [
        ANSWERS["npt"],
        ANSWERS["svm"],
    ]
    assert host.closed


def test_a_host_that_does_not_start_is_an_answer(host):
    host.refuse = "it does not come up\nand a long console"
    assert requirements.ask(HostChoice(), ["npt"]) == [Answer("start", None, "it does not come up")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("svm", ""),
        ("npt", "required fact npt does not hold: kvm_amd.npt=N -> modprobe kvm_amd npt=1"),
        ("tracefs", "required fact tracefs cannot be told: no permission"),
    ],
)
def test_a_complaint_has_the_evidence_and_the_way_to_mend(name, text):
    assert requirements.complaint(ANSWERS[name]) == text


# Through the command


def test_what_holds_changes_nothing(run, host):
    ran = run("--require", "svm", one="pass", two="skip")
    assert (ran.status, ran.verdicts) == (0, {"one": "PASS", "two": "SKIP"})
    [event] = [event for event in ran.events if event["event"] == "require"]
    assert (event["name"], event["holds"], event["evidence"]) == ("svm", True, "cpu flag svm")


@pytest.mark.parametrize("name", ["npt", "tracefs"])
def test_what_does_not_hold_makes_the_run_an_error(run, host, name):
    ran = run("--require", "svm", "--require", name, one="pass", two="skip")
    complaint = requirements.complaint(ANSWERS[name])
    assert (ran.status, ran.verdicts) == (2, {"one": "MISS", "two": "MISS"})
    assert ran.ends["one"]["reason"] == complaint
    assert f"ERROR  {complaint}" in ran.output.splitlines()
    assert ran.pool.calls == []
    # Whoever reads nothing but JUnit is not to see green.
    assert [child.tag for child in ran.testcase("two")] == ["error"]


def test_it_is_an_error_too_when_nothing_was_to_run(run, host):
    assert run("--require", "npt", "-k", "no_such_case", one="pass").status == 2
