"""A document as one HTML page that needs no network, no fonts and no other files, and works without its script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files

from prefixtune.report.document import (
    Block,
    Chart,
    Charts,
    Column,
    Details,
    Document,
    Facts,
    Headline,
    Item,
    Listing,
    Outputs,
    Section,
    Table,
    Text,
    Value,
)
from prefixtune.report.format import MISSING, words
from prefixtune.report.markup import Safe, join, tag

__all__ = ["to_html"]


def to_html(document: Document) -> str:
    """The whole page; equal documents give equal text."""
    style, script = _asset("style.css"), _asset("script.js")
    # Even a text that got past the escaping could neither run nor fetch anything.
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", document.title),
        tag("style", style),
    )
    writer = _Writer()
    sections = [writer.section(section, 2) for section in document.sections]
    links = [
        tag("li", tag("a", section.title, href=f"#{identity}"))
        for section, identity in zip(document.sections, writer.tops, strict=True)
    ]
    body = tag(
        "body",
        tag("a", "Skip to the report", class_="skip", href="#report"),
        tag(
            "header",
            tag("h1", document.title),
            tag("p", document.subtitle, class_="subtitle") if document.subtitle else None,
            tag("nav", tag("ul", *links), aria_label="Contents"),
        ),
        tag("main", *sections, id="report"),
        tag("footer", tag("p", "Written by prefixtune report.")),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> Safe:
    return Safe(files("prefixtune.report").joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _Writer:
    """Writes blocks, and gives out ids.

    Attributes:
        tops: Ids of the uppermost sections, in order.
    """

    def __init__(self) -> None:
        self.tops: list[str] = []
        self._used: set[str] = set()

    def section(self, section: Section, level: int) -> Safe:
        identity = self._identity(section.title)
        if level == 2:
            self.tops.append(identity)
        heading = tag(f"h{min(level, 6)}", section.title, id=identity)
        # Only the uppermost are landmarks: more would be a thicket.
        name = identity if level == 2 else None
        return tag("section", heading, *self.blocks(section.blocks, level), aria_labelledby=name)

    def blocks(self, blocks: Sequence[Block], level: int) -> list[Safe]:
        return [self.block(block, level) for block in blocks]

    def block(self, block: Block, level: int) -> Safe:
        if isinstance(block, Section):
            return self.section(block, level + 1)
        if isinstance(block, Details):
            return tag("details", tag("summary", block.title), *self.blocks(block.blocks, level))
        if isinstance(block, Charts):
            return tag("div", *(self.chart(chart) for chart in block.charts), class_="charts")
        if isinstance(block, Table):
            return self.table(block)
        if isinstance(block, Outputs):
            return self.outputs(block)
        return _simple(block)

    def chart(self, chart: Chart) -> Safe:
        legend = [tag("li", picture, name) for name, picture in chart.legend]
        return tag(
            "figure",
            tag("figcaption", chart.title),
            tag("ul", *legend, class_="legend") if len(legend) > 1 else None,
            chart.svg,
            tag("details", tag("summary", "Figures as a table"), self.table(chart.table)),
        )

    def table(self, table: Table) -> Safe:
        identity = self._identity(f"table {table.caption}")
        heads = [
            tag("th", column.name, _small(column.small), scope="col", class_=_classes(column))
            for column in table.columns
        ]
        rows = []
        for row in table.rows:
            cells = []
            for index, (value, column) in enumerate(zip(row, table.columns, strict=True)):
                is_head = index < table.num_headers
                cells.append(
                    tag(
                        "th" if is_head else "td",
                        _best(value),
                        _small(value.small),
                        scope="row" if is_head else None,
                        class_=_classes(column, value),
                        data_value=value.number,
                    )
                )
            rows.append(tag("tr", *cells))
        # The caption stays in sight while a wide table is moved sideways.
        caption = tag("caption", tag("span", table.caption), id=identity)
        return tag(
            "div",
            tag("table", caption, tag("thead", tag("tr", *heads)), tag("tbody", *rows)),
            class_="scroll",
            role="region",
            tabindex=0,
            aria_labelledby=identity,
        )

    def outputs(self, outputs: Outputs) -> Safe:
        """The examples; the filter is shown by the script, without which it could do nothing."""
        identity = self._identity("filter")
        search = tag(
            "p",
            tag("label", "Show only examples with", for_=identity),
            tag("input", type="search", id=identity, autocomplete="off"),
            tag("span", role="status"),
            class_="filter",
            hidden=True,
        )
        lists = [tag("ul", *(_item(item, outputs.systems) for item in outputs.sample), class_="items")]
        if outputs.others:
            others = tag("ul", *(_item(item, outputs.systems) for item in outputs.others), class_="items")
            title = f"The other {len(outputs.others):,} examples"
            lists.append(tag("details", tag("summary", title), others))
        return tag("div", search, *lists, class_="outputs")

    def _identity(self, text: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "part"
        identity, number = base, 1
        while identity in self._used or identity == "report":
            number += 1
            identity = f"{base}-{number}"
        self._used.add(identity)
        return identity


def _simple(block: Text | Listing | Facts | Headline) -> Safe:
    if isinstance(block, Text):
        return (
            tag("p", tag("strong", "Note: "), block.text, class_="warning") if block.warning else tag("p", block.text)
        )
    if isinstance(block, Listing):
        return tag("ul", *(tag("li", item) for item in block.items), class_="notes")
    if isinstance(block, Facts):
        pairs = [tag("div", tag("dt", name), tag("dd", text)) for name, text in block.items]
        return tag("dl", *pairs, class_="facts")
    figures = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", _best(Value(figure, best=index in block.best)), _small(small)),
            class_="best" if index in block.best else None,
        )
        for index, (name, figure, small) in enumerate(block.items)
    ]
    return join(tag("p", block.what, class_="what"), tag("dl", *figures, class_="headline"))


def _classes(column: Column, value: Value | None = None) -> str | None:
    names = ["number"] * column.numeric + ["group"] * column.begins_group
    if value is not None and not column.numeric:
        names += ["short"] * (len(value.text) <= 28)
    if value is not None:
        names += ["missing"] * (value.text == MISSING)
    return " ".join(names) or None


def _best(value: Value) -> Safe:
    if not value.best:
        return join(value.text)
    star = tag("span", "★", aria_hidden="true", class_="star")
    return join(tag("strong", value.text), star, tag("span", " (best)", class_="unseen"))


def _small(text: str) -> Safe | None:
    return tag("small", text) if text else None


def _item(item: Item, systems: Sequence[str]) -> Safe:
    """An example: source, references, and the output of each system."""
    example = item.example
    groups = "".join(f" · {words(kind)}: {name}" for kind, name in example.groups.items())
    references = tag("ul", *(tag("li", text, dir="auto") for text in example.references))
    pairs = [
        tag("div", tag("dt", "source"), tag("dd", example.source, dir="auto"), class_="source"),
        tag("div", tag("dt", "references" if len(example.references) > 1 else "reference"), tag("dd", references))
        if example.references
        else None,
    ]
    for name, output in zip(systems, item.outputs, strict=True):
        if output is None:
            text = tag("dd", tag("em", "no output"))
        elif not output.strip():
            text = tag("dd", tag("em", "empty"))
        else:
            text = tag("dd", output, dir="auto")
        match = tag("span", "= a reference", class_="match") if output in example.references else None
        pairs.append(tag("div", tag("dt", name, match), text, class_="system"))
    return tag("li", tag("p", f"Example {example.index}{groups}", class_="meta"), tag("dl", *pairs))
