"""Which knobs a kernel has: a named setting by its release, and single knobs turned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from harness.errors import NsvmError
from harness.model.knobs import KNOBS, SETTINGS, Knobs


class UnknownKnob(NsvmError):
    """There is no such setting, knob or value."""


_VERSIONS: Final = tuple(
    (tuple(map(int, name.split("."))), name) for name in SETTINGS if re.fullmatch(r"\d+\.\d+", name)
)


@dataclass(frozen=True)
class Setting:
    """A named setting, with knobs turned."""

    name: str
    turned: Mapping[str, str] = field(default_factory=dict)
    """Values as `Knob.key_of` writes them, by knob."""

    def knobs(self) -> Knobs:
        """Return the knobs.

        Raises UnknownKnob: no such setting, knob or value; says what there is.
        """
        if self.name not in SETTINGS:
            raise UnknownKnob(f"no setting is called {self.name}: there are {', '.join(SETTINGS)}")
        return SETTINGS[self.name].but(
            **{name: _value(name, key) for name, key in self.turned.items()}
        )

    def __str__(self) -> str:
        turned = [f"{name}={key}" for name, key in self.turned.items()]
        return ", ".join((self.name, *turned))


def _value(name: str, key: str) -> object:
    if name not in KNOBS:
        raise UnknownKnob(f"no knob is called {name}")
    try:
        return KNOBS[name].value_of(key)
    except KeyError:
        words = ", ".join(KNOBS[name].words)
        raise UnknownKnob(f"knob {name} has no value {key}: there are {words}") from None


def setting_for(release: str) -> str:
    """Return the setting of a kernel by its release: the newest one that is not newer.

    Raises UnknownKnob: the release names no version.
    """
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        raise UnknownKnob(f"kernel release {release!r} has no version: choose with --knobs")
    version = (int(numbers[1]), int(numbers[2]))
    fitting = [name for known, name in _VERSIONS if known <= version]
    return fitting[-1] if fitting else next(iter(SETTINGS))


def chosen(words: Sequence[str], release: str) -> Setting:
    """Return the setting that `--knobs` words choose: a setting's name, knobs as `name=value`.

    Raises UnknownKnob: a word is neither.
    """
    name, turned = setting_for(release) if not words else "", {}
    for word in words:
        knob, equals, value = word.partition("=")
        if equals:
            turned[knob] = value
        else:
            name = word
    setting = Setting(name or setting_for(release), turned)
    setting.knobs()
    return setting
