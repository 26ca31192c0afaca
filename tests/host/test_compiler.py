import shutil

import pytest

from harness.host import compiler as module
from harness.host.compiler import Compiler, CompilerError, first_error

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Make $CC a shell script."""

    def make(text):
        path = tmp_path / "my-cc"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return make


@needs_compiler
def test_it_compiles(tmp_path):
    (tmp_path / "seven.c").write_text("int seven(void) { return 7; }\n")
    compiler = Compiler()
    compiler.run(["-c", "seven.c", "-o", "seven.o"], tmp_path, "seven.c")
    assert (tmp_path / "seven.o").read_bytes()[:4] == b"\x7fELF"
    assert compiler.version
    assert "\n" not in compiler.version


def test_without_one_the_names_looked_for_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompilerError, match=r"^no C compiler found, looked for cc, gcc, clang$"):
        Compiler()
    monkeypatch.setenv("CC", "other-cc")
    with pytest.raises(CompilerError, match=r"^no C compiler found, looked for other-cc$"):
        Compiler()


def test_one_that_does_not_work_is_named(script):
    path = script("echo 'it burns' >&2; exit 3")
    with pytest.raises(CompilerError, match=f"^{path} --version: it burns$"):
        Compiler()


def test_one_that_does_not_end_is_stopped(script, monkeypatch, tmp_path):
    script("[ $1 = --version ] && echo slow 1.0 || exec sleep 20")
    compiler = Compiler()
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
    with pytest.raises(CompilerError, match=r"my-cc for slow\.c: .*timed out"):
        compiler.run(["slow.c"], tmp_path, "slow.c")


def test_messages_are_in_english_and_builds_have_no_time(script, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    script('echo "$LC_ALL $SOURCE_DATE_EPOCH"; pwd')
    assert Compiler().run([], tmp_path, "it") == f"C 0\n{tmp_path}\n"


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("a.c: In function f:\na.c:1:2: error: no\nmore\n", "a.c:1:2: error: no"),
        ("/usr/bin/ld: cannot find -lc\ncollect2: error: ld 1\n", "/usr/bin/ld: cannot find -lc"),
        ("ld: warning: x\na.o: undefined reference to `f'\n", "a.o: undefined reference to `f'"),
        ("it burns\n", "it burns"),
        ("", "it failed without a message"),
    ],
)
def test_the_line_with_the_cause_is_found(output, cause):
    assert first_error(output) == cause
