"""The kernel's own selftests: which are built, and what is said of those that are not."""

import shutil
from types import SimpleNamespace

import pytest

from harness.host import selftests
from harness.host.kernel_image import KernelError
from harness.host.selftests import build_selftests

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

MAKEFILE = """
$(OUTPUT)/%: %.c
\t@mkdir -p $(@D)
\t@grep -q main $< || { echo '$<:1:2: error: no main' >&2; exit 1; }
\t@echo "$(LDFLAGS) $(KHDR_INCLUDES)" > $@
"""
OFFER = SimpleNamespace(series="6.1", version="6.1.192-2", release="6.1.0-56-amd64")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return the directory of a kernel's tests for x86, and have it be what the archive gives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kvm = tmp_path / "source" / selftests._KVM
    (kvm / "x86_64").mkdir(parents=True)
    (kvm / "Makefile").write_text(MAKEFILE)
    monkeypatch.setattr(selftests, "kernel_source", lambda *args: tmp_path / "source")
    monkeypatch.setattr(selftests, "_headers", lambda *args: tmp_path / "headers")
    return kvm / "x86_64"


def test_each_is_built_statically_with_the_kernels_own_headers(source, tmp_path):
    for name in ("smm_test", "state_test"):
        (source / f"{name}.c").write_text("main")
    built = build_selftests(OFFER, archive=object())
    assert sorted(built.programs) == ["smm_test", "state_test"]
    said = built.programs["smm_test"].read_text()
    assert said.startswith("-static")
    assert f"-isystem {tmp_path / 'headers'} " in said
    assert built.unbuilt == {}


@pytest.mark.parametrize("name", ["vmx_msrs_test", "evmcs_test", "nx_huge_pages_test"])
def test_what_no_amd_cpu_can_run_is_left_out(source, name):
    for each in ("smm_test", name):
        (source / f"{each}.c").write_text("main")
    assert list(build_selftests(OFFER, archive=object()).programs) == ["smm_test"]


def test_one_that_does_not_compile_is_named_and_the_others_are_built(source):
    (source / "smm_test.c").write_text("main")
    (source / "amx_test.c").write_text("")
    built = build_selftests(OFFER, archive=object())
    assert list(built.programs) == ["smm_test"]
    assert built.unbuilt == {"amx_test": "x86_64/amx_test.c:1:2: error: no main"}


def test_none_at_all_is_told_in_a_line(source):
    (source / "amx_test.c").write_text("")
    with pytest.raises(KernelError, match=r"no selftest could be built: .*error: no main"):
        build_selftests(OFFER, archive=object())
