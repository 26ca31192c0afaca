"""The functions probe: pages that pass while a thread is inside of KVM's two functions."""

import os

import pytest
import records
from test_page_alloc import FakeTrace

from harness.errors import HarnessError, HostError
from harness.probe import kprobes
from harness.probe.functions import FunctionProbe
from harness.probe.tracefs import TraceEvent, parse

kernels = pytest.mark.parametrize("kernel", records.KERNELS)


def probe(*batches):
    return FunctionProbe(_trace=FakeTrace(*batches))


def names(events):
    return [event.name for event in events]


@kernels
def test_a_recorded_toggle_is_counted_page_by_page(kernel):
    events = parse(records.functions(kernel))
    left = names(events).index("leave_alloc") + 1
    counter = probe(events[:left], events[left:])
    assert counter.read_bytes() == 12288
    assert counter.allocations == 2
    assert counter.read_bytes() == 0
    assert counter.frees == 2


@kernels
def test_pages_outside_the_two_functions_do_not_count(kernel):
    events = parse(records.functions(kernel))
    outside = [e for e in events if e.name in ("page_alloc", "page_alloced", "page_free")]
    assert len(outside) > 6
    assert probe(outside).read_bytes() == 0


def on_thread(tid, *lines):
    """Make events of "name key=value" lines."""
    split = [line.split() for line in lines]
    return [TraceEvent(tid, name, dict(f.split("=") for f in rest)) for name, *rest in split]


def test_threads_are_told_apart():
    one = on_thread(1, "enter_alloc", "page_alloc order=0", "page_alloced page=0x5", "leave_alloc")
    two = on_thread(2, "page_alloc order=9", "page_alloced page=0x6", "page_free order=9", "x")
    mixed = [event for pair in zip(one, two, strict=True) for event in pair]
    assert probe(mixed).read_bytes() == 4096


def test_a_refused_page_is_none():
    events = on_thread(
        1, "enter_alloc", "page_alloc order=1", "page_alloced page=0x0", "leave_alloc"
    )
    counter = probe(events)
    assert (counter.read_bytes(), counter.allocations) == (0, 0)


def test_what_is_freed_again_by_a_failing_allocation_is_not_taken_off_twice():
    """svm_allocate_nested frees its page when the permission map fails, inside of itself."""
    events = on_thread(
        1,
        *("enter_alloc", "page_alloc order=0", "page_alloced page=0x5"),
        *("page_alloc order=1", "page_alloced page=0x0", "page_free order=0", "leave_alloc"),
    )
    assert probe(events).read_bytes() == 0


def test_a_function_that_was_entered_and_never_left_is_an_error():
    with pytest.raises(HarnessError, match="thread 1 entered alloc and did not return"):
        probe(on_thread(1, "enter_alloc")).read_bytes()


# Defining the events


@pytest.fixture
def control(tmp_path, monkeypatch):
    """A kprobe_events file that takes definitions on `known` functions only."""
    (tmp_path / "kprobe_events").write_text("")
    known, taken = set(), []

    def write(path, text, *, append=False):
        assert path == tmp_path / "kprobe_events"
        assert append, "other people's events stay"
        function = text.split()[1] if " " in text else None
        if function and function not in known:
            raise HostError(f"{path}: writing {text.strip()!r}: No such file or directory")
        taken.append(text.strip())

    monkeypatch.setattr(kprobes, "TRACEFS", tmp_path)
    monkeypatch.setattr(kprobes, "write", write)
    return known, taken


class RecordingTrace:
    def __init__(self, events):
        self.events = events

    def __enter__(self):
        self.events.append("armed")

    def __exit__(self, *error):
        self.events.append("disarmed")

    def enable(self, event):
        self.events.append(f"+{event.partition('/')[2]}")


COMMON = {"svm_allocate_nested", "svm_free_nested"}


@pytest.mark.parametrize(
    ("alloc", "free"),
    [
        ("__alloc_pages_nodemask", "__free_pages"),
        ("__alloc_pages", "__free_pages"),
        ("__alloc_pages_noprof", "__free_pages"),
        ("__alloc_frozen_pages_noprof", "___free_pages"),
    ],
)
def test_the_allocators_functions_are_those_that_the_kernel_has(control, alloc, free):
    known, taken = control
    known |= {*COMMON, alloc, free}
    events = []
    counter = FunctionProbe(_trace=RecordingTrace(events))
    with counter:
        group = f"nsvm_{os.getpid()}"
        assert f"p:{group}/page_alloc {alloc} order=%si:u32" in taken
        assert f"r:{group}/page_alloced {alloc} page=$retval:x64" in taken
        assert f"p:{group}/page_free {free} order=%si:u32" in taken
        assert len(events) == 1 + len(taken) == 8
        defined = [line.split()[0].partition(":")[2] for line in taken]
    removed = [line.removeprefix("-:") for line in taken if line.startswith("-:")]
    assert removed == defined
    assert events[-1] == "disarmed"


@pytest.mark.parametrize("missing", ["svm_free_nested", "__alloc_pages"])
def test_a_kernel_without_one_of_them_is_named_and_all_is_undone(control, missing):
    known, taken = control
    known |= {*COMMON, "__alloc_pages", "__free_pages"} - {missing}
    events = []
    with (
        pytest.raises(HostError, match=f"no function event on .*{missing}"),
        FunctionProbe(_trace=RecordingTrace(events)),
    ):
        pass
    defined = [line.split()[0].partition(":")[2] for line in taken if line[0] in "pr"]
    assert [line[2:] for line in taken if line.startswith("-:")] == defined
    assert events == ["armed", "disarmed"]


def test_a_kernel_without_kprobes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kprobes, "TRACEFS", tmp_path)
    with (
        pytest.raises(HostError, match="no kprobe events"),
        FunctionProbe(_trace=RecordingTrace([])),
    ):
        pass
