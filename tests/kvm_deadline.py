"""A deadline for tests that may hang inside KVM_RUN, where no exception reaches them."""

import contextlib
import faulthandler
import sys

import pytest


@contextlib.contextmanager
def process_deadline(timeout_s):
    """End the process, with all stacks, when the time is up: nothing else gets out of KVM_RUN."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def deadline_of_each(timeout_s):
    """Return a fixture for a conftest.py: each of its tests has so many seconds."""

    @pytest.fixture(autouse=True)
    def deadline():
        with process_deadline(timeout_s):
            yield

    return deadline
