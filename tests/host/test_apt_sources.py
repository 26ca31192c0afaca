from pathlib import Path

import pytest

from harness.errors import HostError
from harness.host.apt_sources import (
    DEBIAN_KEYRING,
    Source,
    machine_mirrors,
    parse_deb822,
    parse_one_line,
)

DEB822 = """\
# a comment before
Types: deb deb-src
URIs: http://mirror.example/debian
# a comment inside
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security/ http://other.example/debian-security
Suites: bookworm-security
Components: main
"""


def test_deb822_paragraphs_become_one_source_per_uri():
    main, security, other = parse_deb822(DEB822)
    assert main.uri == "http://mirror.example/debian"
    assert main.suites == ("bookworm", "bookworm-updates")
    assert main.components == ("main", "contrib")
    assert main.signed_by == str(DEBIAN_KEYRING)
    assert security.suites == other.suites == ("bookworm-security",)
    assert other.uri == "http://other.example/debian-security"


@pytest.mark.parametrize(
    "paragraph",
    [
        "Types: deb-src\nURIs: http://x/debian\nSuites: bookworm\nComponents: main\n",
        "Types: deb\nEnabled: no\nURIs: http://x/debian\nSuites: bookworm\nComponents: main\n",
        "nothing of the kind\n",
    ],
)
def test_deb822_paragraphs_that_name_no_binaries_are_left_out(paragraph):
    assert list(parse_deb822(paragraph)) == []


def test_deb822_continues_a_field_on_indented_lines_and_ignores_case():
    (source,) = parse_deb822(
        "types: deb\nURIS: http://a/debian\nSuites:\n bookworm\n trixie\nComponents: main\n"
    )
    assert source.suites == ("bookworm", "trixie")


def test_one_line_sources_with_options():
    text = (
        "deb http://a/debian bookworm main contrib # why\n"
        "deb [arch=amd64 signed-by=/k.gpg trusted=yes] http://b/debian trixie main\n"
        "deb-src http://c/debian bookworm main\n"
        "# deb http://d/debian bookworm main\n"
        "rubbish\n\n"
    )
    assert list(parse_one_line(text)) == [
        Source("http://a/debian", ("bookworm",), ("main", "contrib")),
        Source("http://b/debian", ("trixie",), ("main",), "/k.gpg", True),
    ]


def write(etc: Path, name: str, text: str) -> None:
    path = etc / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_machines_own_mirrors_are_taken(tmp_path):
    write(tmp_path, "sources.list.d/debian.sources", DEB822)
    mirrors = machine_mirrors(tmp_path)
    assert mirrors.main.uri == "http://mirror.example/debian"
    assert mirrors.security.uri == "http://mirror.example/debian-security/"


def test_third_parties_that_use_debians_suite_names_are_not_taken(tmp_path):
    write(
        tmp_path,
        "sources.list.d/a-vendor.list",
        "deb [signed-by=/usr/share/keyrings/vendor.gpg] https://apt.vendor.example bookworm main\n"
        "deb https://packages.vendor.example bookworm stable\n"
        "deb https://unsigned.vendor.example bookworm main\n",
    )
    write(tmp_path, "sources.list", "deb http://ours.example/debian bookworm main\n")
    assert machine_mirrors(tmp_path).main.uri == "http://ours.example/debian"


def test_a_resigned_mirror_keeps_its_keyring(tmp_path):
    line = "deb [signed-by=/etc/keys/our-debian.gpg] http://ours.example/debian trixie main\n"
    write(tmp_path, "sources.list", line)
    keyrings = machine_mirrors(tmp_path).main.keyrings
    assert keyrings == (Path("/etc/keys/our-debian.gpg"), DEBIAN_KEYRING)


def test_old_security_suite_name_is_recognised(tmp_path):
    write(tmp_path, "sources.list", "deb http://s.example/debian-security buster/updates main\n")
    assert machine_mirrors(tmp_path).security.uri == "http://s.example/debian-security"


@pytest.mark.parametrize("text", ["", "deb http://archive.example/ubuntu noble main\n"])
def test_a_machine_of_another_distribution_must_name_an_archive(tmp_path, text, monkeypatch):
    write(tmp_path, "sources.list", text)
    with pytest.raises(HostError, match="name no Debian archive"):
        machine_mirrors(tmp_path)
    monkeypatch.setenv("NSVM_MIRROR", "http://m.example/debian/")
    mirrors = machine_mirrors(tmp_path)
    assert mirrors.main.uri == "http://m.example/debian"
    assert mirrors.security.uri == "http://m.example/debian-security"
