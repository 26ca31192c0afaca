"""The ioctl benchmarks on this machine's KVM: both sides do the same work. No times here."""

import base64

import pytest

from harness.bench.inside import CSide, run_ioctl_benchmarks
from harness.bench.loops import IOCTL_BENCHMARKS, PARTS, refused_parts
from harness.bench.native import executable
from harness.errors import HostError
from harness.host.local import LocalHost
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.linux_kvm import KVM_API_VERSION

pytestmark = pytest.mark.kvm

NAMES = [benchmark.name for benchmark in IOCTL_BENCHMARKS]
COUNT = 3


@pytest.fixture(scope="module")
def program():
    return executable("ioctl_loops").read_bytes()


def test_both_sides_do_the_same_work_on_a_host(kvm, program):
    emitted = []
    with LocalHost() as host:
        result = host.start().call(
            "harness.bench.inside:run_ioctl_benchmarks",
            timeout_s=100,
            on_event=lambda event: emitted.append(event) if event["event"] == "emit" else None,
            executable=base64.b64encode(program).decode(),
            names=NAMES,
            repeat=2,
            sample_s=0.001,
            count=COUNT,
        )
    result.unwrap("the ioctl benchmarks")
    pairs = [event["data"] for event in emitted if event["kind"] == "pair"]
    skipped = {event["data"]["name"] for event in emitted if event["kind"] == "skipped"}
    assert [pair["name"] for pair in pairs] == [n for n in NAMES if n not in skipped for _ in "ab"]
    for pair in pairs:
        ours, theirs = pair["ours"], pair["theirs"]
        assert ours["done"] == theirs["done"] == pair["count"] == COUNT
        assert ours["witness"] == theirs["witness"]
        assert ours["seconds"] > 0
        assert theirs["seconds"] > 0
    witness = {pair["name"]: pair["ours"]["witness"] for pair in pairs}
    # What the kernel must have said, whoever asks.
    assert witness["api_version"] == COUNT * KVM_API_VERSION
    assert witness["check_extension"] == COUNT * kvm.check_extension(Cap.KVM_CAP_NR_MEMSLOTS)
    assert witness["run_exit"] == witness["run_machine"] == COUNT
    assert witness["create_vm"] == 0
    assert witness["create_vcpu"] == COUNT


@pytest.fixture
def c_side(kvm, program):
    with CSide(program) as started:
        yield started


@pytest.mark.parametrize("part", list(PARTS))
def test_each_part_of_the_state_is_the_same_in_c_or_refused_in_both(kvm, c_side, part):
    get = next(benchmark for benchmark in IOCTL_BENCHMARKS if benchmark.name == "get_regs")
    if part in refused_parts(kvm):
        with pytest.raises(HostError, match="KVM_"):
            c_side.run("set_state", 1, (part,))
        return
    ours = get.run(kvm, 2, (part,))
    theirs = c_side.run("get_state", 2, (part,))
    assert ours.same_as(theirs)
    assert ours.witness > 0


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (("no_such_loop", 1), "no loop is called no_such_loop"),
        (("get_state", 1, ("regs", "cr9")), "no part of the state is called cr9"),
        (("create_vcpu", 100_000), "too many"),
    ],
)
def test_the_c_side_says_no_and_goes_on(c_side, request_, why):
    with pytest.raises(HostError, match=why):
        c_side.run(*request_)
    assert c_side.run("api_version", 2).witness == 2 * KVM_API_VERSION


def test_only_the_named_benchmarks_run(kvm, program):
    emitted = []
    run_ioctl_benchmarks(
        lambda kind, **data: emitted.append((kind, data["name"])),
        base64.b64encode(program).decode(),
        ["get_regs"],
        repeat=1,
        sample_s=0.001,
        count=1,
    )
    assert emitted == [("pair", "get_regs")]
