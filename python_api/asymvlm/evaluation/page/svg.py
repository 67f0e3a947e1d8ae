"""Plots as SVG text: they scale with the page, need no script, and carry their description.

A plot is as wide as a phone, 360 units, so that its letters are read there as they are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 40
# by Okabe and Ito, told apart by colour-blind readers too; the yellow is too light for a line on paper
COLOURS = ("#0072B2", "#D55E00", "#007A5A", "#B0528A", "#1F1F1F", "#946200", "#3A7CA5", "#7A4FA3")
SHAPES = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Point:
    """``error`` is a standard error of y; ``about`` is told on hovering."""

    x: float
    y: float
    error: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one method, joined in order."""

    name: str
    points: Sequence[Point]
    place: int  # which colour and shape
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A range with its round marks."""

    low: float
    high: float
    marks: Sequence[float]
    label: str

    @classmethod
    def over(cls, values: Iterable[float], label: str, floor: float | None = None) -> Axis:
        """From the smallest to the largest of the values, or from ``floor``, rounded outwards."""
        values = list(values)
        low, high = min(values) if floor is None else floor, max(values)
        step = _step((high - low) or abs(high) or 1.0)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        marks = [float(f"{number * step:.12g}") for number in range(first, last + 1)]  # 0.3, not 0.30000000000000004
        return cls(marks[0], marks[-1], marks, label)

    def at(self, value: float) -> float:
        """Where on the axis, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def text(self, mark: float) -> str:
        step = self.marks[1] - self.marks[0]
        return f"{mark:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def scatter(series: Sequence[Series], x: Axis, y: Axis, title: str) -> str:
    """Points with error bars, joined by lines."""
    inside = [_frame(x, y)]
    for one in series:
        colour = COLOURS[one.place % len(COLOURS)]
        found = [(_x(x, point.x), _y(y, point.y), point) for point in one.points]
        if len(found) > 1:
            dash = ' stroke-dasharray="5 3"' if one.dashed else ""
            line = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in found)
            inside.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        for left, top, point in found:
            inside.append(_point(left, top, point, one.place, y))
    return _svg(title, "".join(inside))


def bars(edges: Sequence[float], counts: Sequence[int], x: Axis, y: Axis, title: str) -> str:
    """A histogram: ``counts[i]`` between ``edges[i]`` and ``edges[i + 1]``."""
    inside = [_frame(x, y)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        left, top = _x(x, low), _y(y, count)
        size = f'width="{max(_x(x, high) - left - 1, 0.5):.1f}" height="{_y(y, y.low) - top:.1f}"'
        about = f"<title>{count} from {low:.3g} to {high:.3g}</title>"
        inside.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{COLOURS[0]}">{about}</rect>')
    return _svg(title, "".join(inside))


def key(place: int) -> str:
    """A small picture of a series' mark, for the legend."""
    mark = _mark(7, 7, _shape(place), COLOURS[place % len(COLOURS)])
    return f'<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{mark}</svg>'


def _step(span: float) -> float:
    """A round distance that divides a span into four to eight parts."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if rough <= power * factor * (1 + 1e-9))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for mark in y.marks:
        at = f"{_y(y, mark):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at}" dy="0.35em" text-anchor="end">{y.text(mark)}</text>')
    for mark in x.marks:
        at = f"{_x(x, mark):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}" stroke="#555"/>')
        parts.append(f'<text x="{at}" y="{bottom + 15}" text-anchor="middle">{x.text(mark)}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#555"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    turn = f'transform="rotate(-90 11 {(TOP + bottom) / 2})" x="11" y="{(TOP + bottom) / 2}"'
    parts.append(f'<text {turn} text-anchor="middle">{escape(y.label)}</text>')
    return "".join(parts)


def _point(left: float, top: float, point: Point, place: int, y: Axis) -> str:
    colour = COLOURS[place % len(COLOURS)]
    bar = ""
    if point.error:
        ends = [_y(y, min(max(point.y + sign * point.error, y.low), y.high)) for sign in (-1, 1)]
        low, high = (f"{end:.1f}" for end in ends)
        bar = f'<path d="M{left:.1f} {low}V{high}M{left - 3:.1f} {low}h6M{left - 3:.1f} {high}h6" stroke="{colour}"/>'
    return f"<g>{bar}{_mark(left, top, _shape(place), colour)}<title>{escape(point.about)}</title></g>"


def _shape(place: int) -> str:
    """Another one when the colours begin anew, so that 32 series look different."""
    return SHAPES[(place + place // len(COLOURS)) % len(SHAPES)]


def _mark(left: float, top: float, shape: str, colour: str) -> str:
    corners = {
        "square": ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        "triangle": ((0, -4.5), (4.5, 3.5), (-4.5, 3.5)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }
    if shape == "circle":
        return f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colour}"/>'
    points = " ".join(f"{left + x:.1f},{top + y:.1f}" for x, y in corners[shape])
    return f'<polygon points="{points}" fill="{colour}"/>'


def _svg(title: str, inside: str) -> str:
    told = escape(title, quote=True)
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">{inside}</svg>'


__all__ = ["Axis", "Point", "Series", "bars", "key", "scatter"]
