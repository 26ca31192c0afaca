"""Programs that need a newer C library than this machine's run with their own."""

import subprocess
from pathlib import Path

import pytest

from harness.host import kbuild_tools
from harness.host.kbuild_tools import make_tools_run

NEWER = b"\x7fELF....\0GLIBC_2.34\0GLIBC_2.38\0"
OLDER = b"\x7fELF....\0GLIBC_2.34\0"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Return a tree of tools, with a loader that says what it is asked to load."""
    monkeypatch.setattr(kbuild_tools, "_own_version", lambda: 36)
    loader = tmp_path / "libc" / kbuild_tools._LOADER
    loader.parent.mkdir(parents=True)
    loader.write_text('#!/bin/sh\necho "$@"\n')
    loader.chmod(0o755)
    monkeypatch.setattr(kbuild_tools, "_libraries", lambda name, archive: tmp_path / "libc")
    return program(tmp_path / "tools/objtool/objtool", NEWER).parents[1]


def program(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755)
    return path


def test_a_program_that_is_too_new_runs_by_its_own_loader(tools):
    make_tools_run(tools, "trixie-backports", None)
    done = subprocess.run(
        [tools / "objtool/objtool", "--hacks", "a b"], capture_output=True, text=True, check=True
    )
    libraries = tools.parent / "libc" / kbuild_tools._LIBRARY_PATH
    moved = tools / "objtool/objtool.elf"
    assert done.stdout.split() == [
        "--library-path", str(libraries), str(moved), "--hacks", "a", "b",
    ]  # fmt: skip
    assert moved.read_bytes() == NEWER


def test_what_runs_here_is_left_alone(tools):
    old = program(tools / "modpost", OLDER)
    script = program(tools / "setlocalversion", b"#!/bin/sh\n")
    make_tools_run(tools, "trixie", None)
    assert old.read_bytes() == OLDER
    assert script.read_bytes() == b"#!/bin/sh\n"


def test_a_hard_linked_original_stays_as_it_is(tools, tmp_path):
    original = tmp_path / "package"
    original.hardlink_to(tools / "objtool/objtool")
    make_tools_run(tools, "trixie", None)
    assert original.read_bytes() == NEWER
