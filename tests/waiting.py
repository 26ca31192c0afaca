"""Waiting for a condition that nothing else wakes a test for."""

import time


def wait_until(condition, what="a condition that never holds", deadline_s=30):
    """Return the first true answer of `condition`; fail, naming `what`, when none comes."""
    until, pause_s = time.monotonic() + deadline_s, 0.001
    while not (answer := condition()):
        assert time.monotonic() < until, f"waited {deadline_s} s: {what}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)
    return answer
