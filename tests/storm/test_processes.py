"""What forked processes report, and why a link between them was lost."""

import os
import signal
import time

import pytest

from harness.errors import HostError, ScenarioFailure
from harness.migrate.errors import LinkLost
from harness.storm import processes
from harness.storm.processes import Processes


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(processes, "_CAUSE_S", 1.0)


def seen_from(*parts):
    """Return what is reported up to the first error."""
    events = []
    with Processes(parts, "test") as children:
        children.watch(
            events.append, until=lambda: any("error" in e for e in events), silence_s=5.0
        )
    return events


def lost(report):
    raise LinkLost("the other end closed it")


def test_reports_come_in_order():
    def count(report):
        for number in range(3):
            report(number=number)
        raise HostError("that is all")

    *numbers, error = seen_from(count)
    assert [event["number"] for event in numbers] == [0, 1, 2]
    assert error == {"error": "that is all", "failure": False, "lost": False}


@pytest.mark.parametrize(
    ("cause", "failure"), [(HostError("no memory"), False), (ScenarioFailure("it hangs"), True)]
)
def test_the_error_behind_a_lost_link_counts_though_it_comes_later(cause, failure):
    def fail_late(report):
        time.sleep(0.2)
        report(step="meanwhile")
        raise cause

    [event] = seen_from(lost, fail_late)
    assert event == {"error": str(cause), "failure": failure, "lost": False}


def test_many_lost_links_make_way_for_the_one_cause():
    def lose_later(report):
        time.sleep(0.1)
        lost(report)

    def fail_last(report):
        time.sleep(0.3)
        raise HostError("the cause")

    [event] = seen_from(lost, lose_later, fail_last)
    assert event["error"] == "the cause"


def test_an_unexpected_error_behind_a_lost_link_is_told_with_its_last_line():
    def fail(report):
        time.sleep(0.1)
        raise ZeroDivisionError("by nothing")

    [event] = seen_from(lost, fail)
    assert event["error"].rstrip().endswith("ZeroDivisionError: by nothing")


def test_the_end_of_a_process_and_what_it_said_last_are_behind_a_lost_link():
    def die(report):
        os.write(2, b"vCPU 0: out of luck\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def see(report):
        time.sleep(0.1)
        lost(report)

    [event] = seen_from(see, die)
    assert "ended: SIGKILL (vCPU 0: out of luck); the other end closed it" in event["error"]


def test_a_lost_link_without_a_cause_is_told_as_it_is():
    [event] = seen_from(lost)
    assert event["error"] == "the other end closed it"


def test_a_link_that_is_lost_here_is_explained_too():
    def fail(report):
        time.sleep(0.1)
        raise HostError("the sender's own error")

    def take(event):
        raise HostError(event["error"])

    with (
        Processes([fail], "test") as children,
        pytest.raises(HostError, match=r"^the sender's own error$"),
        children.explaining(take),
    ):
        lost(None)


def test_what_processes_write_to_their_standard_error_is_not_lost(capfd):
    def say(report):
        os.write(2, b"something\n")
        raise HostError("done")

    seen_from(say)
    assert capfd.readouterr().err == "something\n"
