"""Charts of a view: cells of a matrix, profiles over layers or positions, and the change of the loss by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefixtune.explain.subject import blocks
from prefixtune.pages.document import Chart, HeatMap, Series, Table, numbers, texts
from prefixtune.pages.format import fixed, short, signed

__all__ = ["heat_map", "parts_chart", "profile_chart"]


_MOST_CELLS = 48
"""Along one side of a heat map; more are drawn as blocks of neighbours, whose values are added up."""


def heat_map(title: str, matrix: Sequence[Sequence[float]], x_label: str, y_label: str) -> HeatMap:
    """A matrix of shares, rows from top to bottom; columns beyond 48 in blocks. Rows may differ in length."""
    width = max(map(len, matrix))
    grouped = blocks(width, _MOST_CELLS)
    names = [span(block[0], block[-1]) for block in grouped]
    values = [[sum(row[index] for index in block if index < len(row)) for block in grouped] for row in matrix]
    rows = [str(index) for index in range(len(matrix))]
    largest = max(max(row) for row in values)
    at = next((y, x) for y, row in enumerate(values) for x, value in enumerate(row) if value == largest)
    table = Table(title, [texts(y_label, rows)] + [
        numbers(f"{x_label} {name}", [row[index] for row in values], short) for index, name in enumerate(names)
    ])  # fmt: skip
    description = f"The largest of {len(rows)} by {width} values is {short(largest)}, at {y_label} {rows[at[0]]}, "
    description += f"{x_label} {names[at[1]]}."
    return HeatMap(title, description, rows, names, values, x_label, y_label, table)


def span(first: int, last: int) -> str:
    """A number, or the first and last of a block.

    >>> span(3, 3), span(0, 4)
    ('3', '0-4')
    """
    return str(first) if first == last else f"{first}-{last}"


def profile_chart(title: str, lines: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Chart:
    """Values over layers or positions; the first line with markers."""
    series = [
        Series(name, list(enumerate(values)), style, kind="marked" if style == 0 and len(values) <= 48 else "plain")
        for style, (name, values) in enumerate(lines.items())
    ]
    count = max(map(len, lines.values()))
    columns = [
        numbers(name, [*values, *[None] * (count - len(values))], lambda value: "" if value is None else short(value))
        for name, values in lines.items()
    ]
    table = Table(title, [texts(x_label, range(count)), *columns])
    ends = "; ".join(f"{name}: {short(min(values))} to {short(max(values))}" for name, values in lines.items())
    return Chart(title, f"{ends}.", series, x_label, y_label, table)


def parts_chart(
    title: str, parts: Sequence[Mapping[str, Any]], what: str, random: Sequence[Mapping[str, Any]]
) -> Chart:
    """The change of the loss as each part alone is left out, with intervals; of a random prefix beside it."""
    names = [span(part["first"], part["last"]) for part in parts]
    row_of = {(part["first"], part["last"]): row for row, part in enumerate(parts)}
    shown = [("this prefix", parts), ("random, same norms", [p for p in random if (p["first"], p["last"]) in row_of])]
    series = [
        Series(
            name,
            [(part["change"], row_of[part["first"], part["last"]]) for part in chosen],
            style,
            [tuple(part["interval"]) for part in chosen] if all(part["interval"] for part in chosen) else (),
            kind="dots",
        )
        for style, (name, chosen) in enumerate(shown)
        if chosen
    ]
    table = Table(title, [
        texts(what, names),
        numbers("change of the loss", [part["change"] for part in parts], lambda value: signed(value, 4)),
        texts("95 % interval", [_interval(part["interval"]) for part in parts]),
    ])  # fmt: skip
    worst = max(parts, key=lambda part: float(part["change"]))
    description = f"The loss rises most, by {fixed(worst['change'], 3)}, without {what} "
    description += f"{span(worst['first'], worst['last'])}."
    return Chart(title, description, series, "change of the loss", what, table, rows=names)


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{signed(interval[0], 4)} to {signed(interval[1], 4)}"
