"""A report as a tree of blocks, before it is HTML or Markdown. Every text in it is plain: the templates escape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixtune.report.format import Number
from prefixtune.report.results import Output

__all__ = [
    "NUM_STYLES",
    "Block",
    "Chart",
    "Charts",
    "Column",
    "Details",
    "Document",
    "Facts",
    "Headline",
    "Item",
    "Listing",
    "Outputs",
    "Section",
    "Series",
    "Table",
    "Text",
    "Value",
]


NUM_STYLES = 8
"""Colours that series have before they are repeated."""


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
class Facts:
    """Names with their values."""

    items: Sequence[tuple[str, str]]


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
class Headline:
    """The main figure of each system, by its name; `what` is measured."""

    what: str
    items: Sequence[tuple[str, Value]]


@dataclass(frozen=True)
class Column:
    """A column: its name and small print, its values from top to bottom, and whether they are numbers."""

    name: str
    values: Sequence[Value]
    small: str = ""
    numeric: bool = True
    begins_group: bool = False


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
        ranges: Low and high end of each point's error bar; empty for none.
        kind: `marked`: a line with markers; `plain`: without; `faint`: behind the others; `level`: only the first
            point's y counts, drawn across; `dots`: markers alone, of which x is the value and y the row.
    """

    name: str
    points: Sequence[tuple[Number, Number]]
    style: int
    ranges: Sequence[tuple[Number, Number]] = ()
    kind: Literal["marked", "plain", "faint", "level", "dots"] = "marked"


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
    table: Table
    rows: Sequence[str] = ()


@dataclass(frozen=True)
class Charts:
    """Charts next to each other, where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Item:
    """One example with the output of each system; None where a system has none."""

    example: Output
    outputs: Sequence[str | None]


@dataclass(frozen=True)
class Outputs:
    """Outputs next to each other: a sample, and the others."""

    systems: Sequence[str]
    sample: Sequence[Item]
    others: Sequence[Item]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


Block = Text | Listing | Facts | Headline | Table | Charts | Outputs | Details | Section


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        subtitle: What it is about, in a line.
        warnings: Why the report may be incomplete; they are also at its top.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
