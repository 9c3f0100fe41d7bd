"""A document as one HTML page that needs no other files, and its charts as files."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefixtune.pages.document import Document, Picture, is_drawn
from prefixtune.pages.figures import inline_svg, save_figure
from prefixtune.pages.format import MISSING, clean, words


def to_html(document: Document) -> str:
    """The whole page; equal documents give equal text."""
    unique = _Names()

    def svg(chart: Picture) -> str:
        return inline_svg(chart, unique(f"chart {chart.title}"))

    unique("report")
    sections = [(unique(section.title), section) for section in document.sections]
    page = _environment().get_template("page.html")
    return page.render(document=document, sections=sections, unique=unique, svg=svg, missing=MISSING).lstrip()


def save_figures(document: Document, folder: Path) -> list[str]:
    """Write all charts to a folder, as SVG, PDF, PNG and CSV; returns the files' names without their ends.

    Raises:
        PrefixError: A file cannot be written.
    """
    unique, names = _Names(), list[str]()
    for chart in document.charts:
        names.append(unique(chart.title))
        save_figure(chart, folder / names[-1])
    return names


@functools.cache
def _environment() -> Environment:
    """Templates that escape everything."""
    environment = Environment(
        loader=PackageLoader("prefixtune.pages"),
        autoescape=True,
        finalize=clean,
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
