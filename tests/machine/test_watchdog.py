import signal
import threading
import time
from types import SimpleNamespace

import pytest

from harness.errors import HarnessError
from harness.machine import watchdog as module
from harness.machine.watchdog import KICK_SIGNAL, Watchdog


def never():
    raise AssertionError("not stuck")


def wait_until(condition, timeout_s=5.0):
    """Wait for a condition; one that nothing else wakes us for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def test_time_up_sets_immediate_exit_and_disarm_clears_it(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    watch = watchdog.arm(run, 0.01, never)
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
        watch = watchdog.arm(run, 0.01, never)
        wait_until(lambda: len(seen) >= 3)
        assert run.immediate_exit == 1
        watchdog.disarm(watch)
    finally:
        signal.signal(KICK_SIGNAL, previous)


def test_no_kick_before_the_deadline(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    early = SimpleNamespace(immediate_exit=0)
    late = watchdog.arm(run, 60, never)
    soon = watchdog.arm(early, 0.01, never)
    wait_until(lambda: soon.fired)
    assert not late.fired
    assert run.immediate_exit == 0
    watchdog.disarm(soon)
    watchdog.disarm(late)


def test_expire_makes_the_time_be_up_now(watchdog):
    run = SimpleNamespace(immediate_exit=0)
    watch = watchdog.arm(run, 60, never)
    watchdog.expire(watch)
    wait_until(lambda: run.immediate_exit)
    watchdog.disarm(watch)


def test_a_thread_that_ignores_signals_is_reported_once(watchdog, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    reports = []
    done = threading.Event()

    def stay():
        watch = watchdog.arm(SimpleNamespace(immediate_exit=0), 0.01, lambda: reports.append(1))
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
        Watchdog().arm(SimpleNamespace(immediate_exit=0), 1, never)


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
