"""^C: raised in typed code only; inside the harness it kicks, and waits for the return."""

import os
import signal
import time

import pytest

from harness.shell import show
from harness.shell.interrupts import INPUT_PREFIX, Interrupts


@pytest.fixture
def kicks():
    return []


@pytest.fixture
def interrupts(kicks):
    previous = signal.getsignal(signal.SIGINT)
    made = Interrupts(lambda: kicks.append(time.monotonic()))
    try:
        yield made
    finally:
        made.line_ended()
        signal.signal(signal.SIGINT, previous)


def press():
    os.kill(os.getpid(), signal.SIGINT)


#: A function that counts as the harness's, whatever it calls.
HARNESS = {"__name__": show.__name__}
exec("def inside(function):\n    result = function()\n    return result\n", HARNESS)


def typed(source, **names):
    """Run source as what was typed at the prompt is run."""
    names = {"press": press, "inside": HARNESS["inside"], **names}
    exec(compile(source, f"{INPUT_PREFIX}test>", "exec"), names)
    return names


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.usefixtures("interrupts")
def test_it_is_raised_in_what_was_typed(kicks):
    with pytest.raises(KeyboardInterrupt):
        typed("press()\nwhile True: pass")
    assert kicks == []


@pytest.mark.usefixtures("interrupts")
def test_nothing_is_raised_where_nothing_was_typed(kicks):
    press()
    HARNESS["inside"](press)
    assert kicks == []


def test_inside_the_harness_it_kicks_and_waits_for_the_return(kicks, interrupts):
    done = []

    def work():
        press()
        until(lambda: len(kicks) > 2)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        typed("while True: inside(work)", work=work)
    assert done == [True]
    interrupts.line_ended()
    count = len(kicks)
    time.sleep(0.1)
    assert len(kicks) == count


def test_what_a_kick_raises_is_not_replaced(kicks, interrupts):
    for _ in range(20):
        kicks.clear()

        def work():
            press()
            until(lambda: kicks)
            raise ValueError("kicked")

        with pytest.raises(ValueError, match="kicked"):
            typed("while True: inside(work)", work=work)
        interrupts.line_ended()


@pytest.mark.usefixtures("interrupts")
def test_code_that_catches_what_a_kick_raises_ends_all_the_same(kicks):
    def work():
        press()
        until(lambda: kicks)
        raise ValueError("kicked")

    source = "while True:\n    try:\n        inside(work)\n    except ValueError:\n        pass\n"
    with pytest.raises(KeyboardInterrupt):
        typed(source, work=work)


@pytest.mark.usefixtures("interrupts")
def test_typed_code_that_the_harness_calls_is_interrupted(kicks):
    with pytest.raises(KeyboardInterrupt):
        typed("def hook():\n    press()\n    while True: pass\ninside(hook)")
    assert kicks == []
