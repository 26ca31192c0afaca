import os
import re
import shutil
import subprocess
import sys

import pytest

from guest_images import ElfClass, ImageBuildError, build, builder, guest_names
from guest_images.header import generated_header
from harness.host.compiler import CompilerError
from harness.machine import guest_abi
from harness.machine.loader import EntryMode, read_image

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler in PATH"
)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the guests' sources that a test may spoil."""
    copy = tmp_path / "sources"
    shutil.copytree(builder.SOURCES, copy)
    monkeypatch.setattr(builder, "SOURCES", copy)
    return copy


@needs_compiler
@pytest.mark.parametrize("elf_class", ElfClass)
@pytest.mark.parametrize("name", guest_names())
def test_every_guest_is_an_image_that_loads(tmp_path, name, elf_class):
    image = read_image(build(name, elf_class, tmp_path))
    wide = elf_class is ElfClass.ELF64
    assert image.mode is (EntryMode.LONG64 if wide else EntryMode.MULTIBOOT32)
    assert image.entry == image.symbol(elf_class.value)
    assert image.segments[0].gpa == guest_abi.IMAGE_GPA


@needs_compiler
def test_areas_are_where_the_declarations_say(tmp_path):
    image = read_image(build("svme", cache=tmp_path))
    assert image.symbol("cpu_areas") == guest_abi.CPU_AREAS_GPA
    assert image.symbol("image_end") <= guest_abi.CPU_AREAS_GPA


@needs_compiler
def test_same_sources_same_hash(tmp_path):
    """Built in two places, from two places: every byte is the same."""
    first = build("svme", cache=tmp_path / "one")
    second = build("svme", cache=tmp_path / "a-longer-name")
    assert first != second
    assert builder.image_hash(first) == builder.image_hash(second)
    assert first.parent.name == second.parent.name


@needs_compiler
def test_hash_does_not_depend_on_where_the_sources_are(tmp_path, sources):
    moved = build("svme", cache=tmp_path / "moved")
    here = subprocess.run(
        [sys.executable, "-c", "import guest_images; print(guest_images.build('svme'))"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    assert here.returncode == 0, here.stderr
    with open(here.stdout.strip(), "rb") as image:
        assert image.read() == moved.read_bytes()


@needs_compiler
def test_a_built_image_is_not_built_again(tmp_path):
    image = build("hello", cache=tmp_path)
    before = image.stat().st_mtime_ns
    assert build("hello", cache=tmp_path).stat().st_mtime_ns == before
    assert not [p for p in image.parent.iterdir() if p.name.startswith(".")]


@needs_compiler
def test_a_changed_source_is_another_image(tmp_path, sources):
    before = build("hello", cache=tmp_path)
    with open(sources / "hello.c", "a") as source:
        source.write("\nint more = 1;\n")
    after = build("hello", cache=tmp_path)
    assert after.parent != before.parent
    assert before.exists()


@needs_compiler
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nint broken(void) { return }\n", r"^hello\.c: hello\.c:\d+:\d+: error: "),
        ("\nint sloppy(void) { int x; return 0; }\n", r"^hello\.c: .*unused variable"),
        ("\nint more(void); int f(void) { return more(); }\n", r"^linking guest hello: .*more"),
        ("\nchar big[0x200000] = {1};\n", r"^linking guest hello: .*reaches into the vCPU areas"),
    ],
)
def test_a_source_that_does_not_build_is_named_in_one_line(tmp_path, sources, text, message):
    with open(sources / "hello.c", "a") as source:
        source.write(text)
    with pytest.raises(CompilerError) as caught:
        build("hello", cache=tmp_path)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("hello.elf"))


def test_an_unknown_guest_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ImageBuildError, match="no guest image named 'nope'; there are hello, "):
        build("nope", cache=tmp_path)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ImageBuildError, match=r"guest hello: cannot write .*/file/"):
        build("hello", cache=blocked)


@needs_compiler
def test_the_command_prints_hashes_and_paths(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "guest_images"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(guest_names()) * len(ElfClass)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest, _ in lines)
    assert all(os.path.exists(path) for _, path in lines)


def test_the_header_declares_all_that_guests_are_told():
    header = generated_header()
    for member in [*guest_abi.Stage]:
        assert f"#define STAGE_{member.name} {member.value:#x}\n" in header
    for member in [*guest_abi.Command]:
        assert f"#define COMMAND_{member.name} {member.value:#x}\n" in header
    assert f"#define STAGE_PORT {guest_abi.STAGE_PORT:#x}\n" in header
    assert "_Static_assert(sizeof(struct cpu_area) == 0x6000," in header
