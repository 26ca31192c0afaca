import logging
import os

import forging
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.host.apt_sources import Mirror, Mirrors
from harness.host.archive import Archive, ArchiveError, Package
from harness.host.debian_kernels import (
    SPEC,
    cached_kernels,
    complete_kernels,
    fetch_kernel,
    matching,
    newest_per_series,
    offered_kernels,
)
from harness.host.kernel_image import KernelError

# Name, version, size, as the archive has had them side by side.
LISTED = [
    ("linux-image-5.10.0-32-amd64", "5.10.223-1", 55_749_416),
    ("linux-image-5.10.0-46-amd64", "5.10.262-1", 56_995_900),
    ("linux-image-5.10.0-46-amd64-dbg", "5.10.262-1", 900_000_000),
    ("linux-image-amd64", "5.10.262-1", 1_480),
    ("linux-image-amd64-signed-template", "5.10.262-1", 1_570_528),
    ("linux-image-6.1-amd64", "6.1.180-1~deb11u1", 1_492),
    ("linux-image-6.1.0-0.deb11.52-amd64", "6.1.180-1~deb11u1", 74_666_380),
    ("linux-image-6.1.0-55-amd64", "6.1.192-1", 70_600_000),
    ("linux-image-6.1.0-55-cloud-amd64", "6.1.192-1", 30_000_000),
    ("linux-image-6.1.0-55-rt-amd64", "6.1.192-1", 70_000_000),
    ("linux-image-6.1.0-56-amd64-unsigned", "6.1.192-2", 70_600_000),
    ("linux-image-6.12.94+deb13-amd64", "6.12.94-1", 107_736_108),
    ("linux-image-6.12.115+deb13-amd64", "6.12.115-1", 108_462_396),
    ("linux-image-6.12.115+deb13.1-amd64", "6.12.115-2", 108_492_156),
    ("linux-image-6.12.115+deb13.1-amd64-unsigned", "6.12.115-2", 108_494_208),
    ("linux-image-6.18.15+deb13-amd64", "6.18.15-1~bpo13+1", 167_422_112),
    # Of 6.19 and 7.0 the modules are gone.
    ("linux-binary-6.19.14+deb13-amd64", "6.19.14-1~bpo13+1", 13_504_740),
    ("linux-image-6.19.14+deb13-amd64", "6.19.14-1~bpo13+1", 2_040),
    ("linux-binary-7.2.12+deb13-amd64", "7.2.12-1~bpo13+1", 13_968_908),
    ("linux-base-7.2.12+deb13-amd64", "7.2.12-1~bpo13+1", 1_090_008),
    ("linux-modules-7.2.12+deb13-amd64", "7.2.12-1~bpo13+1", 159_105_900),
    ("linux-base-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1", 1_077_476),
    ("linux-binary-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1", 14_138_336),
    ("linux-binary-unsigned-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1", 14_136_960),
    ("linux-image-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1", 1_900),
    ("linux-modules-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1", 106_862_204),
    ("linux-modules-amd64", "7.3.4-1~bpo13+1", 1_020),
]
PACKAGES = [Package(name, version, "suite", size) for name, version, size in LISTED]


@pytest.mark.parametrize(
    ("spec", "release"),
    [
        ("5.10", "5.10.0-46-amd64"),
        ("5.10.223", "5.10.0-32-amd64"),
        ("5.10.0-32", "5.10.0-32-amd64"),
        ("6.1", "6.1.0-56-amd64"),
        ("6.1.192-1", "6.1.0-55-amd64"),
        ("6.1.180", "6.1.0-0.deb11.52-amd64"),
        ("6.12", "6.12.115+deb13.1-amd64"),
        ("6.12.9", None),
        ("6.12.94", "6.12.94+deb13-amd64"),
        ("6.12.115+deb13-amd64", "6.12.115+deb13-amd64"),
        ("6.18", "6.18.15+deb13-amd64"),
        ("6.19", None),
        ("7.2", "7.2.12+deb13-amd64"),
        ("7.3", "7.3.4+deb13-amd64"),
        ("7", "7.3.4+deb13-amd64"),
        ("8.0", None),
    ],
)
def test_the_newest_whole_kernel_is_chosen(spec, release):
    found = matching(spec, complete_kernels(PACKAGES))
    assert (found[-1].release if found else None) == release


def test_a_split_kernel_comes_with_all_its_parts():
    (kernel,) = matching("7.3", complete_kernels(PACKAGES))
    assert [p.name.split("-")[1] for p in kernel.packages] == ["binary", "modules", "base"]
    assert kernel.size_bytes == 14_138_336 + 106_862_204 + 1_077_476
    assert kernel.series == "7.3"


def test_signed_images_are_preferred_but_not_required():
    images = {k.release: k.packages[0].name for k in complete_kernels(PACKAGES)}
    assert images["6.12.115+deb13.1-amd64"] == "linux-image-6.12.115+deb13.1-amd64"
    assert images["6.1.0-56-amd64"] == "linux-image-6.1.0-56-amd64-unsigned"


@given(st.permutations(PACKAGES))
def test_the_order_of_the_lists_does_not_matter(packages):
    assert complete_kernels(packages) == complete_kernels(PACKAGES)


@pytest.mark.parametrize("spec", ["6.1", "6.12.117", "6.1.0-55-amd64", "7.3.4+deb13-amd64"])
def test_versions_are_specs(spec):
    assert SPEC.fullmatch(spec)


@pytest.mark.parametrize("spec", ["running", "bzImage", "./6.1", "6", "6.1/vmlinuz", "6.1x", ""])
def test_paths_and_names_are_no_specs(spec):
    assert not SPEC.fullmatch(spec)


needs_apt = pytest.mark.skipif(forging.needs_apt, reason="apt-get or dpkg-deb is not installed")
NOWHERE = Mirrors(*[Mirror("file:/nonexistent/archive", trusted=True)] * 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forged(tmp_path, cache):
    (tmp_path / "archive").mkdir()
    archive = forging.ForgedArchive(tmp_path / "archive")
    archive.add_kernel("bookworm-security", "6.1.0-9-amd64", "6.1.9-1")
    archive.add_kernel("bookworm-security", "6.1.0-10-amd64", "6.1.10-1")
    for suite in ("bookworm", "trixie-backports"):
        archive.add(suite, "unrelated")
    return archive


@needs_apt
def test_a_kernel_is_fetched_unpacked_and_its_packages_dropped(forged, cache):
    kernel = fetch_kernel("6.1", archive=Archive(forged.mirrors))
    assert kernel.release == "6.1.0-10-amd64"
    assert (kernel.tree / "boot/vmlinuz-6.1.0-10-amd64").is_file()
    assert kernel.origin == "Debian linux-image-6.1.0-10-amd64 6.1.10-1"
    assert list((cache / "debs").iterdir()) == []


@needs_apt
def test_a_fetched_kernel_needs_nothing_more(forged, monkeypatch):
    fetched = fetch_kernel("6.1", archive=Archive(forged.mirrors))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fetch_kernel("6.1", archive=Archive(NOWHERE)) == fetched


@needs_apt
def test_a_newer_kernel_is_taken_on_request_only(forged):
    fetch_kernel("6.1", archive=Archive(forged.mirrors))
    forged.add_kernel("bookworm-security", "6.1.0-11-amd64", "6.1.11-1")
    assert fetch_kernel("6.1", archive=Archive(forged.mirrors)).version == "6.1.10-1"
    newer = fetch_kernel("6.1", refresh=True, archive=Archive(forged.mirrors))
    assert newer.version == "6.1.11-1"
    assert fetch_kernel("6.1", archive=Archive(NOWHERE)) == newer


@needs_apt
def test_an_older_one_asked_for_by_name_does_not_become_the_series(forged):
    older = fetch_kernel("6.1.9", archive=Archive(forged.mirrors))
    assert older.version == "6.1.9-1"
    assert fetch_kernel("6.1", archive=Archive(forged.mirrors)).version == "6.1.10-1"


@needs_apt
def test_after_a_week_without_archive_the_cached_one_serves_with_a_warning(forged, cache, caplog):
    fetched = fetch_kernel("6.1", archive=Archive(forged.mirrors))
    for path in [*cache.glob("apt/*/index"), cache / "kernels/specs/6.1"]:
        os.utime(path, (0, 0))
    for index in cache.glob("apt/*/index"):
        index.unlink()
    with caplog.at_level(logging.WARNING):
        assert fetch_kernel("6.1", archive=Archive(NOWHERE)) == fetched
    assert "using kernel 6.1.0-10-amd64 from the cache" in caplog.text


@needs_apt
def test_a_cached_kernel_serves_another_spec_that_fits_when_the_archive_is_lost(forged, cache):
    fetched = fetch_kernel("6.1.10", archive=Archive(forged.mirrors))
    for index in cache.glob("apt/*/index"):
        index.unlink()
    assert fetch_kernel("6.1", archive=Archive(NOWHERE)) == fetched


@needs_apt
def test_a_version_that_the_archive_lacks_is_one_line_with_what_it_has(forged):
    with pytest.raises(KernelError) as error:
        fetch_kernel("6.7", archive=Archive(forged.mirrors))
    assert str(error.value) == "no kernel 6.7 in Debian's archive; it has 6.1"


@needs_apt
def test_nothing_cached_and_no_archive_is_one_line(cache):
    with pytest.raises(ArchiveError) as error:
        fetch_kernel("6.1", archive=Archive(NOWHERE))
    assert str(error.value).startswith(
        "kernel 6.1 is not in the cache, and cannot update suite bookworm-security: "
    )
    assert "\n" not in str(error.value)


@needs_apt
def test_listing_shows_offered_and_cached_kernels(forged):
    fetch_kernel("6.1.9", archive=Archive(forged.mirrors))
    offers = offered_kernels(Archive(forged.mirrors))
    assert [(o.version, o.is_cached) for o in offers] == [("6.1.9-1", True), ("6.1.10-1", False)]
    assert [o.version for o in cached_kernels()] == ["6.1.9-1"]
    assert all(o.size_bytes > 100_000 for o in offers)


@needs_apt
def test_a_short_listing_has_the_newest_and_the_cached(forged):
    forged.add_kernel("bookworm-security", "6.1.0-11-amd64", "6.1.11-1")
    fetch_kernel("6.1.9", archive=Archive(forged.mirrors))
    offers = newest_per_series(offered_kernels(Archive(forged.mirrors)))
    assert [o.version for o in offers] == ["6.1.9-1", "6.1.11-1"]
    assert offers[0].cached_bytes > offers[1].cached_bytes == 0


@needs_apt
def test_listing_without_archive_shows_what_is_cached(forged, cache):
    fetch_kernel("6.1.9", archive=Archive(forged.mirrors))
    for index in cache.glob("apt/*/index"):
        index.unlink()
    assert [o.version for o in offered_kernels(Archive(NOWHERE))] == ["6.1.9-1"]
