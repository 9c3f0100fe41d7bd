"""Output in a notebook (Jupyter, Colab, VS Code): a live progress bar, and small HTML for values.

A bar is one display that is replaced, by IPython alone: rich's and tqdm's need ipywidgets besides. Texts in HTML are
escaped, as they may come from anybody; styles are inline and take the page's colors.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["NotebookBar", "curve_svg", "facts_html", "in_notebook"]


_SECONDS_BETWEEN = 0.1
"""Shortest time between two updates of a bar, which travel to the browser."""
_PATIENCE = 0.3
"""Work that is done before has no bar."""
_MOST_CHARS = 300
"""Longest text in a table."""
_MOST_POINTS = 200
"""Most points of a curve."""
_PICTURE_SIZE = 360, 110
"""Width and height of a picture, in pixels."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel; nothing is imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookBar:
    """A progress bar that is replaced in place; elsewhere than in a browser, a line of text.

    Args:
        total: Steps of the whole work; None: unknown.
        line: Returns the text beside the bar.
        clock: Returns seconds that only grow.
        at_once: Show the bar from the start, not only for longer work.
    """

    def __init__(
        self,
        total: int | None,
        line: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
        at_once: bool = True,
    ) -> None:
        self._total = total
        self._line = line
        self._clock = clock
        self._handle: Any = None
        self._next = -math.inf if at_once else clock() + _PATIENCE
        self._step = 0
        self._stale = False

    def update(self, step: int) -> None:
        """Show the progress, unless it was shown a moment ago."""
        self._step, self._stale = step, True
        if self._clock() >= self._next:
            self._show()

    def close(self) -> None:
        """Show the last step."""
        if self._stale and (self._handle is not None or self._clock() >= self._next):
            self._show()

    def _show(self) -> None:
        text = self._line()
        share = f'value="{self._step}" max="{max(self._total, 1)}"' if self._total is not None else ""
        html = (
            '<div style="display:flex;align-items:center;gap:0.8em">'
            f'<progress {share} style="width:16em"></progress><span>{escape(text)}</span></div>'
        )
        bundle = {"text/plain": text, "text/html": html}
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._stale, self._next = False, self._clock() + _SECONDS_BETWEEN


def facts_html(title: str, facts: Mapping[str, object], *, below: str = "") -> str:
    """A small table: a title, and one row for every fact that is known.

    Args:
        title: In bold above the rows.
        facts: Name -> value; those that are None or empty are left out, and long texts are shortened.
        below: HTML after the table, such as a curve.
    """
    cell = "padding:0.1em 0.9em 0.1em 0;text-align:left;vertical-align:top"
    rows = "".join(
        f'<tr><td style="{cell};opacity:0.7">{escape(_shorten(name))}</td>'
        f'<td style="{cell}">{escape(_shorten(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None and value != ""
    )
    return f'<div><strong>{escape(_shorten(title))}</strong><table style="margin:0">{rows}</table>{below}</div>'


def curve_svg(curves: Mapping[str, Sequence[tuple[float, float]]], *, label: str = "") -> str:
    """Curves as a small inline picture, the first solid and the others dashed; empty: there is nothing to draw.

    Args:
        curves: Name -> points (x, y); points that are not finite are left out, long curves are thinned out.
        label: What the picture shows, for readers that see no picture.
    """
    drawn = {name: _thin([p for p in points if all(map(math.isfinite, p))]) for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return ""
    xs, ys = ([point[axis] for points in drawn.values() for point in points] for axis in (0, 1))
    width, height = _PICTURE_SIZE
    left, low, high = min(xs), min(ys), max(ys)
    across, up = (width - 60) / ((max(xs) - left) or 1), (height - 24) / ((high - low) or 1)
    style = "font-size:10px;fill:currentColor;opacity:0.7"
    parts = [
        f'<text x="2" y="12" style="{style}">{high:.3g}</text>',
        f'<text x="2" y="{height - 12}" style="{style}">{low:.3g}</text>',
        f'<text x="{width - 6}" y="{height - 1}" text-anchor="end" style="{style}">{max(xs):,.0f}</text>',
    ]
    for number, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{44 + (x - left) * across:.1f},{8 + (high - y) * up:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if number else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="currentColor"{dashes}><title>{escape(name)}</title>'
            "</polyline>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` of the points, evenly chosen, the first and the last among them."""
    most = min(len(points), _MOST_POINTS)
    return [points[round(index * (len(points) - 1) / max(1, most - 1))] for index in range(most)]


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."
