"""apt and dpkg as tools: their private state, what they print, and the lists they fetch."""

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HostError
from harness.host.apt_sources import Mirror

_INDEXED = re.compile(r"^(Package|Version|Size):[ \t]*(\S+)", re.MULTILINE)

_FAILED = re.compile(r"^(?:Err:|W: Failed|E:)", re.MULTILINE)
"""apt-get calls an update that failed for want of a network a success, with warnings."""

_NO_CONNECTION = re.compile(r"Could not connect|Could not resolve|failure resolving|timed out")

_APT_CONF = """\
# Hooks of the machine's own configuration know nothing of this private state.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::Etc::SourceList "{state}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{state}/state";
Dir::State::Lists "{state}/lists";
Dir::State::Status "{state}/status";
Dir::Cache "{state}/cache";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::GzipIndexes "false";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
# The lists of an old release are past their date for good; their signature is still checked.
Acquire::Check-Valid-Until "false";
"""


class ArchiveError(HostError):
    """A package or a suite cannot be had, or a package cannot be unpacked; says why in a line."""

    @property
    def no_connection(self) -> bool:
        """Whether the archive did not answer at all."""
        return _NO_CONNECTION.search(str(self)) is not None


@dataclass(frozen=True)
class Package:
    """One version of one binary package (amd64 or all) as a suite's list names it."""

    name: str
    version: str
    suite: str
    size_bytes: int

    @property
    def file_stem(self) -> str:
        """Name and version as apt writes them in a file's name."""
        return f"{self.name}_{self.version.replace(':', '%3a')}"

    @property
    def file_name(self) -> str:
        """The name of the .deb in the cache."""
        return f"{self.file_stem}.deb"


class AptState:
    """One suite's private apt state: a directory with its own sources, lists and caches."""

    def __init__(self, directory: Path, suite: str) -> None:
        self.directory = directory
        self.suite = suite

    @property
    def index(self) -> Path:
        """Names, versions and sizes of the suite's packages, as of the last update."""
        return self.directory / "index"

    def update(self, mirror: Mirror, timeout_s: float) -> None:
        """Fetch the suite's list from `mirror`. Raises ArchiveError, and OSError of the cache."""
        what = f"update suite {self.suite}"
        source = source_line(mirror, self.suite)
        for sub in ("lists/partial", "cache/archives/partial", "state"):
            (self.directory / sub).mkdir(parents=True, exist_ok=True)
        (self.directory / "sources.list").write_text(source)
        (self.directory / "apt.conf").write_text(_APT_CONF.format(state=self.directory))
        (self.directory / "status").touch()
        output = self._apt(["update"], what, timeout_s)
        lists = list((self.directory / "lists").glob("*_Packages"))
        if _FAILED.search(output) or not lists:
            raise ArchiveError(f"cannot {what}: {reason(output)}")
        _write_index(lists, self.index)

    def packages(self, name: str) -> list[Package]:
        """Return the packages of the index whose whole name matches the pattern `name`."""
        lines = re.finditer(rf"^(?:{name}) \S+ \d+$", self.index.read_text(), re.MULTILINE)
        return [
            Package(name, version, self.suite, int(size))
            for name, version, size in (line[0].split() for line in lines)
        ]

    def download(self, packages: Sequence[Package], dest: Path, timeout_s: float) -> None:
        """Download packages of this suite into `dest`, verified by apt. Raises ArchiveError."""
        what = fetching(packages)
        args = ["download", *(f"{p.name}={p.version}" for p in packages)]
        output = self._apt(args, what, timeout_s, dest)
        for package in packages:
            # apt's own name ends in the architecture, amd64 or all.
            found = list(dest.glob(f"{glob.escape(package.file_stem)}_*.deb"))
            if not found:
                raise ArchiveError(f"cannot {what}: {reason(output)}")
            found[0].rename(dest / package.file_name)

    def _apt(self, args: list[str], what: str, timeout_s: float, cwd: Path | None = None) -> str:
        command = ["apt-get", "-c", str(self.directory / "apt.conf"), "-q", *args]
        return run(command, what, timeout_s, cwd)


def fetching(packages: Sequence[Package]) -> str:
    """Say in a few words what a download fetches."""
    more = f" and {len(packages) - 1} more" if len(packages) > 1 else ""
    return f"fetch {packages[0].name} {packages[0].version}{more}"


def run(command: list[str], what: str, timeout_s: float, cwd: Path | None = None) -> str:
    """Run a command and return its output, both streams mixed. Raises ArchiveError."""
    if shutil.which(command[0]) is None:
        raise ArchiveError(f"cannot {what}: {command[0]} is not installed on this machine")
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as e:
        raise ArchiveError(f"cannot {what}: {command[0]} took over {timeout_s:.0f} s") from e
    if done.returncode != 0:
        raise ArchiveError(f"cannot {what}: {reason(done.stdout)}")
    return done.stdout


def reason(output: str) -> str:
    """Return the first line in which apt or dpkg says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("E: Failed", "E:", "W: Failed", "Err:", "dpkg-deb: error:"):
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix("E: ").removeprefix("W: ")
    return lines[-1] if lines else "no output"


def source_line(mirror: Mirror, suite: str) -> str:
    """Return the suite's line of a sources.list. Raises ArchiveError without a keyring."""
    if mirror.trusted:
        authentic = "trusted=yes"
    else:
        keyrings = [str(k) for k in mirror.keyrings if k.is_file()]
        if not keyrings:
            raise ArchiveError(
                f"cannot update suite {suite}: {mirror.keyrings[-1]} is missing "
                "(package debian-archive-keyring)"
            )
        authentic = f"signed-by={','.join(keyrings)}"
    # target=Packages: other indexes (Contents, Translation) are large and of no use here.
    return f"deb [arch=amd64 target=Packages {authentic}] {mirror.uri} {suite} main\n"


def _write_index(lists: Iterable[Path], index: Path) -> None:
    """Note name, version and size of every package: lists hold 60 MB, and are asked often."""
    lines = []
    for path in lists:
        for stanza in path.read_text(errors="replace").split("\n\n"):
            fields = dict(_INDEXED.findall(stanza))
            if "Package" in fields and "Version" in fields:
                lines.append(f"{fields['Package']} {fields['Version']} {fields.get('Size', 0)}\n")
    scratch = index.with_suffix(".new")
    scratch.write_text("".join(lines))
    scratch.replace(index)
