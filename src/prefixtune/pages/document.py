"""A report as a tree of blocks, before it is HTML. Every text in it is plain: the templates escape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefixtune.pages.format import MISSING, Number, count, short, spread_out

_MOST_POINTS = 12
"""Of a line, in the table of a chart."""


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Attributes:
        small: An interval or a spread, under the text.
        number: To sort by.
        best: Whether it is the best of its column.
        significant: Whether it differs from all others by more than chance.
        interval: A confidence interval, to compare with others.
    """

    text: str
    small: str = ""
    number: Number | None = None
    best: bool = False
    significant: bool = False
    interval: tuple[Number, Number] | None = None


@dataclass(frozen=True)
class Facts:
    """Names with their values, of which empty ones are left out."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Column:
    """A column: its name and small print, its values from top to bottom, and whether they are numbers."""

    name: str
    values: Sequence[Value]
    small: str = ""
    numeric: bool = True


def texts(name: str, values: Iterable[object]) -> Column:
    """A column of words."""
    return Column(name, [Value(str(value)) for value in values], numeric=False)


def numbers(name: str, values: Iterable[Number | None], write: Callable[[Any], str]) -> Column:
    """A column of numbers, as `write` writes them."""
    return Column(name, [Value(write(value), number=value) for value in values])


@dataclass(frozen=True)
class Table:
    """A table whose first `num_headers` columns name the row."""

    caption: str
    columns: Sequence[Column]
    num_headers: int = 1

    @property
    def rows(self) -> list[tuple[Value, ...]]:
        """The values from left to right, row by row."""
        return list(zip(*(column.values for column in self.columns), strict=True))


@dataclass(frozen=True)
class Series:
    """What one system or run has in a chart.

    Attributes:
        points: x and y, finite.
        style: Index of its colour, dashes and marker.
        ranges: Low and high end of the error bar of each dot; empty for none.
        kind: `marked`: a line with markers; `plain`: without; `faint`: behind the others; `dots`: markers alone,
            of which x is the value and y the row.
    """

    name: str
    points: Sequence[tuple[Number, Number]]
    style: int
    ranges: Sequence[tuple[Number, Number]] = ()
    kind: Literal["marked", "plain", "faint", "dots"] = "marked"


@dataclass(frozen=True)
class Chart:
    """A picture, and its figures as a table.

    Attributes:
        description: For a reader who cannot see the picture.
        rows: Names of the rows from top to bottom, where values are dots in rows; empty: lines over x.
    """

    title: str
    description: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    rows: Sequence[str] = ()

    @property
    def table(self) -> Table:
        """Its figures: of lines, some points of each, the last among them."""
        if not self.rows:
            points = [(s.name, *point) for s in self.series for point in spread_out(s.points, _MOST_POINTS)]
            names, at, found = zip(*points, strict=True) if points else ((), (), ())
            return Table(
                f"{self.title}: the figures",
                [texts("curve", names), numbers(self.x_label, at, count), numbers(self.y_label, found, short)],
            )
        columns = []
        for series in self.series:
            cells = [Value(MISSING)] * len(self.rows)
            for (value, row), span in itertools.zip_longest(series.points, series.ranges):
                small = f"[{short(span[0])}, {short(span[1])}]" if span and span[0] < span[1] else ""
                cells[int(row)] = Value(short(value), small, value)
            columns.append(Column(series.name, cells))
        return Table(f"{self.title}: the figures", [texts(self.y_label, self.rows), *columns])


@dataclass(frozen=True)
class HeatMap:
    """A picture of a matrix, the darker the larger, and its figures as a table.

    Attributes:
        description: For a reader who cannot see the picture.
        rows: Names of the rows from top to bottom.
        columns: Names of the columns.
        values: Row by row, finite; those below zero are drawn in another colour.
    """

    title: str
    description: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    x_label: str
    y_label: str

    @property
    def table(self) -> Table:
        """Its figures."""
        columns = zip(self.columns, zip(*self.values, strict=True), strict=True)
        cells = [numbers(f"{self.x_label} {name}", values, short) for name, values in columns]
        return Table(f"{self.title}: the figures", [texts(self.y_label, self.rows), *cells])


@dataclass(frozen=True)
class Outputs:
    """Examples with the output of each system, None where a system has none: a sample, and the others.

    An example has a `number`, a `source`, `references`, and `groups` (kind of group -> the one that it belongs to).
    """

    systems: Sequence[str]
    sample: Sequence[tuple[Any, Sequence[str | None]]]
    others: Sequence[tuple[Any, Sequence[str | None]]]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading, or folded away under their title."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


Picture = Chart | HeatMap
Block = Text | Listing | Facts | Table | tuple[Picture, ...] | Outputs | Section
"""Charts are next to each other, where there is room."""


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        subtitle: What it is about, in a line.
        warnings: Why the report may be incomplete; they are also at its top.
        command: What wrote it.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    command: str = "report"

    @property
    def charts(self) -> list[Picture]:
        """All charts with something to draw, in order."""
        return [chart for section in self.sections for chart in _charts(section) if is_drawn(chart)]


def is_drawn(picture: Picture) -> bool:
    """Whether there is something to draw."""
    return bool(picture.values if isinstance(picture, HeatMap) else picture.series)


def _charts(section: Section) -> Iterator[Picture]:
    for block in section.blocks:
        if isinstance(block, Section):
            yield from _charts(block)
        elif isinstance(block, tuple):
            yield from block
