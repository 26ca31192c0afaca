"""What the tests have an agent call."""

import contextlib
import os
import signal
import sys
import time

import agent_state


def add(emit, a, b):
    return a + b


def fail(emit):
    raise ValueError("no good")


def kill_itself(emit, number):
    os.kill(os.getpid(), number)
    time.sleep(60)


def leave(emit, status):
    os._exit(status)


def talk(emit, count):
    for number in range(count):
        print(f"line {number}")
        emit("note", number=number)
    os.write(2, b"and no end of line")


def talk_slowly(emit, count):
    """Talk for some seconds."""
    for number in range(count):
        print(f"line {number}")
        emit("note", number=number)
        time.sleep(0.005)


def say_and_wait(emit, go):
    """Say something at once, and end when the file `go` is there."""
    emit("note", what="waiting")
    print("waiting")
    while not os.path.exists(go):
        time.sleep(0.01)


def loop_for_ever(emit):
    emit("note", what="looping")
    while True:
        time.sleep(0.01)


def ignore_everything(emit, pid_file=None):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT})
    if pid_file:
        with open(pid_file, "w") as file:
            file.write(f"{os.getpid()}\n")
    loop_for_ever(emit)


@contextlib.contextmanager
def borrowed(path, last_words):
    with open(path, "w") as file:
        file.write("borrowed\n")
    try:
        yield
    finally:
        print("x" * last_words, end="")
        os.unlink(path)


def borrow(emit, path, last_words=200_000):
    """Borrow; by default say more at the end than a pipe holds: somebody must go on reading."""
    with borrowed(path, last_words):
        loop_for_ever(emit)


def write_half_an_event(emit):
    """Die in the middle of an event, as a child does that is killed while it writes."""
    send = emit.__closure__[0].cell_contents
    os.write(send.__self__._writer, b'{"event":"emit","ki')
    os._exit(7)


def leave_somebody_behind(emit):
    """Return while a child of its own holds the output open, and writes without end."""
    pid = os.fork()
    if pid == 0:
        for _ in range(500):
            with contextlib.suppress(OSError):
                os.write(1, b"still here\n")
            time.sleep(0.02)
        os._exit(0)
    return pid


def read_input(emit):
    return sys.stdin.read()


def unlikely_value(emit):
    return {"path": object}


def state(emit):
    agent_state.calls += 1
    return agent_state.calls


def importer(emit):
    return agent_state.imported_by


def log(emit, text):
    with open("/dev/kmsg", "w") as kmsg:
        # Without the end of the line, the kernel keeps the record open and readers do not see it.
        kmsg.write(text + "\n")
