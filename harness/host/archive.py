"""Debian packages, downloaded and unpacked without touching this machine's configuration.

Every suite has a private apt state below the cache directory, so a suite that has moved away spoils
no other, and each is updated only when it is asked for. apt verifies what it downloads. What has
been downloaded once needs neither apt nor the network again.
"""

import logging
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.host.apt import AptState, ArchiveError, Package, fetching, run
from harness.host.apt_sources import Mirror, Mirrors, machine_mirrors
from harness.host.cache import cache_dir, locked
from harness.host.debian_version import sort_key

__all__ = ["BOOKWORM", "SUITES", "Archive", "ArchiveError", "Package", "fetch", "unpack"]

log = logging.getLogger(__name__)

SUITES = {
    "bullseye": "main",
    "bullseye-security": "security",
    "bookworm": "main",
    "bookworm-updates": "main",
    "bookworm-security": "security",
    "trixie": "main",
    "trixie-security": "security",
    "trixie-backports": "main",
}
"""The suites that the harness knows, and which of the archive's two roots holds each."""

BOOKWORM = ("bookworm-security", "bookworm-updates", "bookworm")

LIST_AGE_S = 24 * 3600.0
"""A suite's package list older than this is updated before it is used."""

UPDATE_TIMEOUT_S = 180.0
DOWNLOAD_TIMEOUT_S = 1800.0
UNPACK_TIMEOUT_S = 600.0

_JUST_UPDATED_S = 600.0


class Archive:
    """Debian's archive, seen through private apt states and a cache of downloads.

    `mirrors` are the archive's roots; without them, the ones that this machine's sources name.
    """

    def __init__(self, mirrors: Mirrors | None = None) -> None:
        self.root = cache_dir()
        self._mirrors = mirrors
        self._unavailable: dict[str, str] = {}
        self._down: set[str] = set()

    def packages(
        self, name: str, suites: Iterable[str], max_age_s: float = LIST_AGE_S
    ) -> list[Package]:
        """Return every package whose name matches the pattern `name`, oldest version first.

        Lists older than `max_age_s` seconds are updated first; a suite that cannot be updated is
        logged in one line, and its old list, if there is one, is used. Raises ArchiveError when
        no suite has a list.
        """
        states = {s: self._updated(s, max_age_s) for s in suites}
        if not any(states.values()):
            raise ArchiveError(next(self._unavailable[s] for s in states))
        found = [p for state in states.values() if state for p in state.packages(name)]
        return sorted(found, key=lambda p: sort_key(p.version))

    def list_age_s(self, suite: str) -> float:
        """Return how many seconds ago the suite's list was updated; infinity for never."""
        try:
            return max(0.0, time.time() - self._state(suite).index.stat().st_mtime)
        except OSError:
            return float("inf")

    def fetch(
        self, name: str, version: str | None = None, suites: Sequence[str] = BOOKWORM
    ) -> Path:
        """Return the package's .deb: the given version, or the newest of `suites`.

        Without a version, one that is in the cache and in a list already there is taken without
        asking the archive. Raises ArchiveError when it is not to be had.
        """
        cached = self._cached(name, version, suites)
        return cached or self.download([self._find(name, version, suites)])[0]

    def fetch_all(self, names: Iterable[str], suites: Sequence[str] = BOOKWORM) -> list[Path]:
        """Do what `fetch` does for each name, with one download for all that is missing."""
        cached = {name: self._cached(name, None, suites) for name in names}
        missing = [name for name, deb in cached.items() if deb is None]
        fetched = self.download([self._find(name, None, suites) for name in missing])
        cached.update(zip(missing, fetched, strict=True))
        return [deb for deb in cached.values() if deb is not None]

    def is_cached(self, package: Package) -> bool:
        """Whether `download` of it will need no network."""
        return self._deb(package).is_file()

    def download(self, packages: Sequence[Package]) -> list[Path]:
        """Return the .deb files of packages that `packages` found, from the cache or the archive.

        Raises ArchiveError.
        """
        missing = [p for p in packages if not self.is_cached(p)]
        for suite in dict.fromkeys(p.suite for p in missing):
            with locked(f"apt.{suite}", DOWNLOAD_TIMEOUT_S):
                here = [p for p in missing if p.suite == suite and not self.is_cached(p)]
                try:
                    if here:
                        self._download(suite, here)
                except OSError as e:
                    raise ArchiveError(f"cannot write below {self.root}: {e.strerror}") from e
        return [self._deb(p) for p in packages]

    def drop(self, package: Package) -> None:
        """Forget the .deb of a package, for one whose unpacked tree is what is kept."""
        self._deb(package).unlink(missing_ok=True)

    def _find(self, name: str, version: str | None, suites: Sequence[str]) -> Package:
        wanted = name if version is None else f"{name} {version}"
        for max_age_s in (LIST_AGE_S, _JUST_UPDATED_S):
            try:
                found = self.packages(re.escape(name), suites, max_age_s)
            except ArchiveError as e:
                raise ArchiveError(f"cannot fetch {wanted}: {e}") from e
            found = [p for p in found if version in (None, p.version)]
            if found:
                return found[-1]
        raise ArchiveError(f"cannot fetch {wanted}: not in {', '.join(suites)}")

    def _cached(self, name: str, version: str | None, suites: Sequence[str]) -> Path | None:
        if version is not None:
            deb = self._deb(Package(name, version, "", 0))
            return deb if deb.is_file() else None
        here = [s for s in suites if self._state(s).index.is_file()]
        found = self.packages(re.escape(name), here, float("inf")) if here else []
        return next((self._deb(p) for p in reversed(found) if self.is_cached(p)), None)

    def _deb(self, package: Package) -> Path:
        return self.root / "debs" / package.file_name

    def _state(self, suite: str) -> AptState:
        return AptState(self.root / "apt" / suite, suite)

    def _updated(self, suite: str, max_age_s: float) -> AptState | None:
        """The suite's state with a list in it, or None when it has none."""
        if self.list_age_s(suite) > max_age_s and suite not in self._unavailable:
            try:
                self._update(suite, max_age_s)
            except ArchiveError as e:
                self._unavailable[suite] = str(e)
                log.warning("%s", e)
            except OSError as e:
                raise ArchiveError(f"cannot write below {self.root}: {e.strerror}") from e
        state = self._state(suite)
        return state if state.index.is_file() else None

    def _update(self, suite: str, max_age_s: float) -> None:
        with locked(f"apt.{suite}", DOWNLOAD_TIMEOUT_S):
            if self.list_age_s(suite) <= max_age_s:
                return  # another run was faster
            mirror = self._mirror(suite)
            # Every attempt on a mirror that does not answer costs a timeout.
            if mirror.uri in self._down:
                raise ArchiveError(f"cannot update suite {suite}: {mirror.uri} does not answer")
            log.info("updating the package list of %s", suite)
            try:
                self._state(suite).update(mirror, UPDATE_TIMEOUT_S)
            except ArchiveError as e:
                if e.no_connection:
                    self._down.add(mirror.uri)
                raise

    def _mirror(self, suite: str) -> Mirror:
        self._mirrors = self._mirrors or machine_mirrors()
        return self._mirrors.security if SUITES[suite] == "security" else self._mirrors.main

    def _download(self, suite: str, packages: Sequence[Package]) -> None:
        log.info("%s (%.1f MB)", fetching(packages), sum(p.size_bytes for p in packages) / 1e6)
        debs = self.root / "debs"
        debs.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=debs) as scratch:
            self._state(suite).download(packages, Path(scratch), DOWNLOAD_TIMEOUT_S)
            for package in packages:
                (Path(scratch) / package.file_name).replace(self._deb(package))


def fetch(package: str, version: str | None = None, suites: Sequence[str] = BOOKWORM) -> Path:
    """Return a package's .deb from the user's cache or Debian's archive (see Archive.fetch)."""
    return Archive().fetch(package, version, suites)


def unpack(deb: Path, dest: Path) -> None:
    """Unpack the files of a .deb into the directory `dest`, over what is there already.

    Raises ArchiveError.
    """
    dest.mkdir(parents=True, exist_ok=True)
    run(["dpkg-deb", "-x", str(deb), str(dest)], f"unpack {deb.name}", UNPACK_TIMEOUT_S)
