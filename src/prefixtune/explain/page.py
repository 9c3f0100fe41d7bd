"""The views of a prefix as a document: a sentence, pictures and tables each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.explain.subject import blocks as in_blocks
from prefixtune.explain.view import SHOWS, View
from prefixtune.pages.document import (
    Block,
    Chart,
    Document,
    Facts,
    HeatMap,
    Listing,
    Section,
    Series,
    Table,
    Text,
    Value,
    numbers,
    texts,
)
from prefixtune.pages.format import MISSING, fixed, short, signed

__all__ = ["compose"]


_MOST_ROWS = 64
"""Of a table of positions."""
_MOST_CELLS = 48
"""Along one side of a heat map; more are drawn as blocks of neighbours, whose values are added up."""
_NAMES = {"random": "random, same norms", "shuffled": "values shuffled", "other": "other prefix"}


def compose(views: Sequence[View], facts: Sequence[tuple[str, str]], title: str) -> Document:
    """Make a document of the views that are done.

    Args:
        views: In order.
        facts: Names and values of what was looked at.
        title: Of the page.
    """
    missing = [f"{view.title} is left out: {view.left_out}" for view in views if view.left_out]
    summary: list[Block] = [Facts(list(facts))]
    if missing:
        summary.append(Listing(missing))
    sections = [Section(view.title, _blocks(view)) for view in views if not view.left_out]
    return Document(title, "", [Section("Summary", summary), *sections], command="explain")


def _blocks(view: View) -> list[Block]:
    write: Mapping[str, Callable[[Mapping[str, Any]], list[Block]]] = {
        "attention": _attention,
        "loss": _loss,
        "nearest": _nearest,
        "description": _description,
    }
    blocks: list[Block] = [Text(SHOWS[view.name])]
    blocks += [Listing(view.notes)] if view.notes else []
    return blocks + write[view.name](view.numbers)


def name_of(control: str) -> str:
    """A control as a reader knows it."""
    return _NAMES.get(control, control)


# --- views ------------------------------------------------------------------------------------------------------------


def _attention(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for site, mass in found["sites"].items():
        controls = {name_of(name): by_site[site] for name, by_site in found["controls"].items() if site in by_site}
        totals = [("this prefix", mass["total"])] + [(name, each["total"]) for name, each in controls.items()]
        facts = [(name, Value(f"{total:.1%}", number=total)) for name, total in totals]
        facts.append(("this prefix, without its first position", Value(f"{mass['total_without_first']:.1%}")))
        lines = {"this prefix": mass["by_layer"]} | {name: each["by_layer"] for name, each in controls.items()}
        blocks += [
            Facts(facts, f"share of the attention at {site}, mean over layers and heads"),
            (
                heat_map(
                    f"Attention by layer and position ({site})", mass["by_layer_and_position"], "position", "layer"
                ),
                profile_chart(f"Attention by layer ({site})", lines, "layer", "share of attention"),
            ),
        ]
    return blocks


def _loss(found: Mapping[str, Any]) -> list[Block]:
    rows = [("this prefix", found["whole"], None), ("without the prefix", found["without_prefix"], "change")]
    rows += [(name_of(name), each, "change") for name, each in found["controls"].items()]
    table = Table(
        f"Loss per label on {found['rows']} rows ({found['labels']:,} labels), with 95 % intervals over the rows",
        [
            texts("prefix", [name for name, _, _ in rows]),
            numbers("loss", [each["loss"] for _, each, _ in rows], lambda value: fixed(value, 3)),
            texts("change", [MISSING if key is None else _change(each) for _, each, key in rows]),
        ],
    )
    by = "their mean over positions"
    sides = [(name, found[name]) for name in ("keys", "values") if name in found]
    blocks: list[Block] = [table]
    if sides:
        facts: list[tuple[str, str | Value]] = [(name, _change(each)) for name, each in sides]
        blocks += [Text(f"Keys or values of all layers replaced by {by}; change of the loss:"), Facts(facts)]
    charts = []
    if found["positions"]:
        charts.append(
            parts_chart("Loss without a position", found["positions"], "position", _random(found, "positions"))
        )
    for site in dict.fromkeys(part["site"] for part in found["layers"]):
        parts = [part for part in found["layers"] if part["site"] == site]
        random = [part for part in _random(found, "layers") if part["site"] == site]
        charts.append(parts_chart(f"Loss with a layer replaced by {by} ({site})", parts, "layer", random))
    return [*blocks, tuple(charts)] if charts else blocks


def _random(found: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    parts: Sequence[Mapping[str, Any]] = found.get("random_parts", {}).get(key, [])
    return parts


def _change(part: Mapping[str, Any]) -> str:
    interval = part.get("interval")
    span = "" if interval is None or "loss" in part else f" [{signed(interval[0], 3)}, {signed(interval[1], 3)}]"
    return f"{signed(part['change'], 3)}{span}"


def _nearest(found: Mapping[str, Any]) -> list[Block]:
    means = {"this prefix": found["mean_best"], **{name_of(name): each for name, each in found["controls"].items()}}
    means = {("real text" if name == "text" else name): each for name, each in means.items()}
    table = Table(
        "Cosine of the nearest token, mean over positions",
        [texts("prefix", means), numbers("values", means.values(), lambda value: fixed(value, 3))],
    )
    shown = found["positions"][:_MOST_ROWS]
    columns = [
        texts("position", [row["position"] for row in shown]),
        texts("nearest", [" · ".join(f"{n['token']!r} {n['cosine']:.2f}" for n in row["nearest"]) for row in shown]),
        texts("where", [row["nearest"][0]["context"] if row["nearest"] else "" for row in shown]),
    ]
    caption = f"Nearest tokens among {found['tokens']:,} of {found['corpus']}"
    if len(found["positions"]) > len(shown):
        caption += f"; the first {len(shown)} of {len(found['positions'])} positions"
    return [table, Table(caption, columns)]


def _description(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (name, question, said)
        for name, by_question in found["descriptions"].items()
        for question, said in by_question.items()
    ]
    names = {"prefix": "this prefix", "bare": "no prefix"}
    if "unrelated" in found:
        rows.append(("(an unrelated task)", "", found["unrelated"]))
    table = Table(
        "What the model writes when it is asked for the task, and the share of the prefix's gain that these words "
        "bring in its place",
        [
            texts("prefix", [names.get(name, name_of(name)) for name, _, _ in rows]),
            texts("question", [question.replace("_", " ") for _, question, _ in rows]),
            texts("description", [said["text"] or "(nothing)" for _, _, said in rows]),
            numbers("loss", [said.get("loss") for _, _, said in rows], lambda v: fixed(v, 3)),
            numbers("faithfulness", [said.get("faithfulness") for _, _, said in rows], lambda v: fixed(v, 2)),
        ],
        num_headers=2,
    )
    asked = Table(
        "The questions",
        [
            texts("question", [name.replace("_", " ") for name in found["questions"]]),
            texts("text", found["questions"].values()),
        ],
    )
    blocks: list[Block] = [table, Section("The questions", [asked], folded=True)]
    if "bare_loss" in found:
        gain = f"{found['bare_loss']:.3f} without and {found['prefix_loss']:.3f} with the prefix"
        blocks.insert(0, Text(f"Loss per label on {found['rows']} rows: {gain}."))
    return blocks


# --- pictures ---------------------------------------------------------------------------------------------------------


def heat_map(title: str, matrix: Sequence[Sequence[float]], x_label: str, y_label: str) -> HeatMap:
    """A matrix of shares, rows from top to bottom; columns beyond 48 in blocks. Rows may differ in length."""
    width = max(map(len, matrix))
    grouped = in_blocks(width, _MOST_CELLS)
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
        texts("95 % interval", [_span(part["interval"]) for part in parts]),
    ])  # fmt: skip
    worst = max(parts, key=lambda part: float(part["change"]))
    description = f"The loss rises most, by {fixed(worst['change'], 3)}, without {what} "
    description += f"{span(worst['first'], worst['last'])}."
    return Chart(title, description, series, "change of the loss", what, table, rows=names)


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{signed(interval[0], 4)} to {signed(interval[1], 4)}"
