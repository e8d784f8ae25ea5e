"""Points -> inline SVG that any page can hold: no script, no font, no request.

Colours come from the page's style sheet: classes v0 (baseline), v1 (candidate), interval, even.
Positions are in the units of a view box of WIDTH x HEIGHT.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
MAX_POINTS = 400

Point = tuple[float, float]
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Scale:
    """Values -> positions, evenly or by their logarithm.

    Attributes:
        low: value at `start`.
        high: value at `end`; above `low`.
        start: a position.
        end: likewise.
        is_log: whether equal ratios are equally far apart.
        is_whole: whether only whole numbers are told.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    is_whole: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within, about five."""
        if self.is_log and self.high / self.low >= 10:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            found = [digit * 10.0**power for power in powers for digit in digits]
        else:
            rough = max((self.high - self.low) / 5, 1.0 if self.is_whole else 0.0)
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.9)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            found = [round(number * step, 12) for number in range(first, last + 1)]
        return [
            value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)
        ]


def x_scale(values: Iterable[float], pad: float = 0.0) -> Scale:
    """Along the bottom, around all values; by logarithm where they span more than tenfold."""
    return _around(list(values), LEFT, WIDTH - RIGHT, pad)


def y_scale(values: Iterable[float], pad: float = 0.08) -> Scale:
    """Up the left side, likewise."""
    return _around(list(values), HEIGHT - BOTTOM, TOP, pad)


def _around(values: list[float], start: float, end: float, pad: float) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        return Scale(low / (1 + pad), high * (1 + pad), start, end, is_log=True)
    room = (high - low) * pad or abs(high) * 0.05 * (high == low) or (high == low)
    return Scale(low - room, high + room, start, end)


def chart(title: str, x: Scale, y: Scale, x_label: str, y_label: str, marks: Iterable[str]) -> str:
    """Axes, grid and labels around marks.

    Args:
        title: for those who cannot see it.
        x: as from `x_scale`.
        y: as from `y_scale`.
        x_label: what lies along the bottom, with its unit.
        y_label: what goes up, with its unit.
        marks: elements as the functions below give them.
    """
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts.append(f"<title>{escape(title)}</title>")
    for value in y.ticks():
        at = y(value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks():
        at, foot = x(value), HEIGHT - BOTTOM
        parts.append(_line(at, foot, at, foot + 4, "tick"))
        parts.append(f'<text x="{at:.1f}" y="{foot + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "tick"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    side = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(13 {side}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join([*parts, *marks, "</svg>"])


def line(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> str:
    """A line through points, in their order."""
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return f'<polyline class="series {kind}" points="{path}"/>'


def steps(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> str:
    """A line that goes right to each point's place before it goes up to it."""
    corners = [points[0]]
    for (_, before), (to, after) in zip(points, points[1:], strict=False):
        corners += [(to, before), (to, after)]
    return line(corners, x, y, kind)


def dots(points: Sequence[tuple[float, float, str]], x: Scale, y: Scale, kind: str) -> str:
    """A dot at each point, with a text that shows when it is pointed at."""
    return "".join(
        f'<circle class="dot {kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5">'
        f"<title>{escape(text)}</title></circle>"
        for a, b, text in points
    )


def labels(points: Sequence[tuple[float, float, str]], x: Scale, y: Scale) -> str:
    """A text beside each point, on the side where there is more room."""
    found = []
    for a, b, text in points:
        is_left = x(a) < (LEFT + WIDTH - RIGHT) / 2
        at, anchor = (x(a) + 8, "start") if is_left else (x(a) - 8, "end")
        found.append(
            f'<text x="{at:.1f}" y="{y(b) + 4:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    return "".join(found)


def crosses(points: Sequence[tuple[float, str]], x: Scale, at: float, kind: str) -> str:
    """A cross at each place, all at one height `at`, with a text."""
    return "".join(
        f'<path class="cross {kind}" d="M{x(a) - 3:.1f} {at - 3:.1f}l6 6m0-6l-6 6">'
        f"<title>{escape(text)}</title></path>"
        for a, text in points
    )


def level(value: float, y: Scale, kind: str) -> str:
    """A line across."""
    return _line(LEFT, y(value), WIDTH - RIGHT, y(value), kind)


def band(low: float, high: float, y: Scale) -> str:
    """An interval, shaded across."""
    top, foot = sorted((y(low), y(high)))
    width = WIDTH - RIGHT - LEFT
    height = max(foot - top, 1)
    return (
        f'<rect class="interval" x="{LEFT}" y="{top:.1f}" width="{width}" height="{height:.1f}"/>'
    )


def thinned(points: Sequence[Drawn]) -> list[Drawn]:
    """At most MAX_POINTS of them, evenly picked, ends included."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (MAX_POINTS - 1))] for number in range(MAX_POINTS)]


def interval_bar(ratio: float, low: float, high: float, reach: tuple[float, float]) -> str:
    """A ratio and its interval against 1, on one line, to stand in a table.

    Args:
        ratio: above 0.
        low: likewise.
        high: likewise.
        reach: lowest and highest value of all bars of the table; 1 lies between.
    """
    scale = Scale(*reach, 4, 156, is_log=True)
    kind = "better" if low > 1 else "worse" if high < 1 else "same"
    return (
        f'<svg class="bar {kind}" viewBox="0 0 160 16" role="img"><title>{low:.3f} to {high:.3f}'
        f"</title>{_line(scale(1), 0, scale(1), 16, 'even')}"
        f"{_line(scale(low), 8, max(scale(high), scale(low) + 1), 8, 'range')}"
        f'<circle cx="{scale(ratio):.1f}" cy="8" r="3.5"/></svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
