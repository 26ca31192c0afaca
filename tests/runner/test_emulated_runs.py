"""`nsvm run` on an emulated host, with scenarios that hang, crash and kill it."""

import signal

import psutil
import pytest
from nsvm_process import DEADLINE_S, Nsvm, wait_until

pytestmark = pytest.mark.emulated

SCENARIOS = '''
import time
from harness.facts import nested_svm_off
from harness.scenarios import scenario

def say(text):
    with open("/dev/kmsg", "w") as kmsg:
        kmsg.write(text + "\\n")

@scenario()
def test_talks_and_waits(context):
    """It says something of every kind and waits."""
    context.note("noted before the end", number=1)
    print("printed before the end")
    say("<5>logged before the end")
    while True:
        time.sleep(0.1)

@scenario()
def test_after_talks_and_waits(context):
    """A claim."""

@scenario()
def test_crashes_the_kernel(context):
    """It makes the kernel panic."""
    context.note("noted before the panic")
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("c")
    time.sleep(600)

@scenario()
def test_after_crashes_the_kernel(context):
    """A claim."""

def spin_for_ever():
    while True:
        pass

@scenario(timeout_s=1)
def test_never_ends(context):
    """It loops."""
    print("printed before the loop")
    spin_for_ever()

@scenario()
def test_after_never_ends(context):
    """A claim."""

@scenario()
def test_makes_the_kernel_complain(context):
    """It passes, but the kernel warns meanwhile."""
    say("<4>WARNING: test")

@scenario(benign=["WARNING: test"])
def test_makes_the_kernel_complain_on_purpose(context):
    """It passes, and the kernel's warning is meant."""
    say("<4>WARNING: test")

@scenario(needs=[nested_svm_off])
def test_needs_something_else(context):
    """It is not for this host."""

@scenario()
def test_is_broken(context):
    """It has a bug of its own."""
    undefined_name()
'''

#: What each ends as, and how its reason begins.
EXPECTED = {
    "talks_and_waits": ("FAIL", "the host was lost: QEMU was ended by SIGKILL"),
    "after_talks_and_waits": ("PASS", ""),
    "crashes_the_kernel": ("FAIL", "the host was lost: the emulated host went down"),
    "after_crashes_the_kernel": ("PASS", ""),
    "never_ends": ("FAIL", "did not end within its timeout"),
    "after_never_ends": ("PASS", ""),
    "makes_the_kernel_complain": ("FAIL", "kernel: WARNING: test"),
    "makes_the_kernel_complain_on_purpose": ("PASS", ""),
    "needs_something_else": ("SKIP", "nested_svm_off: kvm_amd.nested=1"),
    "is_broken": ("ERROR", "NameError: name 'undefined_name' is not defined"),
}


def said(events, case):
    """Return what a case has said so far: notes, output and kernel log."""
    own = [event for event in events if event.get("case") == case]
    return {
        "emit": [event["data"]["what"] for event in own if event["event"] == "emit"],
        "output": [event["text"] for event in own if event["event"] == "output"],
        "kmsg": [event["text"] for event in own if event["event"] == "kmsg"],
    }


class Finished:
    """A run that is over, and what was in its results when its first machine was killed."""

    def __init__(self, run, before):
        self.status, self.output = run.end()
        self.events, self.ends, self.before = run.events(), run.ends(), before
        self.junit = (run.results / "junit.xml").read_text()


@pytest.fixture(scope="module")
def finished(kernel, tmp_path_factory):
    """Run all of these, and kill the machine under the first once it has said everything."""
    directory = tmp_path_factory.mktemp("run")
    file = directory / "scenarios.py"
    file.write_text(SCENARIOS)
    with Nsvm("run", "-j", 1, "--kernel", kernel, file, results=directory / "results") as run:
        wait_until(
            lambda: (
                all(said(run.events(), "talks_and_waits").values())
                or run.process.poll() is not None
            ),
            "the first scenario says something of every kind",
        )
        before = run.events()
        assert run.process.poll() is None, run.end()
        run.machines()[0].kill()
        return Finished(run, before)


def test_all_have_the_verdict_that_they_should(finished):
    verdicts = {case: end["verdict"] for case, end in finished.ends.items()}
    assert verdicts == {case: verdict for case, (verdict, _) in EXPECTED.items()}, finished.output
    assert finished.status == 1


@pytest.mark.parametrize("case", EXPECTED)
def test_the_reason_says_what_it_was(finished, case):
    reason = finished.ends[case]["reason"]
    assert reason.startswith(EXPECTED[case][1]) if EXPECTED[case][1] else reason == ""
    assert "\n" not in reason


def test_all_that_is_said_arrives_while_the_case_runs(finished):
    assert "talks_and_waits" not in [e.get("case") for e in finished.before if e["event"] == "end"]
    assert said(finished.before, "talks_and_waits") == {
        "emit": ["noted before the end"],
        "output": ["printed before the end"],
        "kmsg": ["logged before the end"],
    }


def test_nothing_recorded_is_lost_when_the_machine_dies(finished):
    assert finished.events[: len(finished.before)] == finished.before
    assert said(finished.events, "crashes_the_kernel")["emit"] == ["noted before the panic"]


def test_a_panic_leaves_the_kernels_last_words(finished):
    console = finished.ends["crashes_the_kernel"]["evidence"]["console"]
    assert "sysrq: Trigger a crash" in console
    assert "Kernel panic - not syncing: sysrq triggered crash" in console
    assert console in finished.junit.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_a_loop_leaves_its_stack(finished):
    end = finished.ends["never_ends"]
    output = end["evidence"]["output"]
    assert output.startswith("printed before the loop")
    assert "in spin_for_ever" in output
    assert "in test_never_ends" in output
    # One second, times what emulation costs.
    assert 3 <= end["seconds"] < 60


def test_a_bug_in_a_users_file_is_shown_with_its_line(finished):
    assert "undefined_name()" in finished.ends["is_broken"]["evidence"]["traceback"]


def test_every_case_says_on_what_it_ran(finished, kernel):
    for end in finished.ends.values():
        assert end["host"]["kernel_release"] == kernel.kernel.release
        assert end["host"]["kind"] == "emulated"
        assert end["host"]["module_parameters"]["kvm_amd.nested"] == "1"


def test_no_machine_is_left(finished):
    """By the command line: each has the directory of its harness in it."""

    def left():
        return [
            process.pid
            for process in psutil.process_iter(["cmdline", "ppid"])
            if any("nsvm-host-" in word for word in process.info["cmdline"] or ())
            and process.info["ppid"] == 1
        ]

    # One that was killed is there for a moment longer.
    wait_until(lambda: not left(), "no machine outlives its run", 60)


# Being told to stop


WAITING = '''
import time
from harness.scenarios import scenario

@scenario()
def test_first(context):
    """A claim."""

@scenario()
def test_waits(context):
    """A claim."""
    context.note("waiting")
    while True:
        time.sleep(0.1)

@scenario()
def test_last(context):
    """A claim."""
'''


@pytest.fixture
def waiting(one_kernel, tmp_path):
    """A run in the middle of its second scenario, and its machines."""
    file = tmp_path / "waiting.py"
    file.write_text(WAITING)
    with Nsvm("run", "-j", 1, "--kernel", one_kernel, file, results=tmp_path / "results") as run:
        wait_until(
            lambda: said(run.events(), "waits")["emit"] or run.process.poll() is not None,
            "the scenario waits",
        )
        assert run.process.poll() is None, run.end()
        machines = run.machines()
        assert machines
        yield run, machines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_ends_its_machines_and_records_what_never_ran(waiting, number):
    run, machines = waiting
    run.process.send_signal(number)
    status, output = run.end()
    assert status == 2
    assert not [machine for machine in machines if machine.is_running()]
    ends = run.ends()
    verdicts = {case: end["verdict"] for case, end in ends.items()}
    assert verdicts == {"first": "PASS", "waits": "MISS", "last": "MISS"}, output
    assert "ended early" in ends["last"]["reason"]
    assert run.events()[-1]["event"] == "summary"
    assert "Traceback" not in output


def test_a_run_that_is_killed_takes_its_machines_with_it(waiting):
    run, machines = waiting
    run.process.kill()
    run.end()
    wait_until(lambda: not any(machine.is_running() for machine in machines), "all are gone", 60)
    assert said(run.events(), "waits")["emit"] == ["waiting"]


# Two hosts at once


TWO_AT_ONCE = (
    WAITING
    + '''
@scenario()
def test_waits_too(context):
    """A claim."""
    test_waits(context)

@scenario()
def test_very_last(context):
    """A claim."""
'''
)


@pytest.fixture(params=[[], ["--shared"]], ids=["fresh", "shared"])
def two_waiting(request, one_kernel, tmp_path):
    """A run with a scenario that waits on each of two hosts."""
    file = tmp_path / "waiting.py"
    # Both first, the others behind them.
    head, first, waits, last, too, very_last = TWO_AT_ONCE.split("@scenario()")
    file.write_text("@scenario()".join([head, waits, too, first, last, very_last]))
    arguments = ["run", "-j", 2, *request.param, "--kernel", one_kernel, file]
    with Nsvm(*arguments, results=tmp_path / "results") as run:
        wait_until(
            lambda: (
                all(said(run.events(), case)["emit"] for case in ("waits", "waits_too"))
                or run.process.poll() is not None
            ),
            "both wait",
        )
        assert run.process.poll() is None, run.end()
        yield run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_hosts_end_when_a_run_is_told_to_stop(two_waiting, number):
    machines = two_waiting.machines()
    assert len(machines) >= 2
    two_waiting.process.send_signal(number)
    status, output = two_waiting.end()
    assert status == 2
    assert not [machine for machine in machines if machine.is_running()]
    verdicts = {case: end["verdict"] for case, end in two_waiting.ends().items()}
    cases = ("waits", "waits_too", "first", "last", "very_last")
    assert verdicts == dict.fromkeys(cases, "MISS"), output
    assert two_waiting.events()[-1]["event"] == "summary"
    assert "Traceback" not in output
    assert "warm start failed" not in output


def test_the_loss_of_one_host_is_nothing_to_the_other(two_waiting):
    """The first machines are the two at work; their reserves, if any, came later."""
    two_waiting.machines()[0].kill()
    wait_until(lambda: len(two_waiting.ends()) == 4, "all but one have ended")
    ends = two_waiting.ends()
    [lost] = [case for case, end in ends.items() if end["verdict"] == "FAIL"]
    [left] = {"waits", "waits_too"} - {lost}
    assert ends[lost]["reason"].startswith("the host was lost: QEMU was ended by SIGKILL")
    assert {case: end["verdict"] for case, end in ends.items() if case != lost} == {
        "first": "PASS",
        "last": "PASS",
        "very_last": "PASS",
    }
    assert left not in ends


def cpu_s(machine):
    """Return the processor time of a machine; one that was replaced by another has had none."""
    try:
        return sum(machine.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0


def test_a_measurement_that_is_told_to_stop_ends_its_machine(one_kernel):
    arguments = ["memory", "--kernel", one_kernel, "--vcpus", 64, "--rounds", 100]
    with Nsvm(*arguments) as run:
        # Its processor time, not the clock: more than a warm start takes, less than this takes.
        machine = wait_until(
            lambda: next((m for m in run.machines() if cpu_s(m) > 2), None),
            "the machine is measuring",
            DEADLINE_S,
        )
        run.process.send_signal(signal.SIGTERM)
        status, output = run.end()
    assert status == 128 + signal.SIGTERM
    assert not machine.is_running()
    assert "Traceback" not in output
