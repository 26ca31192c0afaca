"""Races as a check of kernels with a bug: a window counts where the table has none."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from harness.errors import HostError
from harness.host.session import CallResult
from harness.race.fields import FIELDS
from harness.repro.races import unknown_window

CLOSED = [field.name for field in FIELDS if field.expects_window("6.1.0") is False]


class Host:
    """A 6.1 on which the races for some fields are won; for others they cannot be held."""

    def __init__(self, won=(), broken=()):
        self.won, self.broken, self.raced, self.starts = won, broken, [], 0

    def describe(self):
        return {"kernel_release": "6.1.0-56-amd64"}

    def start(self):
        self.starts += 1
        return SimpleNamespace(call=self.call)

    def call(self, target, *, fields, **more):
        [name] = fields
        self.raced.append(name)
        if name in self.broken:
            raise HostError("it broke")
        proof = {"proof": "L2 ran"} if name in self.won else None
        return CallResult("return", value=[{"field": name, "first_evidence": proof}])


def test_only_windows_that_this_kernel_should_not_have_are_looked_for():
    host = Host(won=[field.name for field in FIELDS if field.name not in CLOSED])
    assert unknown_window(host, 1.0) == ""
    assert host.raced == CLOSED
    assert "EFER" in CLOSED
    assert "CS" not in CLOSED


@pytest.mark.parametrize("name", CLOSED[:2])
def test_the_first_window_is_told(name):
    assert unknown_window(Host(won=[name]), 1.0) == f"race for {name}: L2 ran"


def test_a_race_that_cannot_be_held_is_none():
    host = Host(broken=CLOSED[:1], won=CLOSED[1:2])
    with suppress(HostError):
        assert unknown_window(host, 1.0).startswith(f"race for {CLOSED[1]}")
    assert host.starts == 2
