"""Line charts and bars as SVG strings. Colours come from the page's style, so that dark mode works.

Series differ by colour, dashes and markers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefixtune.report.format import Number, short
from prefixtune.report.markup import Safe, join, tag

__all__ = ["Bar", "Line", "bar_chart", "line_chart", "swatch"]


NUM_STYLES = 8
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 32, 44
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.8L4.5 3.4h-9z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 4.8L4.5 -3.4h-9z",
    "M-4.4 -1.6h2.8v-2.8h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8z",
)
DASHES = (None, "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4", "4 4 1 4")


@dataclass(frozen=True)
class Line:
    """A series over x.

    Attributes:
        points: x and y.
        style: Index of its colour, dashes and marker.
        ranges: Low and high end of each point's error bar; empty for none.
        kind: `marked`: a line with markers; `plain`: without; `faint`: behind the others; `level`: only the first
            point's y counts, drawn across.
    """

    points: Sequence[tuple[Number, Number]]
    style: int
    ranges: Sequence[tuple[Number, Number]] = ()
    kind: str = "marked"


@dataclass(frozen=True)
class Bar:
    """One bar, or a missing one; `span` is its error bar."""

    value: float | None
    text: str
    style: int
    span: tuple[float, float] | None = None


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, identity: str, title: str, text: str) -> Safe:
    """Lines over a number.

    The x axis is logarithmic, with the data's own values as ticks, where there are few values of x and they span a
    factor of ten, as sizes of data do.

    Args:
        lines: At least one, with finite points.
        x_label: Below the axis.
        y_label: Above the picture.
        identity: Prefix of the ids in the picture.
        title: Its name for a screen reader.
        text: Its description for a screen reader.
    """
    x_values = sorted({x for line in lines if line.kind != "level" for x, _ in line.points}) or [0.0]
    few = len(x_values) <= 12 and any(line.kind == "marked" and line.ranges for line in lines)
    logarithmic = few and x_values[0] > 0 and x_values[-1] >= 10 * x_values[0]
    x_axis = _Axis(x_values[0], x_values[-1], LEFT + 10 * few, WIDTH - RIGHT - 10 * few, logarithmic)
    y_axis = _Axis(*_y_limits(lines), HEIGHT - BOTTOM, TOP)
    parts = [_grid(y_axis), _x_ticks(x_axis, x_values if few else _ticks(x_values[0], x_values[-1], 6))]
    parts.append(tag("text", y_label, class_="label", x=0, y=16))
    parts.append(tag("text", x_label, class_="label", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    several = sum(line.kind == "marked" for line in lines)
    for index, line in enumerate(lines):
        # Error bars at the same point would hide each other.
        shift = 5.0 * (index - (several - 1) / 2) if line.ranges and several > 1 else 0.0
        parts.append(_line(line, x_axis, y_axis, shift))
    return _picture(HEIGHT, identity, title, text, parts)


def bar_chart(
    groups: Sequence[tuple[str, Sequence[Bar]]], *, x_label: str, identity: str, title: str, text: str
) -> Safe:
    """Horizontal bars from zero, each group under its name; the arguments are as in `line_chart`."""
    bars = [bar for _, group in groups for bar in group]
    ends = [end for bar in bars for end in (bar.value, *(bar.span or ())) if end is not None] or [0.0]
    low, high = min(0.0, *ends), max(0.0, *ends)
    ticks = _ticks(low, high, 5)
    # Room at the right for the figures.
    axis = _Axis(min(low, ticks[0]), max(high, ticks[-1], low + 1e-9), 8, WIDTH - 76)
    tall = 11 if len(groups[0][1]) > 2 else 14
    y, parts = 42.0, list[Safe]()
    for name, group in groups:
        parts.append(tag("text", name, class_="name", x=0, y=_at(y)))
        y += 7
        for bar in group:
            parts.append(_bar(bar, axis, y, tall))
            y += tall + 3
        y += 23
    height = y
    grid = [
        join(
            tag("line", class_="grid" if tick else "axis", x1=x, x2=x, y1=24, y2=_at(height - 20)),
            tag("text", short(tick), class_="tick", x=x, y=_at(height - 4), text_anchor="middle"),
        )
        for tick in ticks
        for x in [_at(axis(tick))]
    ]
    label = tag("text", x_label, class_="label", x=0, y=16)
    return _picture(height, identity, title, text, [*grid, label, *parts])


def swatch(style: int, kind: str = "marked") -> Safe:
    """A small picture of a series, for a legend; `bar` is a kind too."""
    if kind == "bar":
        inside = tag("rect", x=4, y=3, width=16, height=8, rx=1, fill="currentColor")
    else:
        flat = Line([(0, 0)], style, kind=kind)
        inside = tag("path", d="M0 7h24", class_="line", **_stroke(flat))
        if kind == "marked":
            inside = join(inside, _marker(style, 12, 7))
    return tag("svg", inside, class_=f"swatch {_style(style)}", viewBox="0 0 24 14", aria_hidden="true")


class _Axis:
    """From values to coordinates in the picture."""

    def __init__(self, low: Number, high: Number, start: Number, end: Number, logarithmic: bool = False) -> None:
        self.change = math.log if logarithmic else float
        self.low, self.high = self.change(low), self.change(high)
        self.start, self.end = start, end

    def __call__(self, value: Number) -> float:
        share = (self.change(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def _y_limits(lines: Sequence[Line]) -> tuple[Number, Number]:
    """Room for every line and error bar; a faint line may leave the picture, so that it flattens nothing."""
    firm = [y for line in lines if line.kind != "faint" for _, y in line.points]
    firm += [end for line in lines for span in line.ranges for end in span]
    faint = sorted(y for line in lines if line.kind == "faint" for _, y in line.points)
    values = firm + faint[math.ceil(0.02 * len(faint)) : math.ceil(0.98 * len(faint))] or [0.0]
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def _ticks(low: Number, high: Number, most: int) -> list[Number]:
    """Round numbers between two ends.

    >>> _ticks(0, 68.2, 5)
    [0.0, 20.0, 40.0, 60.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{multiple * step:.10g}") for multiple in range(first, last + 1)]


def _grid(axis: _Axis) -> Safe:
    parts = []
    for tick in _ticks(axis.low, axis.high, 5):
        y = _at(axis(tick))
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", short(tick), class_="tick", x=LEFT - 8, y=_at(axis(tick) + 4.5), text_anchor="end"))
    return join(*parts)


def _x_ticks(axis: _Axis, values: Sequence[Number]) -> Safe:
    bottom = HEIGHT - BOTTOM
    parts = [tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)]
    free_from = -math.inf
    for value in values:
        x, text = axis(value), short(value)
        parts.append(tag("line", class_="axis", x1=_at(x), x2=_at(x), y1=bottom, y2=bottom + 4))
        half = 6.0 * len(text)
        if x - half >= free_from:
            parts.append(tag("text", text, class_="tick", x=_at(x), y=bottom + 20, text_anchor="middle"))
            free_from = x + half
    return join(*parts)


def _line(line: Line, x_axis: _Axis, y_axis: _Axis, shift: float) -> Safe:
    if line.kind == "level":
        y = _at(y_axis(line.points[0][1]))
        path = f"M{LEFT} {y}H{WIDTH - RIGHT}"
    else:
        # What leaves the picture runs along its edge.
        inside = [(x, min(max(y, y_axis.low), y_axis.high)) for x, y in line.points]
        path = "".join(
            f"{'L' if n else 'M'}{_at(x_axis(x) + shift)} {_at(y_axis(y))}" for n, (x, y) in enumerate(inside)
        )
    parts = [tag("path", d=path, class_="line", **_stroke(line))]
    for (x, _), (low, high) in zip(line.points, line.ranges, strict=False):
        if high > low:
            center, top, bottom = x_axis(x) + shift, _at(y_axis(high)), _at(y_axis(low))
            ends = f"M{_at(center - 4)} {top}h8M{_at(center)} {top}V{bottom}M{_at(center - 4)} {bottom}h8"
            parts.append(tag("path", d=ends, class_="whisker"))
    if line.kind == "marked":
        parts += [_marker(line.style, x_axis(x) + shift, y_axis(y)) for x, y in line.points]
    return tag("g", *parts, class_=_style(line.style))


def _stroke(line: Line) -> dict[str, str | int | float | None]:
    if line.kind == "faint":
        return {"stroke_width": 1, "stroke_opacity": 0.35}
    width = 1.3 if line.kind == "level" else 2
    return {"stroke_width": width, "stroke_dasharray": DASHES[line.style % len(DASHES)]}


def _marker(style: int, x: Number, y: Number) -> Safe:
    return tag("path", d=MARKERS[style % len(MARKERS)], class_="marker", transform=f"translate({_at(x)} {_at(y)})")


def _bar(bar: Bar, axis: _Axis, y: float, tall: int) -> Safe:
    zero, middle = axis(0.0), y + tall / 2
    end = zero if bar.value is None else axis(bar.value)
    left, reach = min(zero, end), max(zero, end)
    parts = [tag("rect", x=_at(left), y=_at(y), width=_at(reach - left), height=tall, rx=1, fill="currentColor")]
    if bar.span is not None:
        low, high = (_at(axis(value)) for value in bar.span)
        ends = f"M{low} {_at(middle - 3)}v6M{low} {_at(middle)}H{high}M{high} {_at(middle - 3)}v6"
        # In dark mode bars are nearly as light as the text: an edge sets the line off.
        parts += [tag("path", d=ends, class_="span edge"), tag("path", d=ends, class_="span")]
        reach = max(reach, axis(bar.span[1]))
    parts.append(tag("text", bar.text, class_="figure", x=_at(reach + 6), y=_at(middle + 4)))
    return tag("g", *parts, class_=_style(bar.style))


def _picture(height: Number, identity: str, title: str, text: str, parts: Sequence[str]) -> Safe:
    return tag(
        "svg",
        tag("title", title, id=f"{identity}-title"),
        tag("desc", text, id=f"{identity}-text"),
        *parts,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {_at(height)}",
        role="img",
        aria_labelledby=f"{identity}-title {identity}-text",
    )


def _style(style: int) -> str:
    return f"s{style % NUM_STYLES}"


def _at(coordinate: Number) -> str:
    """A coordinate in the picture, to a tenth: equal inputs give equal bytes on every machine."""
    return f"{coordinate:.1f}".removesuffix(".0")
