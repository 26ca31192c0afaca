"""All findings about one kernel, and which of the named settings it is nearest to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from harness.identify.finding import Finding
from harness.model.knobs import KNOBS, SETTINGS, Knob, Knobs


@dataclass(frozen=True)
class Difference:
    """A knob that is turned differently here than there."""

    knob: Knob
    here: Any
    there: Any
    like: str = ""
    """The first later setting that has the value which is here; none: empty."""

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        key_of = self.knob.key_of
        there = {"here": key_of(self.here), "there": key_of(self.there)}
        return {"knob": self.knob.name, **there, "like": self.like}

    def __str__(self) -> str:
        """Return the knob in words, here and there."""
        knob, like = self.knob, f", as in {self.like}" if self.like else ""
        here, there = knob.in_words(self.here), knob.in_words(self.there)
        return f"{knob.what}: {here}{like}; not: {there}"


@dataclass(frozen=True)
class Fit:
    """The nearest of the named settings, and what the kernel does otherwise."""

    setting: str
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """Return `6.12 exactly`, or `6.1, plus ...` for what later ones have, `but for ...`."""
        if not self.differences:
            return f"{self.setting} exactly"
        later = [each.knob.name for each in self.differences if each.like]
        others = [each.knob.name for each in self.differences if not each.like]
        parts = [f"plus {', '.join(later)}"] * bool(later)
        parts += [f"but for {', '.join(others)}"] * bool(others)
        return ", ".join([self.setting, *parts])


@dataclass(frozen=True)
class Report:
    """What the battery found out about a kernel: one finding for each knob."""

    findings: Mapping[str, Finding]

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Self:
        """Return the report of these findings, in the order of the knobs.

        A knob without a finding is not seen; of two findings the one that is seen counts.
        """
        found: dict[str, Finding] = {}
        for finding in findings:
            if finding.knob not in found or not found[finding.knob].seen:
                found[finding.knob] = finding
        missing = "no experiment said anything"
        return cls({name: found.get(name, Finding(name, None, missing)) for name in KNOBS})

    @property
    def seen(self) -> dict[str, Any]:
        """The values that are known, by knob."""
        return {name: each.value for name, each in self.findings.items() if each.seen}

    @property
    def not_seen(self) -> list[Finding]:
        """The knobs about which nothing is known, with the reasons."""
        return [each for each in self.findings.values() if not each.seen]

    def differences(self, setting: Knobs) -> tuple[Difference, ...]:
        """Return where the kernel is known to differ from a setting."""
        return tuple(
            Difference(KNOBS[name], value, getattr(setting, name))
            for name, value in self.seen.items()
            if value != getattr(setting, name)
        )

    def fit(self, settings: Mapping[str, Knobs] = SETTINGS) -> Fit:
        """Return the setting with the fewest differences; of equals the newest."""
        fits = [Fit(name, self.differences(knobs)) for name, knobs in settings.items()]
        best = min(reversed(fits), key=lambda fit: len(fit.differences))
        names = list(settings)
        later = {name: settings[name] for name in names[names.index(best.setting) + 1 :]}
        return Fit(best.setting, tuple(_with_origin(each, later) for each in best.differences))

    def knobs(self, settings: Mapping[str, Knobs] = SETTINGS) -> Knobs:
        """Return the kernel's own setting: as seen, and as in the nearest one where not."""
        return settings[self.fit(settings).setting].but(**self.seen)

    def to_plain(self) -> list[dict[str, Any]]:
        """Return this as JSON takes it; `from_plain` is the way back."""
        return [each.to_plain() for each in self.findings.values()]

    @classmethod
    def from_plain(cls, plain: Iterable[dict[str, Any]]) -> Self:
        """Return what `to_plain` was called on."""
        return cls.of(Finding.from_plain(each) for each in plain)


def _with_origin(difference: Difference, later: Mapping[str, Knobs]) -> Difference:
    name, here = difference.knob.name, difference.here
    like = next((each for each, knobs in later.items() if getattr(knobs, name) == here), "")
    return replace(difference, like=like)
