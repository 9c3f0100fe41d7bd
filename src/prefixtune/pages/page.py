"""A document as one HTML page that needs no other files, and as GitHub Markdown: the same words and figures."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefixtune.pages.document import Document, Picture, is_drawn
from prefixtune.pages.figures import inline_svg, save_figure
from prefixtune.pages.format import MISSING, clean, words
from prefixtune.utils.markdown import escape_markdown

__all__ = ["is_own_markdown", "save_figures", "to_html", "to_markdown"]


MOST_FIGURES = 64
"""Charts that are drawn; of the others there is only the table."""
_LAST_LINE = re.compile(rb"<!-- Written by prefixtune [a-z]+\. -->\s*\Z")
"""Of the Markdown, as its template writes it."""
# At the start of a line these would begin a list, a heading under the line before, or a number.
_START = re.compile(r"^([-+=](?!\d)|\d+(?=[.)](?:\s|$)))")


def to_html(document: Document) -> str:
    """The whole page; equal documents give equal text."""
    unique, drawn = _Names(), 0

    def svg(chart: Picture) -> str:
        nonlocal drawn
        drawn += 1
        return inline_svg(chart, unique(f"chart {chart.title}")) if drawn <= MOST_FIGURES else ""

    unique("report")
    sections = [(unique(section.title), section) for section in document.sections]
    page = _environment(clean).get_template("page.html")
    names = {"unique": unique, "svg": svg, "missing": MISSING, "most_figures": MOST_FIGURES}
    return page.render(document=document, sections=sections, **names).lstrip()


def to_markdown(document: Document) -> str:
    """The whole document; equal documents give equal text."""
    return _environment(_Escaped).get_template("page.md").render(document=document).strip("\n") + "\n"


def is_own_markdown(path: Path) -> bool:
    """Whether a file ends as `to_markdown` ends it, so that a new report may replace it.

    Raises:
        OSError: It cannot be read.
    """
    return _LAST_LINE.search(path.read_bytes()) is not None


def save_figures(document: Document, folder: Path) -> list[str]:
    """Write the first charts to a folder, as SVG, PDF, PNG and CSV; returns the files' names without their ends.

    Raises:
        PrefixError: A file cannot be written.
    """
    unique, names = _Names(), list[str]()
    for chart in document.charts[:MOST_FIGURES]:
        names.append(unique(chart.title))
        save_figure(chart, folder / names[-1])
    return names


@functools.cache
def _environment(write: Callable[[Any], Any]) -> Environment:
    """Templates that escape everything; `write` prepares each text for its format."""
    environment = Environment(
        loader=PackageLoader("prefixtune.pages"),
        autoescape=True,
        finalize=write,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "digest": _digest,
        "kind": lambda block: type(block).__name__,
        "drawn": is_drawn,
        "words": words,
    }
    return environment


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _Escaped(str):
    """Text that Markdown shows as it is, on one line; what a template already wrote stays."""

    __slots__ = ()

    def __new__(cls, text: object) -> _Escaped:
        if hasattr(text, "__html__"):
            return super().__new__(cls, text)
        escaped = escape_markdown(clean(str(text)))
        match = _START.match(escaped)
        if match is not None:
            end = match.end() if match[1].isdigit() else 0
            escaped = f"{escaped[:end]}\\{escaped[end:]}"
        return super().__new__(cls, escaped)

    def __html__(self) -> str:
        return self


class _Names:
    """Makes names of letters, digits and hyphens, each of them once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def __call__(self, text: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "part"
        name, number = base, 1
        while name in self._used:
            number += 1
            name = f"{base}-{number}"
        self._used.add(name)
        return name
