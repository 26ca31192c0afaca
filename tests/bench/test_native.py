import shutil
import subprocess

import pytest

from harness.bench import native
from harness.bench.native import executable
from harness.host.compiler import CompilerError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_SOURCES", tmp_path)
    return tmp_path


@needs_compiler
def test_a_program_is_compiled_once_and_again_when_it_changes(cache, sources):
    source = sources / "seven.c"
    source.write_text("int main(void) { return 7; }\n")
    first = executable("seven")
    assert subprocess.run([first], timeout=10).returncode == 7
    stamp = first.stat().st_mtime_ns
    assert executable("seven") == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text("int main(void) { return 8; }\n")
    assert executable("seven") != first
    assert subprocess.run([executable("seven")], timeout=10).returncode == 8


@needs_compiler
def test_what_a_header_declares_is_compiled_too_and_again_when_it_changes(cache, sources):
    (sources / "main.c").write_text('#include "part.h"\nint main(void) { return part(); }\n')
    (sources / "part.h").write_text("int part(void);\n")
    (sources / "part.c").write_text('#include "part.h"\nint part(void) { return 5; }\n')
    assert subprocess.run([executable("main")], timeout=10).returncode == 5
    (sources / "part.c").write_text('#include "part.h"\nint part(void) { return 6; }\n')
    assert subprocess.run([executable("main")], timeout=10).returncode == 6


@needs_compiler
@pytest.mark.parametrize("name", ["ioctl_loops", "migrate_loops", "bare_start"])
def test_programs_need_no_library_of_the_host_that_they_run_on(cache, name):
    # An ELF without PT_INTERP asks for no dynamic loader.
    listing = subprocess.run(
        ["readelf", "-lW", executable(name)], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    assert "LOAD" in listing
    assert "INTERP" not in listing


@needs_compiler
def test_a_refused_source_is_one_line(cache, sources):
    (sources / "bad.c").write_text("int main(void) { return seven; }\n")
    with pytest.raises(CompilerError, match="seven") as caught:
        executable("bad")
    assert "\n" not in str(caught.value)
    assert not any((cache / "bench").glob("*"))
