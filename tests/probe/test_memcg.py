"""The memory controller: which hierarchy, which cgroup, which counter."""

import mmap
import os
from pathlib import Path

import pytest

from harness.errors import HostError
from harness.probe import memcg
from harness.probe.memcg import Cgroup, MemcgProbe, mount_point

V1 = "cgroup {root}/v1/memory cgroup rw,nosuid,memory 0 0"
V1_OTHER = "cgroup {root}/v1/cpu cgroup rw,cpu,cpuacct 0 0"
V2 = "cgroup2 {root}/v2 cgroup2 rw,nosuid,nsdelegate 0 0"
OTHERS = "proc /proc proc rw 0 0\ntmpfs /memory tmpfs rw,memory 0 0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Say what /proc holds; `{root}` is a directory of the test's own."""
    (tmp_path / "v1/memory").mkdir(parents=True)
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2/cgroup.controllers").write_text("cpu memory pids\n")

    def say(mounts, cgroup="0::/"):
        files = {"/proc/self/mounts": mounts, "/proc/self/cgroup": cgroup}
        for name, text in files.items():
            (tmp_path / Path(name).name).write_text(text.format(root=tmp_path) + "\n")

        def place(*parts):
            return Path(tmp_path / Path(*parts).name if parts[0] in files else Path(*parts))

        monkeypatch.setattr(memcg, "Path", place)
        return tmp_path

    return say


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ((OTHERS, V2), ("v2", 2)),
        ((OTHERS, V1_OTHER, V1), ("v1/memory", 1)),
        # Hybrid: the controller is in one of the two only.
        ((V2, V1_OTHER, V1), ("v1/memory", 1)),
        ((V1_OTHER, V2), ("v2", 2)),
    ],
)
def test_the_controllers_hierarchy_is_found(machine, mounts, expected):
    root = machine("\n".join(mounts))
    assert mount_point() == (root / expected[0], expected[1])


@pytest.mark.parametrize("mounts", [(OTHERS,), (OTHERS, V1_OTHER)])
def test_without_a_controller_there_is_one_clear_line(machine, mounts):
    machine("\n".join(mounts))
    with pytest.raises(HostError, match="no cgroup memory controller is mounted"):
        mount_point()


def test_a_v2_hierarchy_without_the_controller_is_none(machine):
    root = machine(V2)
    (root / "v2/cgroup.controllers").write_text("cpu pids\n")
    with pytest.raises(HostError, match="no cgroup memory controller"):
        mount_point()


@pytest.mark.parametrize(
    ("version", "text", "path"),
    [
        (2, "0::/user.slice/a:b", "/user.slice/a:b"),
        (2, "1:name=systemd:/x\n0::/y", "/y"),
        (1, "5:cpu,cpuacct:/c\n4:memory:/m\n0::/u", "/m"),
        (1, "4:hugetlb,memory:/m", "/m"),
    ],
)
def test_the_processes_own_cgroup_is_the_hierarchys(machine, version, text, path):
    machine(V2, text)
    assert memcg._own_cgroup(version) == path


def test_a_process_that_is_in_no_memory_cgroup_is_named(machine):
    machine(V1, "5:cpu:/c\n0::/u")
    with pytest.raises(HostError, match="does not name a memory cgroup"):
        memcg._own_cgroup(1)


# A cgroup, on directories that look like the controller's


def test_a_cgroup_that_cannot_be_made_is_one_line(machine):
    root = machine(V2, "0::/")
    cgroup = Cgroup()
    cgroup.path.write_text("in the way")
    with pytest.raises(HostError, match=r"cgroup .*File exists \(root needed\)"), cgroup:
        pass
    assert (root / "v2").exists()


def test_leftovers_of_the_dead_are_removed_and_of_the_living_not(machine):
    root = machine(V2) / "v2"
    with open("/proc/sys/kernel/pid_max") as file:
        dead = int(file.read()) + 1
    for name in (f"nsvm-mem-{dead}", f"nsvm-mem-{os.getpid()}", f"theirs-{dead}"):
        (root / name).mkdir()
    memcg.remove_leftovers(root)
    assert {path.name for path in root.iterdir() if path.is_dir()} == {
        f"nsvm-mem-{os.getpid()}",
        f"theirs-{dead}",
    }


class FakeCgroup:
    def __init__(self, version, stat):
        self.version = version
        self._stat = stat

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def stat(self):
        return self._stat

    def value(self, name):
        return {"memory.kmem.usage_in_bytes": 111, "memory.current": 1000}[name]


@pytest.mark.parametrize(
    ("version", "stat", "source", "held", "pages_off"),
    [
        (1, {"rss": 5}, "memory.kmem.usage_in_bytes", 111, 2),
        (2, {"anon": 1, "file": 2, "kernel": 77}, "memory.stat", 77, 2),
        (2, {"anon": 100, "file": 23}, "memory.current", 900, 4),
    ],
)
def test_the_counter_is_the_most_exact_that_the_kernel_has(
    machine, monkeypatch, version, stat, source, held, pages_off
):
    machine(V2)
    for name, answer in {"own_all_pages": None, "disown_pages": None, "_user_bytes": 100}.items():
        monkeypatch.setattr(memcg, name, lambda answer=answer: answer)
    monkeypatch.setattr(MemcgProbe, "_churn", lambda self: None)
    monkeypatch.setattr(MemcgProbe, "_drain", lambda self: None)
    probe = MemcgProbe()
    probe.cgroup = FakeCgroup(version, stat)
    with probe:
        assert probe.source == source
        assert probe.read_bytes() == held
        assert probe.resolution_bytes() == pages_off * 4096


def test_this_processes_own_memory_is_what_the_kernel_says_is_mapped():
    before = memcg._user_bytes()
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for offset in range(0, 1 << 20, mmap.PAGESIZE):
            pages[offset] = 1
        grown = memcg._user_bytes() - before
    assert 1 << 20 <= grown < 2 << 20
