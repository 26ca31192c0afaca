import logging
import os
import re
import time

import forging
import pytest

from harness.host import apt
from harness.host.apt_sources import Mirror, Mirrors
from harness.host.archive import Archive, ArchiveError, unpack

pytestmark = pytest.mark.skipif(forging.needs_apt, reason="apt-get or dpkg-deb is not installed")

NOWHERE = Mirror("file:/nonexistent/archive", trusted=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forged(tmp_path):
    (tmp_path / "archive").mkdir()
    built = forging.ForgedArchive(tmp_path / "archive")
    built.add("bookworm", "thing", "1:1.0-1", [("usr/share/thing", b"old")])
    built.add("bookworm-security", "thing", "1:1.0-2", [("usr/share/thing", b"new")])
    built.add("bookworm", "thing-extra", "3", [("usr/share/extra", b"extra")])
    return built


SUITES = ("bookworm-security", "bookworm")


def without_network(monkeypatch):
    """Nothing can be run any more: whoever still needs apt fails."""
    monkeypatch.setenv("PATH", "/nonexistent")


def test_the_newest_version_of_all_suites_is_fetched_and_unpacks(forged, tmp_path):
    deb = Archive(forged.mirrors).fetch("thing", suites=SUITES)
    unpack(deb, tmp_path / "tree")
    assert (tmp_path / "tree/usr/share/thing").read_bytes() == b"new"


def test_a_version_can_be_asked_for(forged, tmp_path):
    deb = Archive(forged.mirrors).fetch("thing", "1:1.0-1", SUITES)
    unpack(deb, tmp_path / "tree")
    assert (tmp_path / "tree/usr/share/thing").read_bytes() == b"old"


def test_several_are_fetched_in_the_order_asked_for(forged):
    debs = Archive(forged.mirrors).fetch_all(["thing-extra", "thing"], SUITES)
    assert [d.name for d in debs] == ["thing-extra_3.deb", "thing_1%3a1.0-2.deb"]


def test_names_are_whole_names(forged):
    found = Archive(forged.mirrors).packages("thing", SUITES)
    assert [(p.name, p.version, p.suite) for p in found] == [
        ("thing", "1:1.0-1", "bookworm"),
        ("thing", "1:1.0-2", "bookworm-security"),
    ]
    assert all(p.size_bytes > 0 for p in found)


@pytest.mark.parametrize("version", [None, "1:1.0-2"])
def test_what_is_cached_needs_no_apt(forged, monkeypatch, version):
    fetched = Archive(forged.mirrors).fetch("thing", suites=SUITES)
    without_network(monkeypatch)
    assert Archive().fetch("thing", version, SUITES) == fetched


def test_a_list_that_is_fresh_is_not_updated(forged):
    Archive(forged.mirrors).packages("thing", SUITES)
    forged.add("bookworm", "late", "1")
    assert Archive(forged.mirrors).packages("late", SUITES) == []


def test_a_list_is_updated_when_a_package_is_not_in_it(forged, cache):
    Archive(forged.mirrors).packages("thing", SUITES)
    forged.add("bookworm", "late", "1")
    an_hour_ago = time.time() - 3600
    os.utime(cache / "apt/bookworm/index", (an_hour_ago, an_hour_ago))
    assert Archive(forged.mirrors).fetch("late", suites=SUITES).name == "late_1.deb"


def test_a_suite_that_moved_away_is_one_warning_and_the_others_serve(forged, caplog):
    mirrors = Mirrors(main=NOWHERE, security=forged.mirrors.security)
    with caplog.at_level(logging.WARNING):
        deb = Archive(mirrors).fetch("thing", suites=SUITES)
    assert deb.name == "thing_1%3a1.0-2.deb"
    (message,) = {r.getMessage() for r in caplog.records}
    assert message.startswith("cannot update suite bookworm: ")
    assert "\n" not in message


def test_an_old_list_serves_when_it_cannot_be_updated(forged, cache):
    Archive(forged.mirrors).packages("thing", SUITES)
    for suite in SUITES:
        os.utime(cache / "apt" / suite / "index", (0, 0))
    found = Archive(Mirrors(NOWHERE, NOWHERE)).packages("thing", SUITES)
    assert [p.version for p in found] == ["1:1.0-1", "1:1.0-2"]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_nothing_reachable_and_nothing_cached_is_one_line(cache):
    with pytest.raises(ArchiveError) as error:
        Archive(Mirrors(NOWHERE, NOWHERE)).fetch("thing", suites=SUITES)
    assert re.match(r"cannot fetch thing: cannot update suite bookworm-security: ", one_line(error))


def test_a_mirror_that_does_not_answer_is_asked_once(caplog, monkeypatch):
    silent = Mirror("http://127.0.0.1:9/debian", trusted=True)
    asked = []
    real = apt.run
    monkeypatch.setattr(apt, "run", lambda *args: asked.append(args) or real(*args))
    with pytest.raises(ArchiveError) as error:
        Archive(Mirrors(silent, silent)).fetch("thing", suites=SUITES)
    assert "127.0.0.1:9" in one_line(error)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_is_one_line(cache):
    cache.mkdir()
    (cache / "apt").write_text("in the way")
    with pytest.raises(ArchiveError) as error:
        Archive(Mirrors(NOWHERE, NOWHERE)).fetch("thing", suites=SUITES)
    assert f"cannot write below {cache}: " in one_line(error)


def test_no_apt_is_one_line(monkeypatch):
    without_network(monkeypatch)
    with pytest.raises(ArchiveError) as error:
        Archive(Mirrors(NOWHERE, NOWHERE)).fetch("thing", suites=("bookworm",))
    assert one_line(error) == (
        "cannot fetch thing: cannot update suite bookworm: apt-get is not installed on this machine"
    )


def test_no_keyring_is_one_line(tmp_path):
    mirror = Mirror(f"file:{tmp_path}", keyrings=(tmp_path / "no.gpg",))
    with pytest.raises(ArchiveError) as error:
        Archive(Mirrors(mirror, mirror)).fetch("thing", suites=("bookworm",))
    assert "no.gpg is missing (package debian-archive-keyring)" in one_line(error)


def test_an_unknown_package_or_version_is_one_line(forged):
    debian = Archive(forged.mirrors)
    with pytest.raises(ArchiveError) as error:
        debian.fetch("nothing", suites=SUITES)
    assert one_line(error) == "cannot fetch nothing: not in bookworm-security, bookworm"
    with pytest.raises(ArchiveError) as error:
        debian.fetch("thing", "7", SUITES)
    assert one_line(error).startswith("cannot fetch thing 7: ")


def test_a_package_that_is_not_what_its_list_says_is_refused(forged, cache):
    deb = forged.add("bookworm", "forgery", "1", [("usr/share/forgery", b"good")])
    deb.write_bytes(deb.read_bytes().replace(b"good", b"evil"))
    with pytest.raises(ArchiveError, match="cannot fetch forgery 1"):
        Archive(forged.mirrors).fetch("forgery", suites=("bookworm",))
    assert list((cache / "debs").iterdir()) == []


def test_unpacking_what_is_no_package_is_one_line(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"not a package")
    with pytest.raises(ArchiveError) as error:
        unpack(tmp_path / "x.deb", tmp_path / "tree")
    assert one_line(error).startswith("cannot unpack x.deb: dpkg-deb: error: ")
