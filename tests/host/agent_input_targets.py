"""What the tests of a call's standard input have an agent call."""

import os
import signal
import sys
import time
from pathlib import Path


def echo_until(emit, last):
    """Emit every line before `last`; return how many lines came, it included."""
    for count, line in enumerate(sys.stdin, 1):
        if line == f"{last}\n":
            return count
        emit("line", line=line.rstrip("\n"))
    return 0


def wait_for(go):
    while not Path(go).exists():
        time.sleep(0.01)


def read_when_told(emit, go, size):
    wait_for(go)
    return len(sys.stdin.read(size))


def close_input(emit, go):
    os.close(0)
    emit("closed")
    wait_for(go)


def read_to_the_end(emit, file):
    # The end of the agent is told by SIGTERM too; this is about the input.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    emit("reading")
    sys.stdin.read()
    Path(file).write_text("end")


def count_interrupts(emit, wanted):
    count = 0
    while count < wanted:
        try:
            emit("ready")
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            count += 1
    return count


def print_input(emit):
    print("read:", sys.stdin.readline(), end="")
