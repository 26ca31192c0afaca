"""Reading a trace: events, fields, and whose stack is whose."""

import os

import pytest
import records

from harness.errors import HarnessError, HostError
from harness.probe import tracefs
from harness.probe.tracefs import TraceEvent, TraceInstance, parse

kernels = pytest.mark.parametrize("kernel", records.KERNELS)


@kernels
def test_every_event_is_read_with_its_thread_and_its_stack(kernel):
    events = parse(records.pages(kernel))
    assert [event.name for event in events] == ["mm_page_alloc"] * 5 + ["mm_page_free"] * 2
    assert {event.tid for event in events} == {records.TIDS[kernel]}
    assert [event.fields["order"] for event in events] == ["0", "0", "0", "0", "1", "1", "0"]
    for event in events:
        assert event.stack[0] == f"trace_event_raw_event_{event.name}"
        assert len(event.stack) > 4


@kernels
def test_the_blocks_of_nested_state_are_seen_to_go_again(kernel):
    *_, page, permissions, freed_permissions, freed_page = parse(records.pages(kernel))
    assert page.fields["pfn"] == freed_page.fields["pfn"]
    assert permissions.fields["pfn"] == freed_permissions.fields["pfn"]
    assert "svm_allocate_nested" in page.stack
    assert "svm_free_nested" in freed_page.stack


@kernels
def test_function_events_are_read_with_their_fields(kernel):
    events = parse(records.functions(kernel))
    named = {event.name: event for event in events}
    assert set(named) == {
        *("enter_alloc", "leave_alloc", "enter_free", "leave_free"),
        *("page_alloc", "page_alloced", "page_free"),
    }
    assert [event.fields["order"] for event in events if event.name == "page_free"] == ["1", "0"]
    assert int(named["page_alloced"].fields["page"], 0) > 0


def test_a_frame_that_cannot_be_unwound_is_kept_as_it_is():
    events = parse(records.pages("5.10-kretprobe"))
    assert len(events) == 4
    for event in events:
        assert event.stack[-1] == "[unknown/kretprobe'd]"


# Several CPUs write one trace: their lines come in turns, in any order.

INTERLEAVED = """\
            init-68      [000] ....     7.1: mm_page_alloc: page=1 pfn=1 order=0
   kworker/1:0-17        [001] d..1.    7.2: mm_page_alloc: page=2 pfn=2 order=1
            init-68      [000] ....     7.3: <stack trace>
 => first
 => kvm_vcpu_ioctl
   kworker/1:0-17        [001] d..1.    7.4: <stack trace>
 => second
            init-68      [001] ....     7.5: mm_page_free: page=1 pfn=1 order=0
   kworker/1:0-17        [001] d..1.    7.6: mm_page_free: page=2 pfn=2 order=1
            init-68      [001] ....     7.7: <stack trace>
 => third
"""


def test_a_stack_belongs_to_the_last_event_of_its_thread_on_its_cpu():
    assert parse(INTERLEAVED) == [
        TraceEvent(68, "mm_page_alloc", {"page": "1", "pfn": "1", "order": "0"},
                   ("first", "kvm_vcpu_ioctl")),
        TraceEvent(17, "mm_page_alloc", {"page": "2", "pfn": "2", "order": "1"}, ("second",)),
        TraceEvent(68, "mm_page_free", {"page": "1", "pfn": "1", "order": "0"}, ("third",)),
        TraceEvent(17, "mm_page_free", {"page": "2", "pfn": "2", "order": "1"}),
    ]  # fmt: skip


NESTED = """\
            init-68      [000] d....    7.1: mm_page_alloc: pfn=1 order=0
            init-68      [000] d.h1.    7.2: mm_page_alloc: pfn=2 order=1
            init-68      [000] d.h1.    7.3: <stack trace>
 => of_the_interrupt
            init-68      [000] d....    7.4: <stack trace>
 => svm_allocate_nested
 => kvm_vcpu_ioctl
"""


def test_an_interrupt_between_an_event_and_its_stack_takes_neither():
    stacks = {event.fields["pfn"]: event.stack for event in parse(NESTED)}
    assert stacks == {"1": ("svm_allocate_nested", "kvm_vcpu_ioctl"), "2": ("of_the_interrupt",)}


@pytest.mark.parametrize(
    ("line", "tid"),
    [
        ("  qemu-system-x86-1234    [003] ....   12.5: sys: a=1", 1234),
        ("           <...>-99       [010] d.h2.  12.5: sys: a=1", 99),
        ("  CPU 0/KVM-7-5   [000] .N...  12.5: sys: a=1", 5),
        ("          <idle>-0        [127] dNs3.  1234567.000001: sys: a=1", 0),
    ],
)
def test_names_of_threads_may_be_anything(line, tid):
    assert parse(line) == [TraceEvent(tid, "sys", {"a": "1"})]


def test_a_stack_of_an_event_read_before_is_nobodys():
    text = "            init-68      [000] ....     7.3: <stack trace>\n => first\n"
    after = "            init-68      [000] ....     7.4: sys: a=1\n"
    assert parse(text + after) == [TraceEvent(68, "sys", {"a": "1"})]


@pytest.mark.parametrize("text", ["", "\n", "CPU:1 [LOST 5 EVENTS]\n", "# tracer: nop\n#\n"])
def test_what_is_no_event_is_none(text):
    assert parse(text) == []


# The instance, on a directory that looks like tracefs


@pytest.fixture
def fake_tracefs(tmp_path, monkeypatch):
    """A tracefs of plain files: an instance has its control files as soon as it is made."""
    (tmp_path / "instances").mkdir()
    (tmp_path / "kprobe_events").write_text("")
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path)
    return tmp_path


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HostError, match=r"/tracing_on: writing '1': No such file or directory"):
        tracefs.write(tmp_path / "tracing_on", "1\n")


def test_without_tracefs_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path / "missing")
    with (
        pytest.raises(HostError, match=r"tracefs is not available at .*missing"),
        TraceInstance("x"),
    ):
        pass


def test_lost_events_are_an_error(fake_tracefs):
    instance = TraceInstance("x")
    stats = instance.path / "per_cpu" / "cpu0" / "stats"
    stats.parent.mkdir(parents=True)
    for lost in (0, 12):
        stats.write_text(f"entries: 1\noverrun: {lost}\ncommit overrun: 0\n")
        if lost:
            with pytest.raises(HarnessError, match="buffer too small: 12 events lost"):
                instance._check_overruns()
        else:
            instance._check_overruns()


def test_leftovers_of_the_dead_are_removed_and_of_the_living_not(fake_tracefs, monkeypatch):
    with open("/proc/sys/kernel/pid_max") as file:
        dead = int(file.read()) + 1
    for name in (f"nsvm-x-{dead}", f"nsvm-x-{os.getpid()}", f"theirs-{dead}"):
        (fake_tracefs / "instances" / name).mkdir()
    (fake_tracefs / "kprobe_events").write_text(
        f"p:nsvm_{dead}/enter svm_x\nr4:nsvm_{dead}/leave svm_x\n"
        f"p:nsvm_{os.getpid()}/enter svm_x\np:theirs/x y\n"
    )
    written = []
    monkeypatch.setattr(
        tracefs,
        "write",
        lambda path, text, append=False: written.append((path.name, text.strip(), append)),
    )
    tracefs.remove_leftovers()
    assert {path.name for path in (fake_tracefs / "instances").iterdir()} == {
        f"nsvm-x-{os.getpid()}",
        f"theirs-{dead}",
    }
    assert written == [
        ("enable", "0", False),
        ("kprobe_events", f"-:nsvm_{dead}/enter", True),
        ("kprobe_events", f"-:nsvm_{dead}/leave", True),
    ]
