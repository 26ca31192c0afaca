"""The table of reproducers: one known bug each, with what shows it.

A reproducer is shown by scenarios (`cases`), by an experiment of `harness.identify` (`knob`) or by
races for fields of vmcb12 (`races`, fields of `harness.race`). Each way it names the symptom that
its bug has, so that another failure is not taken for it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.identify.battery import MODULES as _EXPERIMENT_MODULES
from harness.identify.finding import EXPERIMENTS, Experiment

FILE = Path(__file__).with_name("reproducers.toml")

_REQUIRED = ("name", "claim", "mechanism", "fix", "since")
_LISTS = ("kernels", "cases", "bad", "races", "needs", "variants")
_SHOWN_BY = ("cases", "knob", "races")


class ReproError(HarnessError):
    """There is no such reproducer, or the table is not as it must be."""


@dataclass(frozen=True)
class Reproducer:
    """One known bug."""

    name: str
    #: What a kernel without the bug does.
    claim: str
    #: Why the bug does something else, and what.
    mechanism: str
    #: The commits that mend it, as ``hash ("title")``; or why none is named.
    fix: str
    #: The version that has the fix, ``-`` if none has.
    since: str
    #: Series of Debian's kernels known to have it.
    kernels: tuple[str, ...] = ()
    #: Ids of scenarios' cases that FAIL by it.
    cases: tuple[str, ...] = ()
    #: Expression for what a FAIL by this bug says, in its reason, kernel log or last console lines.
    symptom: str = ""
    #: In place of cases: a knob of `harness.model.knobs`,
    knob: str = ""
    #: its values that are the bug,
    bad: tuple[str, ...] = ()
    #: and kvm_amd's parameters for the experiment, other than the defaults.
    params: Mapping[str, str] | None = None
    #: In place of cases or a knob: fields of `harness.race.fields`. A window in one is the bug.
    races: tuple[str, ...] = ()
    #: What a host must have beside nested SVM, in words.
    needs: tuple[str, ...] = ()
    #: Variants of kernels that have the bug built in (`nsvm kernel build --variant`).
    variants: tuple[str, ...] = ()
    #: May end the host: not on a local one, unless asked for.
    unsafe: bool = False
    #: Only on this kind of host; empty for any.
    host: str = ""

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment that sees `knob`."""
        return experiment_of(self.knob)

    def symptom_in(self, text: str) -> str | None:
        """Return the part of a failure's text that is this bug's symptom; None if nothing is."""
        found = re.search(self.symptom, text, re.DOTALL)
        return found[0] if found else None

    def has_bug(self, kernel: str) -> bool:
        """Say whether a kernel, ``RELEASE`` or ``RELEASE:VARIANT``, is known to have the bug."""
        release, _, variant = kernel.partition(":")
        if variant in self.variants:
            return True
        return any(re.match(re.escape(series) + r"(?!\d)", release) for series in self.kernels)


def experiment_of(knob: str) -> Experiment:
    """Return the experiment that sees a knob.

    Raises:
        ReproError: none does.
    """
    for each in EXPERIMENTS.values():
        if knob in each.knobs:
            return each
    where = ", ".join(module.__name__ for module in _EXPERIMENT_MODULES)
    raise ReproError(f"no experiment of {where} sees a knob {knob!r}")


def load(path: Path = FILE) -> dict[str, Reproducer]:
    """Return the reproducers of a file by name, in its order.

    Raises:
        ReproError: the file is not as it must be; names the entry and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise ReproError(f"{path}: {e}") from e
    table: dict[str, Reproducer] = {}
    for number, entry in enumerate(data.get("reproducer", ()), 1):
        one = _reproducer(f"{path}: reproducer {number} ({entry.get('name', 'no name')})", entry)
        if one.name in table:
            raise ReproError(f"{path}: two reproducers have the name {one.name!r}")
        table[one.name] = one
    return table


def choose(table: Mapping[str, Reproducer], names: Sequence[str]) -> list[Reproducer]:
    """Return the reproducers of these names.

    Raises:
        ReproError: there is none of a name.
    """
    for name in names:
        if name not in table:
            raise ReproError(f"no reproducer {name!r}; nsvm repro list shows all {len(table)}")
    return [table[name] for name in dict.fromkeys(names)]


def _reproducer(where: str, entry: dict[str, Any]) -> Reproducer:
    for key in _REQUIRED:
        if not entry.get(key):
            raise ReproError(f"{where}: no {key}")
    if not entry.get("kernels") and not entry.get("variants"):
        raise ReproError(f"{where}: neither kernels nor variants have it")
    if unknown := sorted(set(entry) - {field.name for field in fields(Reproducer)}):
        raise ReproError(f"{where}: unknown key {unknown[0]!r}")
    _check_what_shows_it(where, entry)
    lists = {key: _texts(where, key, entry[key]) for key in _LISTS if key in entry}
    return Reproducer(**{**entry, **lists})


def _check_what_shows_it(where: str, entry: dict[str, Any]) -> None:
    shown_by = [key for key in _SHOWN_BY if entry.get(key)]
    if len(shown_by) != 1:
        raise ReproError(f"{where}: give one of {', '.join(_SHOWN_BY)}")
    partner = {"cases": "symptom", "knob": "bad"}.get(shown_by[0])
    if partner and not entry.get(partner):
        raise ReproError(f"{where}: no {partner}")
    try:
        re.compile(entry.get("symptom", ""))
    except re.error as e:
        raise ReproError(f"{where}: symptom: {e}") from e
    if entry.get("knob"):
        experiment_of(entry["knob"])


def _texts(where: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ReproError(f"{where}: {key} must be a list of texts")
    return tuple(value)
