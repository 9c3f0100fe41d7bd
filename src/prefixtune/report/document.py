"""A report as a tree of blocks, before it is HTML or Markdown. Every text in it is plain: the writers escape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefixtune.report.format import Number
from prefixtune.report.markup import Safe
from prefixtune.report.results import Output

__all__ = [
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
    "Table",
    "Text",
    "Value",
]


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
class Headline:
    """The main figure of each system.

    Attributes:
        what: What is measured.
        items: Name, figure, and small print.
        best: Indices of the best items.
    """

    what: str
    items: Sequence[tuple[str, str, str]]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Column:
    """A column's name, its small print, and whether it holds numbers."""

    name: str
    small: str = ""
    numeric: bool = True
    begins_group: bool = False


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Attributes:
        small: An interval or a spread, under the text.
        number: To sort by.
    """

    text: str
    small: str = ""
    number: Number | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first `num_headers` columns name the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    num_headers: int = 1


@dataclass(frozen=True)
class Chart:
    """A picture, and its figures as a table.

    Attributes:
        description: For a reader who cannot see the picture.
        legend: The name of each series and the picture of its line.
    """

    title: str
    description: str
    svg: Safe
    legend: Sequence[tuple[str, Safe]]
    table: Table


@dataclass(frozen=True)
class Charts:
    """Charts side by side, where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Item:
    """One example with the output of each system; None where a system has none."""

    example: Output
    outputs: Sequence[str | None]


@dataclass(frozen=True)
class Outputs:
    """Outputs side by side: a sample, and the others."""

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
