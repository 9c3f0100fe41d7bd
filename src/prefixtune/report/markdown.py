"""A document as GitHub Markdown: the same words and figures as the page, with tables in place of charts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prefixtune.report.document import (
    Block,
    Charts,
    Column,
    Details,
    Document,
    Facts,
    Headline,
    Listing,
    Outputs,
    Section,
    Table,
    Text,
    Value,
)
from prefixtune.report.format import words
from prefixtune.report.markup import clean

__all__ = ["to_markdown"]


_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#!]|:(?=\w))")
# At the start of a line these would begin a list, a heading under the line before, or a number.
_START = re.compile(r"^([-+=](?!\d)|\d+(?=[.)](?:\s|$)))")


def to_markdown(document: Document) -> str:
    """The whole document; equal documents give equal text."""
    lines = [f"# {_inline(document.title)}", ""]
    if document.subtitle:
        lines += [_inline(document.subtitle), ""]
    for section in document.sections:
        lines += _block(section, 1)
    return "\n".join(lines).rstrip("\n") + "\n"


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = _SPECIAL.sub(r"\\\1", " ".join(clean(text).split()))
    match = _START.match(escaped)
    if match is None:
        return escaped
    end = match.end() if match[1].isdigit() else 0
    return f"{escaped[:end]}\\{escaped[end:]}"


def _block(block: Block, level: int) -> Iterator[str]:
    if isinstance(block, Section):
        yield from (f"{'#' * min(level + 1, 6)} {_inline(block.title)}", "")
        for inner in block.blocks:
            yield from _block(inner, level + 1)
    elif isinstance(block, Details):
        yield from (f"**{_inline(block.title)}**", "")
        for inner in block.blocks:
            yield from _block(inner, level)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Charts):
        for chart in block.charts:
            yield from (f"**{_inline(chart.title)}.** {_inline(chart.description)}", "")
            yield from _table(chart.table)
    elif isinstance(block, Outputs):
        yield from _outputs(block)
    else:
        yield from _simple(block)


def _simple(block: Text | Listing | Facts | Headline) -> Iterator[str]:
    if isinstance(block, Text):
        yield f"> **Note:** {_inline(block.text)}" if block.warning else _inline(block.text)
    elif isinstance(block, Listing):
        yield from (f"- {_inline(item)}" for item in block.items)
    elif isinstance(block, Facts):
        yield from (f"- {_inline(name)}: {_inline(text)}" for name, text in block.items)
    else:
        yield from (f"{_inline(block.what)}:", "")
        for index, (name, figure, small) in enumerate(block.items):
            shown = _value(Value(figure, small, best=index in block.best))
            yield f"- {_inline(name)}: {shown}"
    yield ""


def _table(table: Table) -> Iterator[str]:
    yield from (f"{_inline(table.caption)}:", "")
    yield from _rows(table.columns, table.rows)


def _rows(columns: Sequence[Column], rows: Sequence[Sequence[Value]]) -> Iterator[str]:
    heads = [_inline(column.name) + (f" ({_inline(column.small)})" if column.small else "") for column in columns]
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---:' if column.numeric else '---' for column in columns)} |"
    for row in rows:
        yield f"| {' | '.join(map(_value, row))} |"
    yield ""


def _value(value: Value) -> str:
    text = _inline(value.text)
    text = f"**{text}** ★" if value.best else text
    if not value.small:
        return text
    small = _inline(value.small)
    return f"{text} {small}" if value.small.startswith("[") else f"{text} ({small})"


def _outputs(outputs: Outputs) -> Iterator[str]:
    columns = [Column("", numeric=False), Column("text", numeric=False)]
    for item in outputs.sample:
        example = item.example
        groups = "".join(f", {words(kind)}: {name}" for kind, name in example.groups.items())
        rows = [[Value("source"), Value(example.source)]]
        rows += [[Value("reference"), Value(text)] for text in example.references]
        for name, output in zip(outputs.systems, item.outputs, strict=True):
            rows.append([Value(name), Value("(no output)" if output is None else output or "(empty)")])
        yield from (f"**Example {example.index}{_inline(groups)}**", "")
        yield from _rows(columns, rows)
    if outputs.others:
        yield from (f"The other {len(outputs.others):,} examples are in the HTML file.", "")
