"""Experiments that hang, die or break off: each costs its own knobs and nothing else."""

import os
import signal
import time

import psutil
import pytest

from harness.errors import HostError
from harness.identify.battery import conduct
from harness.identify.finding import Experiment, Finding

KNOBS = ("alloc_failure", "pages_request")


def ended(function, deadline_s=20.0):
    """Run a function as an experiment; return its findings by knob."""
    found = conduct(Experiment("test", KNOBS, function, deadline_s), None)
    assert [each.knob for each in found] == list(KNOBS)
    return found


def first():
    return Finding(KNOBS[0], "gp", "seen")


def test_findings_come_back():
    def both(kvm):
        yield first()
        yield Finding(KNOBS[1], "once", "seen too")

    assert ended(both) == [first(), Finding(KNOBS[1], "once", "seen too")]


def test_a_knob_that_was_not_got_to_is_not_seen():
    def half(kvm):
        yield first()

    assert ended(half) == [first(), Finding(KNOBS[1], None, "the experiment did not get to it")]


def test_one_that_hangs_is_ended_at_its_deadline():
    def hang(kvm):
        yield first()
        time.sleep(60)

    started = time.monotonic()
    one, other = ended(hang, deadline_s=0.5)
    assert time.monotonic() - started < 20
    assert one == first()
    assert other.evidence == "the experiment did not end within 0 s"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_dies_is_reported(number):
    def die(kvm):
        yield first()
        os.kill(os.getpid(), number)

    one, other = ended(die)
    assert one == first()
    assert not other.seen
    assert other.evidence.startswith("the experiment's process died, wait status")


def test_one_that_breaks_off_says_why_in_one_line():
    def refuse(kvm):
        raise HostError("no such thing\nand much more")
        yield

    assert {each.evidence for each in ended(refuse)} == {"the experiment broke off: no such thing"}


def test_one_that_has_a_bug_leaves_its_traceback():
    def bug(kvm):
        yield Finding("alloc_failure", 1 // 0, "never")

    assert all("ZeroDivisionError" in each.evidence for each in ended(bug))


def test_no_process_and_no_descriptor_is_left():
    descriptors, children = os.listdir("/proc/self/fd"), psutil.Process().children()
    ended(lambda kvm: iter([first()]))
    assert os.listdir("/proc/self/fd") == descriptors
    assert psutil.Process().children() == children
