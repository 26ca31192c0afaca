"""The cache: entries appear whole or not at all, once, and a failure is one line."""

import errno
import multiprocessing
import os
import time

import pytest

from harness.errors import HarnessError, HostError
from harness.host import cache
from harness.host.cache import build_dir, build_file, cache_dir, locked


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(root):
    """Return all entries, but for the lock files, which stay."""
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.parent.name != "locks"
    )


def write_text(text):
    return lambda path: path.write_text(text)


def fill_with(text):
    return lambda tree: (tree / "file").write_text(text)


MAKERS = [(build_file, write_text), (build_dir, fill_with)]
makers = pytest.mark.parametrize(("build", "writer"), MAKERS, ids=["file", "dir"])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NSVM_CACHE": "a", "XDG_CACHE_HOME": "b", "HOME": "c"}, "a"),
        ({"XDG_CACHE_HOME": "b", "HOME": "c"}, "b/nsvm"),
        ({"XDG_CACHE_HOME": "", "HOME": "c"}, "c/.cache/nsvm"),
        ({"HOME": "c"}, "c/.cache/nsvm"),
    ],
)
def test_the_user_says_where_it_is(tmp_path, monkeypatch, variables, expected):
    for name in ("NSVM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache_dir() == tmp_path / expected
    assert cache_dir().is_dir()


@makers
def test_an_entry_is_built_once(root, build, writer):
    place = root / "sub" / "entry"
    assert build(place, writer("first")) == place
    assert build(place, writer("second")) == place
    found = place if place.is_file() else place / "file"
    assert found.read_text() == "first"


@makers
def test_an_entry_is_not_there_before_it_is_whole(root, build, writer):
    place = root / "entry"

    def write(temporary):
        writer("whole")(temporary)
        assert not place.exists()
        assert temporary.parent == place.parent, "a rename must not cross file systems"

    build(place, write)
    assert place.exists()


@makers
@pytest.mark.parametrize(
    ("error", "seen", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), HostError, "No space left on device"),
        (OSError("without a number"), HostError, "without a number"),
        (HarnessError("not its fault"), HarnessError, "^not its fault$"),
        (KeyboardInterrupt("^C"), KeyboardInterrupt, "C"),
    ],
)
def test_a_failure_leaves_nothing_behind(root, build, writer, error, seen, text):
    def write(temporary):
        writer("half")(temporary)
        raise error

    with pytest.raises(seen, match=text) as caught:
        build(root / "entry", write)
    if seen is HostError:
        assert str(caught.value).startswith(f"cannot write {root / 'entry'}: ")
    assert "\n" not in str(caught.value)
    assert leftovers(root) == ["locks"]
    # Nor is it locked.
    assert build(root / "entry", writer("again")).exists()


@makers
def test_a_parent_that_cannot_be_made_is_one_line(root, build, writer):
    cache_dir()
    (root / "file").write_text("in the way")
    with pytest.raises(HostError, match=r"cannot write .*: (Not a directory|File exists)"):
        build(root / "file" / "sub" / "entry", writer("x"))


@makers
def test_locks_that_cannot_be_made_are_one_line(root, build, writer):
    cache_dir()
    (root / "locks").write_text("in the way")
    with pytest.raises(HostError, match=r"lock .*: (Not a directory|File exists)"):
        build(root / "entry", writer("x"))


@makers
def test_what_a_killed_process_left_is_not_in_the_way(root, build, writer):
    left = root / f".entry.{os.getpid()}"
    (left if build is build_dir else left.parent).mkdir(parents=True)
    writer("left")(left)
    assert build(root / "entry", writer("new")).exists()
    assert not left.exists()


def test_a_cache_that_cannot_be_made_says_how_to_have_another(monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", "/dev/null/cache")
    with pytest.raises(HostError, match=r"/dev/null/cache: Not a directory \(set NSVM_CACHE\)"):
        cache_dir()


# Processes


def hold(name, ready, release):
    with locked(name):
        ready.set()
        release.wait(30)


def build_slowly(place, log):
    def write(temporary):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        temporary.write_text("x")

    build_file(place, write)


@pytest.fixture
def processes():
    context = multiprocessing.get_context("fork")
    started = []

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process

    yield context, start
    for process in started:
        process.kill()
        process.join()


def test_two_processes_do_not_build_the_same_entry(root, tmp_path, processes):
    _, start = processes
    log = tmp_path / "log"
    cache_dir()
    both = [start(build_slowly, root / "entry", log) for _ in range(2)]
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 1


def test_a_lock_that_another_holds_is_waited_for_but_not_for_ever(processes):
    context, start = processes
    ready, release = context.Event(), context.Event()
    holder = start(hold, "x", ready, release)
    assert ready.wait(30)
    with pytest.raises(HostError, match=r"waited 0 s for the lock .*/locks/x"), locked("x", 0.1):
        pass
    with locked("y", 0.1):
        pass
    release.set()
    with locked("x", 30):
        pass
    holder.join(30)


def test_a_lock_ends_with_its_process(processes):
    context, start = processes
    ready = context.Event()
    holder = start(hold, "x", ready, context.Event())
    assert ready.wait(30)
    holder.kill()
    with locked("x", 30):
        pass


def test_an_entry_that_came_while_waiting_is_taken(root, monkeypatch):
    """Somebody else built it between the first look and the lock."""
    place = root / "entry"
    real = cache.locked

    def locked_late(name):
        place.parent.mkdir(exist_ok=True)
        place.write_text("theirs")
        return real(name)

    monkeypatch.setattr(cache, "locked", locked_late)
    assert build_file(place, write_text("ours")).read_text() == "theirs"
