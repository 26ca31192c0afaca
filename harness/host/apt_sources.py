"""Where this machine gets its Debian packages from, read from its apt sources (sources.list(5)).

Both formats are read: one line per source (`*.list`) and paragraphs (deb822, `*.sources`). apt
itself answers this only for sources whose lists it has downloaded, and container images have none.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import HostError

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_RELEASES = "buster|bullseye|bookworm|trixie|forky|sid|oldoldstable|oldstable|stable|testing"
_DEBIAN_SUITE = re.compile(
    rf"({_RELEASES}|unstable)(-security|-updates|-backports(-sloppy)?|/updates)?/?"
)
_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<rest>\S.*)")


@dataclass(frozen=True)
class Source:
    """One URI of an apt source with all its suites."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False


@dataclass(frozen=True)
class Mirror:
    """One root of Debian's archive, and how its lists are authenticated."""

    uri: str
    keyrings: tuple[Path, ...] = (DEBIAN_KEYRING,)
    trusted: bool = False


@dataclass(frozen=True)
class Mirrors:
    """The two roots that Debian's packages come from."""

    main: Mirror
    security: Mirror


MIRROR_VARIABLE = "NSVM_MIRROR"
"""Environment variable: the URI of a Debian archive, for machines of other distributions."""


def machine_mirrors(etc_apt: Path = Path("/etc/apt")) -> Mirrors:
    """Return the Debian roots that this machine's own apt sources name, or $NSVM_MIRROR.

    The security archive, where it is not named, is the main one's neighbour.

    Raises:
        HostError: neither names one.
    """
    sources = list(read_sources(etc_apt))
    named = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    main = Mirror(named) if named else _pick(sources, security=False)
    security = _pick(sources, security=True)
    if main is None and security is not None:
        main = replace(security, uri=security.uri.removesuffix("-security"))
    if main is None:
        raise HostError(
            f"this machine's apt sources name no Debian archive (set {MIRROR_VARIABLE} to its URI)"
        )
    return Mirrors(main, security or replace(main, uri=f"{main.uri}-security"))


def read_sources(etc_apt: Path) -> Iterator[Source]:
    """Yield the enabled binary sources below `etc_apt`, in apt's order.

    A file that cannot be read counts as empty.
    """
    parts = etc_apt / "sources.list.d"
    for path in [etc_apt / "sources.list", *(sorted(parts.iterdir()) if parts.is_dir() else ())]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if path.suffix == ".list":
            yield from parse_one_line(text)
        elif path.suffix == ".sources":
            yield from parse_deb822(text)


def parse_one_line(text: str) -> Iterator[Source]:
    """Yield the sources of a `.list` file; lines that are none are left out."""
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.partition("#")[0].strip())
        if match is None:
            continue
        options = dict(o.split("=", 1) for o in (match["options"] or "").split() if "=" in o)
        suite, *components = match["rest"].split()
        yield Source(
            match["uri"],
            (suite,),
            tuple(components),
            options.get("signed-by", ""),
            options.get("trusted") == "yes",
        )


def parse_deb822(text: str) -> Iterator[Source]:
    """Yield the sources of a `.sources` file, one per URI; disabled paragraphs are left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = _fields(paragraph)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        for uri in fields.get("uris", "").split():
            yield Source(
                uri,
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                fields.get("signed-by", ""),
                fields.get("trusted") == "yes",
            )


def _fields(paragraph: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in paragraph.splitlines():
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        elif ":" in line:
            name, value = (part.strip() for part in line.split(":", 1))
            name = name.lower()
            fields[name] = value
    return fields


def _pick(sources: Iterable[Source], *, security: bool) -> Mirror | None:
    found = [s for s in sources if _is_debian(s) and _is_security(s) == security]
    # Third parties use Debian's suite names too; what has "debian" in its path comes first.
    found.sort(key=lambda s: "debian" not in s.uri)
    return _mirror(found[0]) if found else None


def _is_debian(source: Source) -> bool:
    return (
        "main" in source.components
        and any(_DEBIAN_SUITE.fullmatch(suite) for suite in source.suites)
        and (not _keyrings(source) or "debian" in source.signed_by)
    )


def _is_security(source: Source) -> bool:
    return all(s.rstrip("/").endswith(("-security", "/updates")) for s in source.suites)


def _mirror(source: Source) -> Mirror:
    keyrings = dict.fromkeys((*_keyrings(source), DEBIAN_KEYRING))
    return Mirror(source.uri, tuple(keyrings), source.trusted)


def _keyrings(source: Source) -> list[Path]:
    """Signed-By may also hold fingerprints or a whole key: only files are of use elsewhere."""
    return [Path(p) for p in re.split(r"[\s,]+", source.signed_by) if p.startswith("/")]
