"""The initrd: a newc archive that others can read, the same every time."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HostError
from harness.host import initrd
from harness.host.cache import cache_dir
from harness.host.initrd import Entry, Module, cpio

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30)
trees = st.lists(st.builds(Entry, names, st.just(stat.S_IFREG | 0o644), st.binary(max_size=50)))


def parse(archive):
    """Yield (name, header fields, data); by the format's description, not by the writer's code.

    Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    before = ["ino", "mode", "uid", "gid", "nlink", "mtime", "filesize"]
    fields = [*before, "devmajor", "devminor", "rdevmajor", "rdevminor", "namesize", "check"]
    place = 0
    while True:
        assert place % 4 == 0
        assert archive[place : place + 6] == b"070701"
        header = {
            name: int(archive[place + 6 + 8 * n : place + 14 + 8 * n], 16)
            for n, name in enumerate(fields)
        }
        end = place + 110 + header["namesize"]
        name = archive[place + 110 : end]
        assert name.endswith(b"\0")
        start = (end + 3) & ~3
        data = archive[start : start + header["filesize"]]
        assert len(data) == header["filesize"]
        if name == b"TRAILER!!!\0":
            assert archive[start:].strip(b"\0") == b""
            return
        yield name[:-1].decode(), header, data
        place = (start + header["filesize"] + 3) & ~3


def joined(entries):
    return b"".join(cpio(entries))


@given(trees)
def test_an_archive_reads_as_what_went_in(entries):
    found = list(parse(joined(entries)))
    assert [(name, head["mode"], data) for name, head, data in found] == [
        (entry.name, entry.mode, entry.data) for entry in entries
    ]
    # The kernel takes equal numbers for hard links.
    assert len({head["ino"] for _, head, _ in found}) == len(entries)


def test_an_archive_is_the_same_every_time():
    entries = [Entry("d", stat.S_IFDIR | 0o755), Entry("d/f", stat.S_IFREG | 0o600, b"abc")]
    assert joined(entries) == joined(entries)
    assert all(head["mtime"] == 0 for _, head, _ in parse(joined(entries)))


def readers():
    """Commands that read archives on this machine: its cpio, and busybox, which hosts have."""
    busybox = shutil.which("busybox")
    cached = sorted(map(str, (cache_dir() / "userland").glob("*/bin/busybox")))
    boxes = [busybox] if busybox else cached[:1]
    cpio = shutil.which("cpio")
    return [*([[cpio]] if cpio else []), *([box, "cpio"] for box in boxes)]


def test_others_unpack_it(tmp_path):
    entries = [
        Entry("d", stat.S_IFDIR | 0o755),
        Entry("d/f", stat.S_IFREG | 0o755, b"abc"),
        Entry("l", stat.S_IFLNK | 0o777, b"d/f"),
    ]
    if not readers():
        pytest.skip("neither cpio nor busybox on this machine")
    for number, command in enumerate(readers()):
        where = tmp_path / str(number)
        where.mkdir()
        done = subprocess.run(
            [*command, "-i"], input=joined(entries), cwd=where, capture_output=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        assert (where / "l").read_bytes() == b"abc"
        assert (where / "d/f").stat().st_mode == stat.S_IFREG | 0o755


def test_walking_a_tree_keeps_links_modes_and_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/run").write_text("x")
    (tmp_path / "b/run").chmod(0o750)
    (tmp_path / "a").symlink_to("b/run")
    assert list(initrd.walk(tmp_path, "top")) == [
        Entry("top", stat.S_IFDIR | 0o755),
        Entry("top/a", stat.S_IFLNK | 0o777, b"b/run"),
        Entry("top/b", stat.S_IFDIR | 0o755),
        Entry("top/b/run", stat.S_IFREG | 0o750, b"x"),
    ]


LIBRARIES = "libc.so.6 libm.so.6 libz.so.1 libexpat.so.1 libffi.so.8 libpthread.so.0 libdl.so.2"


@pytest.fixture
def userland(tmp_path, monkeypatch):
    """A forged userland with all that is looked for; nothing in it runs."""
    root = tmp_path / "userland"
    for name in ("usr/bin/python3.11", "lib64/ld-linux-x86-64.so.2"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    (root / "lib/x86_64-linux-gnu").mkdir(parents=True)
    for library in [*LIBRARIES.split(), "libutil.so.1"]:
        (root / "lib/x86_64-linux-gnu" / library).write_text(library)
    library = root / initrd.STDLIB
    (library / "lib-dynload").mkdir(parents=True)
    for name in ("json.py", "lib-dynload/_json.so", "lib-dynload/_ssl.cpython-311.so"):
        (library / name).write_text(name)
    (library / "unittest").mkdir()
    (library / "unittest/case.py").write_text("")
    monkeypatch.setattr(initrd, "compile_tree", lambda *arguments: None)
    return root


def entries_by_name(userland, tmp_path, modules=()):
    agent = tmp_path / "agent"
    agent.mkdir()
    (agent / "agent.pyc").write_text("agent")
    return {e.name: e for e in initrd.entries(userland, agent, list(modules))}


def test_parents_come_before_children(userland, tmp_path):
    seen = set()
    for name in entries_by_name(userland, tmp_path, [Module("kvm", b"k")]):
        parent = name.rpartition("/")[0]
        assert not parent or parent in seen, name
        seen.add(name)


def test_modules_are_listed_in_the_order_of_insertion(userland, tmp_path):
    modules = [Module("kvm", b"k"), Module("kvm_amd", b"a", "nested=1")]
    found = entries_by_name(userland, tmp_path, modules)
    assert found["modules/order.json"].data == (
        b'[{"name": "kvm", "options": ""}, {"name": "kvm_amd", "options": "nested=1"}]'
    )
    assert found["modules/kvm_amd.ko"].data == b"a"


def test_what_nothing_needs_stays_outside(userland, tmp_path):
    found = entries_by_name(userland, tmp_path)
    assert f"{initrd.STDLIB}/json.py" in found
    assert f"{initrd.STDLIB}/lib-dynload/_json.so" in found
    assert not [name for name in found if "unittest" in name or "_ssl" in name]
    assert found["init"].mode == stat.S_IFREG | 0o755
    assert found["nsvm/agent.pyc"].data == b"agent"


def test_a_userland_without_a_library_is_one_clear_line(userland, tmp_path):
    (userland / "lib/x86_64-linux-gnu/libffi.so.8").unlink()
    with pytest.raises(HostError, match=r"^the userland in \S+ has no libffi\.so\.8$"):
        entries_by_name(userland, tmp_path)


@pytest.fixture
def compile_here(tmp_path, monkeypatch):
    """Compile a module, with this machine's own interpreter in the place of the userland's."""
    (tmp_path / "userland").mkdir()
    (tmp_path / "userland/usr").symlink_to(sys.base_prefix)
    python = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    monkeypatch.setattr(initrd, "native_python", lambda userland: [python])

    def compile_tree(source):
        tree = tmp_path / "tree"
        tree.mkdir()
        (tree / "m.py").write_text(source)
        initrd.compile_tree(tmp_path / "userland", tree, "/installed")
        return tree

    return compile_tree


def test_code_that_does_not_compile_is_an_error(compile_here):
    with pytest.raises(HostError, match=r"compiling /installed for the host: (?s:.*)SyntaxError"):
        compile_here("def f(:\n")


def test_code_is_carried_compiled_whatever_the_users_python_is(compile_here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    tree = compile_here("def f():\n    'A docstring.'\n    assert False\n")
    assert [path.name for path in tree.iterdir()] == ["m.pyc"]
    # Scenarios are named by their docstrings: the user's own -OO must not reach this.
    assert b"A docstring." in (tree / "m.pyc").read_bytes()
    assert b"/installed/m.py" in (tree / "m.pyc").read_bytes()
