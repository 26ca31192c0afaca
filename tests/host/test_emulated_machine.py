"""The emulated host itself: cold and warm, with changed code, and after a call was broken off."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from harness.host import bundle, emulated, initrd_build
from harness.host.bundle import carried_sources, tree_root
from harness.host.emulated import EmulatedHost

pytestmark = pytest.mark.emulated

PING = "harness.inside:ping"


@contextmanager
def started(kernel):
    with EmulatedHost(kernel) as host:
        yield host, host.start()


def states(cache):
    """Return the saved states, by their kind, with the time they were made at."""
    return {
        path.name.rpartition(".")[0].rpartition("-")[2]: path.stat().st_mtime_ns
        for path in (cache / "warm").iterdir()
    }


def test_a_warm_start_gives_the_machine_that_was_booted_cold(kernel, private_cache):
    with started(kernel.kernel) as (host, session):
        assert not host.started_warm
        cold = session.hello()
        before = states(private_cache)
    assert set(before) == {"base", "ready"}
    for _ in range(2):
        with started(kernel.kernel) as (host, session):
            assert host.started_warm
            assert session.hello() == cold
            assert session.call(PING, timeout_s=60).outcome == "return"
    assert states(private_cache) == before
    assert cold["release"] == kernel.kernel.release
    assert cold["params"]["kvm_amd.nested"] == "1"
    assert cold["tainted"] & ~(1 << 12) == 0


def test_what_went_into_a_state_decides_whether_it_is_taken(
    one_kernel, private_cache, tmp_path, monkeypatch
):
    kernel = one_kernel.kernel
    with started(kernel) as (host, _):
        assert not host.started_warm
    before = states(private_cache)

    # The tree's own code: sent into the machine that was booted before.
    changed = tmp_path / "tree"
    for source in carried_sources(tree_root()):
        (changed / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree_root() / source, changed / source)
    inside = changed / "harness/inside.py"
    inside.write_text(inside.read_text() + "\n\ndef ping(emit):\n    return 'changed'\n")
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "tree_root", lambda: changed)
        with started(kernel) as (host, session):
            assert host.started_warm
            assert session.call(PING, timeout_s=60).value == "changed"
    after = states(private_cache)
    assert after["base"] == before["base"]
    assert after["ready"] != before["ready"]

    # A state that is damaged: found out, forgotten, made again.
    for path in (private_cache / "warm").glob("*-ready.*"):
        path.write_bytes(path.read_bytes()[:100_000])
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "tree_root", lambda: changed)
        with started(kernel) as (host, session):
            assert session.call(PING, timeout_s=60).value == "changed"

    # The agent: in the machine from its boot on.
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("agent.py", "init.py"):
        shutil.copyfile(Path(emulated.__file__).with_name(name), sources / name)
    agent = (sources / "agent.py").read_text()
    marked = agent.replace('"event": "hello",', '"event": "hello", "marked": True,')
    assert marked != agent
    (sources / "agent.py").write_text(marked)
    with monkeypatch.context() as patch:
        patch.setattr(initrd_build, "SOURCES", sources)
        with started(kernel) as (host, session):
            assert not host.started_warm
            assert session.hello()["marked"]

    # The kernel.
    with started(replace(kernel, key="another")) as (host, session):
        assert not host.started_warm
        assert "marked" not in session.hello()


# Breaking off what has borrowed something of the kernel


BORROWING = '''
import time
from harness.probe.memcg import Cgroup, mount_point
from harness.probe.tracefs import TRACEFS, kprobe_definitions
from harness.scenarios import scenario
from harness.scenarios.measure import MEMORY_PROBES

def borrowed():
    root, _ = mount_point()
    instances = [path.name for path in (TRACEFS / "instances").iterdir()]
    cgroups = [path.name for path in root.glob("nsvm-*")]
    return [*instances, *kprobe_definitions(), *cgroups]

@scenario(axes={"probe": tuple(MEMORY_PROBES)})
def test_borrows(context, probe):
    """A probe is armed."""
    context.enter(MEMORY_PROBES[probe]())
    context.note("borrowed", what_of=borrowed())
    while True:
        time.sleep(0.05)

@scenario()
def test_looks(context):
    """Nothing is armed."""
    context.note("borrowed", what_of=borrowed())

@scenario()
def test_tidies(context):
    """Arming gives back what dead processes had borrowed."""
    for probe in MEMORY_PROBES.values():
        with probe():
            pass
    context.note("borrowed", what_of=borrowed())
'''


class Borrower:
    """Runs these scenarios on one machine, one after the other."""

    def __init__(self, session):
        self.session = session

    def run(self, name, *, timeout_s=60, abort=False, **values):
        """Return how the call ended, and the last list of what is borrowed."""
        seen = []

        def on_event(event):
            if event["event"] == "emit":
                seen.append(event["data"]["what_of"])
                if abort:
                    self.session.abort()

        result = self.session.call(
            "harness.inside:run_case",
            timeout_s=timeout_s,
            on_event=on_event,
            module="borrowing.py",
            name=f"test_{name}",
            values=values,
            source=BORROWING,
        )
        assert seen, (result, result.output)
        return result, seen[-1]


@pytest.fixture(scope="module")
def borrower(kernel):
    with started(kernel.kernel) as (_, session):
        yield Borrower(session)


@pytest.mark.parametrize("probe", ["page_alloc", "functions", "memcg"])
def test_an_aborted_call_gives_everything_back(borrower, probe):
    result, borrowed = borrower.run("borrows", abort=True, probe=probe)
    assert result.error.get("type") == "SystemExit", result
    assert borrowed, "nothing was armed: this tests nothing"
    _, left = borrower.run("looks")
    assert left == []


def test_an_aborted_measurement_gives_everything_back(borrower):
    def on_event(event):
        if event["event"] == "emit" and event["kind"] == "reading":
            borrower.session.abort()

    result = borrower.session.call(
        "harness.inside:measure_nested_memory",
        timeout_s=200,
        on_event=on_event,
        **{"vcpus": 4, "vms": 1, "rounds": 100},
    )
    assert result.error.get("type") == "SystemExit", result
    _, left = borrower.run("looks")
    assert left == []


def test_what_a_killed_call_left_is_given_back_by_the_next_that_borrows(borrower):
    left = []
    for probe in ("page_alloc", "functions", "memcg"):
        result, _ = borrower.run("borrows", timeout_s=2, probe=probe)
        assert result.outcome == "timeout"
        _, left = borrower.run("looks")
    assert left, "the kill left nothing behind: this tests nothing"
    _, left = borrower.run("tidies")
    assert left == []
