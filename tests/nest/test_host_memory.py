"""What a VM costs its host: who is asked, and what is told."""

import contextlib

import pytest

from harness.errors import HostError
from harness.nest import host_memory as module
from harness.nest.host_memory import host_memory


class Cgroup(contextlib.ExitStack):
    def __init__(self, label):
        super().__init__()

    def stat(self):
        return {"anon": 5 << 20, "kernel": 7, "slab_reclaimable": 1}


class Nested(contextlib.ExitStack):
    def count(self):
        return 2


class NoEvents(Nested):
    def __enter__(self):
        raise HostError("this kernel has no kprobe events")


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(module, "Cgroup", Cgroup)

    def of(probe):
        monkeypatch.setattr(module, "NestedVcpus", probe)
        found = []
        with host_memory(lambda kind, **data: found.append((kind, data)), 1) as tell:
            tell({"level": 2, "what": "ready"}, lambda: {"pages_2m": 9, "exits": 1})
        [(kind, data)] = found
        assert kind == "memory"
        return data

    return of


def test_a_stage_is_told_with_what_was_counted(told):
    assert told(Nested) == {
        **{"vm": 1, "level": 2, "what": "ready", "nested_bytes": 24576},
        **{"anon": 5 << 20, "kernel": 7, "pages_2m": 9},
    }


def test_a_kernel_without_function_events_leaves_that_column_out(told):
    assert "nested_bytes" not in told(NoEvents)
    assert told(NoEvents)["kernel"] == 7
