"""Debian package versions in order (Debian Policy 5.6.12, deb-version(7))."""

import re

SortKey = tuple[tuple[tuple[int, ...], int], ...]

_PIECE = re.compile(r"(\D*)(\d*)")


def sort_key(version: str) -> tuple[int, SortKey, SortKey]:
    """Return a key that sorts version strings as `dpkg --compare-versions` does."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, dash, revision = rest.rpartition("-")
    if not dash:
        upstream, revision = rest, "0"
    return int(epoch) if epoch.isdigit() else 0, _part_key(upstream), _part_key(revision)


def _part_key(part: str) -> SortKey:
    pieces = [
        ((*(_weight(c) for c in text), 0), int(digits or 0))
        for text, digits in _PIECE.findall(part)
        if text or digits
    ]
    return (*pieces, ((0,), 0))


def _weight(char: str) -> int:
    """`~` sorts before the end of the part, letters before all other characters."""
    if char == "~":
        return -1
    return ord(char) if char.isalpha() else ord(char) + 256
