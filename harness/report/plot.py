"""Plots of figures over time, as SVG that needs nothing but itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from xml.sax.saxutils import escape, quoteattr

#: Colours that are told apart by most people, on white and on a dark page (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f6f9f", "#8c564b")

_WIDTH, _HEIGHT = 760, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 14, 34
_TICKS = 4


@dataclass(frozen=True)
class Point:
    """What one run measured: the lowest, the middle and the highest figure."""

    at: float
    """Seconds since the epoch."""
    low: float
    middle: float
    high: float
    count: int


@dataclass(frozen=True)
class Series:
    """The points of one line, oldest first."""

    title: str
    points: Sequence[Point]


def point(at: float, values: Sequence[float]) -> Point:
    """Return the point of a run's figures, of which there is one at least."""
    return Point(at, min(values), median(values), max(values), len(values))


def plot(series: Sequence[Series], shown: Callable[[float], str]) -> str:
    """Return an SVG: a line through the middles, a bar from the lowest to the highest.

    `shown` writes a figure for people, with its unit. The texts are escaped.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x = _scale([p.at for p in points], _LEFT, _WIDTH - _RIGHT)
    top = max(p.high for p in points) or 1.0
    # From zero: what looks small is small.
    y = _linear(0.0, top * 1.1, _HEIGHT - _BOTTOM, _TOP)
    body = [*_grid(y, top, shown), *_times(points, x)]
    for number, one in enumerate(series):
        body += _drawn(one, COLOURS[number % len(COLOURS)], x, y, shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' class="plot">{"".join(body)}</svg>'
    )


def colour(number: int) -> str:
    """Return the colour of the series of that number."""
    return COLOURS[number % len(COLOURS)]


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    if low == high:
        return lambda value: (start + end) / 2
    margin = (high - low) * 0.04
    return _linear(low - margin, high + margin, start, end)


def _grid(y: Callable[[float], float], top: float, shown: Callable[[float], str]) -> list[str]:
    found = []
    for number in range(_TICKS + 1):
        value = top * number / _TICKS
        at = f"{y(value):.1f}"
        found.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>')
        found.append(_text(shown(value), _LEFT - 8, y(value) + 4, "end"))
    return found


def _times(points: Sequence[Point], x: Callable[[float], float]) -> list[str]:
    first, last = min(p.at for p in points), max(p.at for p in points)
    pattern = "%Y-%m-%d" if last - first > 3 * 86400 else "%m-%d %H:%M"
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    return [
        _text(time.strftime(pattern, time.gmtime(at)), x(at), _HEIGHT - 10, anchor)
        for at, anchor in ends
    ]


def _drawn(
    series: Series,
    stroke: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
    shown: Callable[[float], str],
) -> list[str]:
    path = "L".join(f"{x(p.at):.1f} {y(p.middle):.1f}" for p in series.points)
    found = [f'<path fill="none" stroke="{stroke}" stroke-width="2" d="M{path}"/>']
    for p in series.points:
        told = f"{series.title}: {shown(p.middle)} ({shown(p.low)} to {shown(p.high)}, {p.count})"
        found.append(
            f'<path stroke="{stroke}" stroke-opacity=".45" stroke-width="3"'
            f' d="M{x(p.at):.1f} {y(p.low):.1f}V{y(p.high):.1f}"/>'
            f'<circle cx="{x(p.at):.1f}" cy="{y(p.middle):.1f}" r="4" fill={quoteattr(stroke)}>'
            f"<title>{escape(told)}</title></circle>"
        )
    return found


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
