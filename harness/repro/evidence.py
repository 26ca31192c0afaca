"""What reproducers showed on which kernels, recorded: `evidence.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.repro.table import ReproError

FILE = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True)
class Seen:
    """One reproducer on one kernel."""

    colour: str
    """A value of `Colour`."""
    what: str
    """The case, or the experiment and its knob, that decided."""
    saw: str
    """The first lines of what was seen."""
    host: str
    """Kind of host, with the silicon."""


#: By the reproducer's name, then by kernel: ``RELEASE`` or ``RELEASE:VARIANT``.
Evidence = dict[str, dict[str, Seen]]


def load(path: Path = FILE) -> Evidence:
    """Return what was recorded; nothing, if nothing was.

    Raises:
        ReproError: the file is damaged.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {kernel: Seen(**seen) for kernel, seen in kernels.items()}
            for name, kernels in plain.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ReproError(f"{path}: {e}") from e


def record(new: Evidence, path: Path = FILE) -> None:
    """Add evidence to what was recorded; what there is of the same kernel is replaced.

    Raises:
        ReproError: the file is damaged, or cannot be written.
    """
    merged = load(path)
    for name, kernels in new.items():
        merged.setdefault(name, {}).update(kernels)
    plain = {
        name: {kernel: asdict(seen) for kernel, seen in sorted(kernels.items())}
        for name, kernels in sorted(merged.items())
    }
    try:
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ReproError(f"cannot write {path}: {e.strerror}") from e


def kernels_of(evidence: Mapping[str, Seen], colour: str) -> list[str]:
    """Return the kernels on which this colour was seen."""
    return [kernel for kernel, seen in evidence.items() if seen.colour == colour]
