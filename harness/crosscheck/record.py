"""Bundles: a sequence that showed a difference, with all that it takes to repeat it, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.crosscheck.checker import Difference
from harness.crosscheck.notation import BadNotation, in_words, sequence_from, to_plain
from harness.crosscheck.settings import Setting, UnknownKnob
from harness.errors import NsvmError
from harness.model.operations import Operation, Value

FORMAT: Final = "nsvm-crosscheck"
VERSION: Final = 1


class BadBundle(NsvmError):
    """A file is no bundle."""


@dataclass(frozen=True)
class Bundle:
    """One recorded sequence."""

    operations: tuple[Operation, ...]
    setting: Setting
    """The knobs of the model that differed."""
    kernel: str = ""
    """The release of the kernel that it was seen on."""
    what: str = ""
    """In words."""
    difference: Mapping[str, Any] = field(default_factory=dict)
    """`step`, `operation`, `name`, `expected`, `seen`; empty if there is none: the two agree."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Seed, number of the sequence, host, what the kernel said: whatever helps to understand."""

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "what": self.what,
            "kernel": self.kernel,
            "knobs": {"setting": self.setting.name, "turned": dict(self.setting.turned)},
            "operations": [to_plain(each) for each in self.operations],
            "difference": dict(self.difference),
            "evidence": dict(self.evidence),
        }

    def write(self, path: Path) -> None:
        """Write it to a file.

        Raises BadBundle: that cannot be written.
        """
        try:
            path.write_text(json.dumps(self.to_plain(), indent=1) + "\n")
        except OSError as e:
            raise BadBundle(f"cannot write {path}: {e.strerror}") from e


def plain_difference(difference: Difference) -> dict[str, Any]:
    """Return a difference as a bundle holds it."""
    return {
        "step": difference.step,
        "operation": in_words(difference.operation),
        "name": difference.name,
        "expected": difference.expected,
        "seen": difference.seen,
    }


def read_bundle(path: Path) -> Bundle:
    """Read a bundle from a file.

    Raises BadBundle: there is none in it; says why in one line.
    """
    try:
        plain = json.loads(path.read_text())
    except OSError as e:
        raise BadBundle(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise BadBundle(f"{path}: no JSON: {e}") from e
    try:
        return bundle_from(plain)
    except (BadBundle, BadNotation, UnknownKnob) as e:
        raise BadBundle(f"{path}: {e}") from e


def bundle_from(plain: Any) -> Bundle:
    """Return the bundle that JSON holds.

    Raises BadBundle: it is none.
    Raises BadNotation: an operation in it is none.
    Raises UnknownKnob: it names knobs that there are not.
    """
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise BadBundle(f"no bundle of nsvm crosscheck: its format is not {FORMAT}")
    if plain.get("version") != VERSION:
        raise BadBundle(f"version {plain.get('version')!r}; this harness knows {VERSION}")
    operations = sequence_from(plain.get("operations"))
    if not operations:
        raise BadBundle("it has no operations")
    knobs = _mapping(plain, "knobs")
    setting = Setting(_text(knobs, "setting"), _texts(_mapping(knobs, "turned")))
    setting.knobs()
    difference = _mapping(plain, "difference")
    if difference and not set(_DIFFERENCE) <= set(difference):
        raise BadBundle(f"its difference lacks one of {', '.join(_DIFFERENCE)}")
    return Bundle(
        operations,
        setting,
        kernel=_text(plain, "kernel"),
        what=_text(plain, "what"),
        difference=difference,
        evidence=_mapping(plain, "evidence"),
    )


_DIFFERENCE: Final = ("step", "name", "expected", "seen")


def _mapping(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name, {})
    if not isinstance(value, dict):
        raise BadBundle(f"{name} is no object")
    return value


def _text(plain: Mapping[str, Any], name: str) -> str:
    value = plain.get(name, "")
    if not isinstance(value, str):
        raise BadBundle(f"{name} is no text")
    return value


def _texts(plain: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(plain, name) for name in plain}


def told(difference: Mapping[str, Any]) -> str:
    """Return a recorded difference in words."""
    return (
        f"step {difference['step']}, {difference.get('operation', '?')}: {difference['name']}:"
        f" the model says {_shown(difference['expected'])},"
        f" the machine {_shown(difference['seen'])}"
    )


def _shown(value: Value) -> str:
    return hex(value) if type(value) is int else str(value)


def steps_in_words(operations: Sequence[Operation]) -> list[str]:
    """Return one line for each operation, numbered."""
    return [f"{number:3} {in_words(each)}" for number, each in enumerate(operations)]
