"""What a link does to what is sent over it, in the words of tc-netem(8)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from harness.errors import HostError

LEAST_RATE_BIT_S: Final = 8_000.0
LONGEST_DELAY_S: Final = 60.0


class ShapeError(HostError):
    """A link that cannot be had was asked for; one line says why."""


@dataclass(frozen=True)
class LinkShape:
    """A link, the same in both directions. Probabilities are from 0 to 1, for each packet."""

    rate_bit_s: float | None = None
    """None is as fast as it goes."""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """The delay varies by so much, evenly; packets overtake each other by it."""
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Of being sent without delay."""
    limit_packets: int = 1000
    """That wait for their turn; more are dropped."""

    @classmethod
    def parse(cls, text: str) -> LinkShape:
        """Return the link that a text describes: ``rate=10mbit,delay=20ms,loss=1%``.

        Raises ShapeError: it does not.
        """
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in _READERS:
                known = ", ".join(f"{name}={what}" for name, (_, what, _) in _READERS.items())
                raise ShapeError(f"link: {part.strip()!r} is none of {known}")
            field, _, read = _READERS[name]
            if field in given:
                raise ShapeError(f"link: {name} is there twice")
            given[field] = read(name, value)
        return cls(**given)._checked()

    @classmethod
    def from_json(cls, data: Any) -> LinkShape:
        """Return what `to_json` was called on."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    def cut(self) -> LinkShape:
        """Return the same link with nothing getting through."""
        # A duplicate is not lost with its original.
        return replace(self, loss=1.0, duplicate=0.0)

    def __str__(self) -> str:
        shown = {
            "rate": self.rate_bit_s and f"{self.rate_bit_s:.10g}bit",
            "delay": self.delay_s and f"{self.delay_s * 1e3:.10g}ms",
            "jitter": self.jitter_s and f"{self.jitter_s * 1e3:.10g}ms",
            **{
                name: getattr(self, name) and f"{getattr(self, name) * 100:.10g}%"
                for name in ("loss", "duplicate", "reorder")
            },
            "limit": self.limit_packets != _DEFAULT_LIMIT and str(self.limit_packets),
        }
        return ",".join(f"{name}={value}" for name, value in shown.items() if value)

    def _checked(self) -> LinkShape:
        if self.reorder and not self.delay_s:
            raise ShapeError("link: reorder needs a delay, which some packets then do not have")
        if self.jitter_s > self.delay_s:
            raise ShapeError("link: jitter is more than delay")
        return self


_DEFAULT_LIMIT: Final = next(f.default for f in fields(LinkShape) if f.name == "limit_packets")

_NUMBER: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z%]*)")

# bit/s are powers of 1000, as tc(8) has it.
_RATES: Final = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _quantity(name: str, text: str, units: dict[str, float]) -> float:
    found = _NUMBER.fullmatch(text.strip().lower())
    if found is None or found[2] not in units:
        raise ShapeError(f"link: {name}={text}: a number with one of {', '.join(units)}, please")
    value = float(found[1]) * units[found[2]]
    if not math.isfinite(value):
        raise ShapeError(f"link: {name}={text} is too much")
    return value


def _rate(name: str, text: str) -> float:
    value = _quantity(name, text, _RATES)
    # netem's rate is a number of bytes in 32 bits, as pyroute2 gives it.
    if not LEAST_RATE_BIT_S <= value < 8 << 32:
        raise ShapeError(f"link: {name}={text}: from {LEAST_RATE_BIT_S / 1e3:g}kbit to 34gbit")
    return value


def _time(name: str, text: str) -> float:
    value = _quantity(name, text, _TIMES)
    if value > LONGEST_DELAY_S:
        raise ShapeError(f"link: {name}={text}: {LONGEST_DELAY_S:g}s at most")
    return value


def _share(name: str, text: str) -> float:
    value = _quantity(name, text, {"%": 1e-2})
    if value > 1:
        raise ShapeError(f"link: {name}={text}: 100% at most")
    return value


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise ShapeError(f"link: {name}={text}: a number of packets, please")
    return int(text)


#: What is written, the field that it becomes, an example, and who reads it.
_READERS: Final[dict[str, tuple[str, str, Callable[[str, str], Any]]]] = {
    "rate": ("rate_bit_s", "10mbit", _rate),
    "delay": ("delay_s", "20ms", _time),
    "jitter": ("jitter_s", "5ms", _time),
    "loss": ("loss", "1%", _share),
    "duplicate": ("duplicate", "1%", _share),
    "reorder": ("reorder", "1%", _share),
    "limit": ("limit_packets", "1000", _count),
}
