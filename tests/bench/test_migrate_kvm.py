"""The migration benchmarks on this machine's KVM: both sides move the same. No times here."""

import base64
import json
import struct

import pytest

from harness.bench import migrate_links
from harness.bench.inside import CSide
from harness.bench.migrate_links import LINKS
from harness.bench.migrate_load import PlainLoad, Size, witness_of
from harness.bench.migrate_loops import (
    DOWNTIME_NAMES,
    FEW,
    MIGRATE_NAMES,
    ROUND_NAMES,
    Bench,
    run_migrate_benchmarks,
)
from harness.bench.native import executable
from harness.errors import HarnessError, HostError
from harness.facts import HostView, nested_svm
from harness.host.local import LocalHost
from harness.machine.memory import PAGE_SIZE
from harness.migrate.errors import LinkLost
from harness.migrate.live import PARTS
from harness.migrate.shape import backings_of

pytestmark = pytest.mark.kvm

TINY = Size(memory_mib=32, dirty_pages=5)
FILLED = (32 - 1) * 256 // 2
RESTS = range(5, 5 + 17)
"""With page tables, which some CPUs write to."""
FIGURES = {"pages", "size_bytes", "round_ns", "rest_pages", "downtime_ns", "parts_ns", "held_ns"}


@pytest.fixture(scope="module")
def program():
    return executable("migrate_loops").read_bytes()


@pytest.fixture
def c_side(kvm, program):
    with CSide(program, "migrate_loops") as started:
        yield started


@pytest.fixture
def bench(kvm, c_side):
    load = PlainLoad(kvm, TINY)
    with load.machine:
        yield Bench(load, c_side, kvm, TINY)


@pytest.mark.parametrize("link", LINKS)
def test_c_moves_a_machine_and_says_so_in_json(c_side, link):
    for _ in range(2):  # the source is used again
        said = json.loads(c_side.ask("migrate", f"migrate {link} 32 5 2"))
        assert set(said) == FIGURES
        assert FILLED <= said["pages"] <= FILLED + 16
        assert said["size_bytes"] > said["pages"] * PAGE_SIZE
        assert said["rest_pages"] in RESTS
        assert said["round_ns"] > 0
        assert list(said["parts_ns"]) == list(PARTS)
        assert sum(said["parts_ns"].values()) == said["downtime_ns"] > 0
        assert said["held_ns"] > 0


def test_c_takes_and_puts_state(c_side):
    said = json.loads(c_side.ask("state", "state 3"))
    assert said["done"] == 3
    assert said["size_bytes"] > 4096
    assert said["ns"] > 0


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ("migrate pigeon 32 5 2", "no link is called pigeon"),
        ("migrate tcp 0 5 2", "0 MiB are no machine for this"),
        ("migrate tcp 32 100000 2", "100000 pages are more than there are"),
        ("migrate tcp 32 5", "a request is"),
        ("state", "a request is"),
    ],
)
def test_c_says_no_and_goes_on(c_side, request_, why):
    with pytest.raises(HostError, match=why):
        c_side.ask("it", request_)
    assert json.loads(c_side.ask("state", "state 1"))["done"] == 1


@pytest.mark.parametrize("link", LINKS)
def test_both_sides_send_the_same_pages_again_and_again(bench, link):
    for c_first in (True, False):
        c, python = bench.compare(link, c_first=c_first)
        assert abs(c.pages - python.pages) <= 16
        assert c.rest_pages in RESTS
        assert python.rest_pages in RESTS
        # Within a process pages are no part of the stream, so that no headers come with them.
        beside_pages = python.size_bytes - python.pages * PAGE_SIZE
        assert beside_pages == 0 if link == "same_process" else beside_pages > 0
        assert min(python.round_s, python.downtime_s, c.round_s, c.downtime_s) > 0
        for side in (c, python):
            assert list(side.parts_s) == list(PARTS)
            assert sum(side.parts_s.values()) == pytest.approx(side.downtime_s)
            assert side.held_s > 0


@pytest.mark.parametrize(
    ("stride", "pages"), [(2, [256, 258, 260, 262, 264]), (1, [*range(256, 261)])]
)
def test_the_guest_dirties_its_pages_and_no_others(kvm, stride, pages):
    load = PlainLoad(kvm, Size(32, 5, stride))
    with load.machine:
        expect_dirtied(load, pages)


def expect_dirtied(load, pages):
    machine = load.machine
    before, [backing] = backings_of(machine)[0][:], backings_of(machine)
    load.dirty()
    changed = [
        at // PAGE_SIZE
        for at in range(0, len(before), PAGE_SIZE)
        if backing[at : at + PAGE_SIZE] != before[at : at + PAGE_SIZE]
    ]
    assert [page for page in changed if page >= 256] == pages
    assert struct.unpack_from("<Q", backing, 1 << 20)[0] == 256 + 2


def test_other_memory_at_the_destination_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(migrate_links, "witness_of", lambda machine: witness_of(machine) + 1)
    with pytest.raises(HarnessError, match="threads: the destination has other memory"):
        bench.in_python("threads")


def test_a_destination_process_that_fails_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(migrate_links.sys, "executable", "/bin/false")
    with pytest.raises(LinkLost):
        bench.in_python("tcp")
    bench.load.dirty()  # the machine goes on


def test_all_of_it_on_a_host(kvm, program):
    emitted = []
    with LocalHost() as host:
        result = host.start().call(
            "harness.bench.migrate_loops:run_migrate_benchmarks",
            timeout_s=100,
            on_event=lambda event: emitted.append(event) if event["event"] == "emit" else None,
            executable=base64.b64encode(program).decode(),
            names=list(MIGRATE_NAMES),
            repeat=1,
            sample_s=0.001,
            count=2,
            memory_mib=64,
        )
    result.unwrap("the migration benchmarks")
    pairs = {event["data"]["name"]: event["data"] for event in emitted if event["kind"] == "pair"}
    skipped = {event["data"]["name"] for event in emitted if event["kind"] == "skipped"}
    assert {*pairs, *skipped} == set(MIGRATE_NAMES)
    assert {*ROUND_NAMES, *DOWNTIME_NAMES, "state_l1"} <= set(pairs)
    if nested_svm(HostView()).holds:
        return
    assert {"state_l2", "state_l3"} <= skipped
    assert f"a plain VM, 64 MiB half in use, {FEW} pages left" in pairs[ROUND_NAMES[0]]["note"]
    for name in DOWNTIME_NAMES:
        for side in ("ours", "theirs"):
            assert list(pairs[name][side]["parts_s"]) == [*PARTS, "held before"]
    for name in ROUND_NAMES:
        assert pairs[name]["unit"] == "MiB"
        assert pairs[name]["count"] == pairs[name]["ours"]["done"] >> 20


def test_only_the_named_ones_run(kvm, program):
    emitted = []
    name = f"migrate_downtime_threads_{FEW}"
    run_migrate_benchmarks(
        lambda kind, **data: emitted.append((kind, data["name"])),
        base64.b64encode(program).decode(),
        [name],
        repeat=1,
        sample_s=0.001,
        memory_mib=32,
    )
    assert emitted == [("pair", name)]
