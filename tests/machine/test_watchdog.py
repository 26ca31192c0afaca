import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from waiting import wait_until

from harness.errors import HarnessError
from harness.machine import watchdog as module
from harness.machine.watchdog import KICK_SIGNAL, Watchdog


def never():
    raise AssertionError("not stuck")


def armed(watchdog, run, timeout_s):
    watch = watchdog.watch(never)
    watchdog.arm(watch, run, timeout_s)
    return watch


def test_time_up_sets_immediate_exit_and_disarm_clears_it(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    watch = armed(watchdog, run, 0.01)
    wait_until(lambda: run.immediate_exit)
    assert watch.fired
    watchdog.disarm(watch)
    assert run.immediate_exit == 0


def test_a_blocking_call_is_interrupted_again_and_again(watchdog):
    """The signal arrives at the armed thread, in the kernel, and not only once."""
    seen = []
    previous = signal.signal(KICK_SIGNAL, lambda *_: seen.append(threading.get_ident()))
    run = SimpleNamespace(immediate_exit=0)
    try:
        watch = armed(watchdog, run, 0.01)
        wait_until(lambda: len(seen) >= 3)
        assert run.immediate_exit == 1
        watchdog.disarm(watch)
    finally:
        signal.signal(KICK_SIGNAL, previous)


def test_no_kick_before_the_deadline(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    early = SimpleNamespace(immediate_exit=0)
    late = armed(watchdog, run, 60)
    soon = armed(watchdog, early, 0.01)
    wait_until(lambda: soon.fired)
    assert not late.fired
    assert run.immediate_exit == 0
    watchdog.disarm(soon)
    watchdog.disarm(late)


def test_expire_makes_the_time_be_up_now(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    watch = armed(watchdog, run, 60)
    watchdog.expire(watch)
    wait_until(lambda: run.immediate_exit)
    watchdog.disarm(watch)


class SlowPage:
    """Runs `meanwhile` when the watchdog sets its flag, just before the signal."""

    def __init__(self, meanwhile):
        self.flag = 0
        self.meanwhile = meanwhile

    @property
    def immediate_exit(self):
        return self.flag

    @immediate_exit.setter
    def immediate_exit(self, value):
        self.flag = value
        if value:
            self.meanwhile()


def test_disarm_waits_for_a_kick_that_is_on_its_way(watchdog):
    kicking, disarmed = threading.Event(), threading.Event()
    disarmed_while_kicking = []

    def meanwhile():
        kicking.set()
        disarmed_while_kicking.append(disarmed.wait(0.05))

    def run_vcpu():
        watch = armed(watchdog, page, 0.01)
        kicking.wait(5)
        watchdog.disarm(watch)
        disarmed.set()

    page = SlowPage(meanwhile)
    thread = threading.Thread(target=run_vcpu)
    thread.start()
    thread.join(5)
    assert disarmed.is_set()
    assert disarmed_while_kicking == [False]
    assert page.flag == 0


def when_looked_at(monkeypatch, condition, action):
    """Run the action once, right after the watchdog's thread has seen when a watch is due."""
    seen, real = [], module.Watch.due_at

    def due_at(watch):
        due = real(watch)
        if not seen and condition(due) and threading.current_thread().name == "watchdog":
            seen.append(watch)
            action()
        return due

    monkeypatch.setattr(module.Watch, "due_at", due_at)
    return seen


@pytest.mark.parametrize("goes_on", [False, True], ids=["idle", "armed again"])
def test_no_kick_for_a_run_that_has_just_ended(watchdog, monkeypatch, goes_on):
    run = SimpleNamespace(immediate_exit=0)
    kicks = []
    monkeypatch.setattr(module.signal, "pthread_kill", lambda *_: kicks.append(run.immediate_exit))

    def end_the_run():
        watchdog.disarm(watch)
        if goes_on:
            watchdog.arm(watch, run, 0.1)

    watch = watchdog.watch(never)
    seen = when_looked_at(monkeypatch, lambda due: due <= time.monotonic(), end_the_run)
    watchdog.arm(watch, run, 0.01)
    wait_until(lambda: seen)
    with watchdog._lock:  # so the thread is through with this look
        assert (watch.fired, run.immediate_exit, kicks) == (False, 0, [])
    if goes_on:
        wait_until(lambda: kicks)
        assert watch.fired
    watchdog.disarm(watch)


def test_a_deadline_that_comes_while_the_thread_looks_is_not_overlooked(watchdog, monkeypatch):
    run = SimpleNamespace(immediate_exit=0)
    watch = watchdog.watch(never)

    def run_vcpu():
        watchdog.arm(watch, run, 0.05)

    def arm_in_another_thread():
        threading.Thread(target=run_vcpu).start()
        wait_until(lambda: watch.deadline < module.inf)
        time.sleep(0.01)  # it has compared the deadline with _next_look, too

    other = armed(watchdog, SimpleNamespace(immediate_exit=0), 0.05)
    wait_until(lambda: watchdog._next_look < module.inf)  # it looks at the deadline that was
    watchdog.disarm(other)
    monkeypatch.setattr(module.signal, "pthread_kill", lambda *_: None)
    seen = when_looked_at(monkeypatch, lambda due: due == module.inf, arm_in_another_thread)
    wait_until(lambda: seen)
    try:
        wait_until(lambda: run.immediate_exit)
    finally:
        watchdog.disarm(watch)  # its thread is gone: it must not be kicked later


def test_every_deadline_is_seen_whatever_the_last_one_was(watchdog):
    watch = watchdog.watch(never)
    for timeout_s in (0.02, 60, 0.001, 5, 0, 0.01):
        run = SimpleNamespace(immediate_exit=0)
        watchdog.arm(watch, run, timeout_s)
        if timeout_s < 1:
            wait_until(lambda run=run: run.immediate_exit)
            assert watchdog.has_fired(watch)
        watchdog.disarm(watch)
        assert not watchdog.has_fired(watch)


def test_an_idle_watch_is_not_kicked_and_keeps_no_page(watchdog):
    class Page(SimpleNamespace):
        """One that can be referred to weakly."""

    run = Page(immediate_exit=0)
    watch = armed(watchdog, run, 60)
    watchdog.disarm(watch)
    page = weakref.ref(run)
    watchdog.expire(watch)
    other = armed(watchdog, SimpleNamespace(immediate_exit=0), 0.01)
    wait_until(lambda: other.fired)  # so the thread has looked at all of them
    assert (watch.fired, run.immediate_exit) == (False, 0)
    del run
    assert page() is None
    watchdog.disarm(other)


def test_what_a_report_raises_does_not_end_the_watching(watchdog, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    watch = watchdog.watch(never)
    for _ in range(2):
        run = SimpleNamespace(immediate_exit=0)
        watchdog.arm(watch, run, 0.01)
        wait_until(lambda run=run: run.immediate_exit and watch.stuck)
        watchdog.disarm(watch)


CHILD = """
import os, time
from types import SimpleNamespace
from harness.machine.watchdog import WATCHDOG

def kicked():
    run = SimpleNamespace(immediate_exit=0)
    WATCHDOG.arm(watch, run, 0.01)
    deadline = time.monotonic() + 5
    while not run.immediate_exit and time.monotonic() < deadline:
        time.sleep(0.001)
    WATCHDOG.disarm(watch)
    return watch.run is None and not watch.fired and time.monotonic() < deadline

WATCHDOG.install()
watch = WATCHDOG.watch(lambda: None)
assert kicked()
child = os.fork()
if not child:
    os._exit(0 if kicked() else 1)
assert os.waitpid(child, 0)[1] == 0
assert kicked()
"""


def test_a_forked_child_is_watched_too():
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thread_that_ignores_signals_is_reported_once(watchdog, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    reports = []
    done = threading.Event()

    def stay():
        watch = watchdog.watch(lambda: reports.append(1))
        watchdog.arm(watch, SimpleNamespace(immediate_exit=0), 0.01)
        done.wait(10)  # waits on, whatever signals come: as a KVM_RUN that never returns
        watchdog.disarm(watch)

    thread = threading.Thread(target=stay)
    thread.start()
    wait_until(lambda: reports)
    time.sleep(3 * module.RESEND_S)
    done.set()
    thread.join(5)
    assert reports == [1]


def test_the_handler_is_given_back_with_the_last_user():
    def mine(*_):
        pass

    watchdog = Watchdog()
    before = signal.signal(KICK_SIGNAL, mine)
    try:
        watchdog.install()
        watchdog.install()
        watchdog.uninstall()
        assert signal.getsignal(KICK_SIGNAL) is not mine
        watchdog.uninstall()
        assert signal.getsignal(KICK_SIGNAL) is mine
    finally:
        signal.signal(KICK_SIGNAL, before)


def test_without_handler_nothing_is_armed():
    with pytest.raises(HarnessError, match="not installed"):
        armed(Watchdog(), SimpleNamespace(immediate_exit=0), 1)


def test_the_first_user_must_be_the_main_thread():
    errors = []

    def install():
        try:
            Watchdog().install()
        except HarnessError as e:
            errors.append(str(e))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join(5)
    assert errors == ["the first machine must be made in the main thread"]
