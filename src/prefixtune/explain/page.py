"""The views of a prefix as a document: a sentence, tables and pictures each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.explain.subject import SHOWS, View
from prefixtune.explain.subject import blocks as in_blocks
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
    numbers,
    texts,
)
from prefixtune.pages.format import MISSING, fixed, short, signed

__all__ = ["compose"]


_MOST_ROWS = 64
"""Of a table of positions."""
_MOST_CELLS = 48
"""Along one side of a heat map; more are drawn as blocks of neighbours, whose values are added up."""
_NAMES = {
    "prefix": "this prefix",
    "bare": "no prefix",
    "random": "random, same norms",
    "shuffled": "values shuffled",
    "other": "other prefix",
    "text": "real text",
}
Found = Mapping[str, Any]


def compose(views: Sequence[View], facts: Sequence[tuple[str, str]], title: str) -> Document:
    """Make a document of the views that are done.

    Args:
        views: In order.
        facts: Names and values of what was looked at.
        title: Of the page.
    """
    missing = [f"{view.title} is left out: {view.left_out}" for view in views if view.left_out]
    summary: list[Block] = [Facts(list(facts)), *([Listing(missing)] if missing else [])]
    sections = [Section(view.title, _blocks(view)) for view in views if not view.left_out]
    return Document(title, "", [Section("Summary", summary), *sections], command="explain")


def _blocks(view: View) -> list[Block]:
    write: Mapping[str, Callable[[Found], list[Block]]] = {
        "attention": _attention,
        "loss": _loss,
        "nearest": _nearest,
        "description": _description,
    }
    notes = [Listing(view.notes)] if view.notes else []
    return [Text(SHOWS[view.name]), *notes, *write[view.name](view.numbers)]


def _name_of(control: str) -> str:
    """A prefix as a reader knows it."""
    return _NAMES.get(control, control)


def _attention(found: Found) -> list[Block]:
    sites, controls = found["sites"], found["controls"]
    totals = {"this prefix": sites, **{_name_of(name): by_site for name, by_site in controls.items()}}
    rows = {name: {site: mass["total"] for site, mass in by_site.items()} for name, by_site in totals.items()}
    rows["this prefix, without its first position"] = {s: mass["total_without_first"] for s, mass in sites.items()}
    columns = [numbers(site, [row.get(site) for row in rows.values()], _percent) for site in sites]
    table = Table("Share of the attention, mean over layers and heads", [texts("prefix", rows), *columns])
    pictures: list[Block] = []
    for site, mass in sites.items():
        lines = {name: by_site[site]["by_layer"] for name, by_site in totals.items() if site in by_site}
        pictures.append((_heat_map(f"Attention by layer and position ({site})", mass), _by_layer(site, lines)))
    return [table, *pictures]


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def _loss(found: Found) -> list[Block]:
    rows = {"this prefix": found["whole"], "without the prefix": found["without_prefix"]}
    rows |= {_name_of(name): each for name, each in found["controls"].items()}
    by = "their mean over positions"
    rows |= {f"its {name} replaced by {by}": found[name] for name in ("keys", "values") if name in found}
    table = Table(
        f"Loss per label on {found['rows']} rows ({found['labels']:,} labels), with 95 % intervals over the rows",
        [
            texts("prefix", rows),
            numbers("loss", [each.get("loss") for each in rows.values()], lambda value: fixed(value, 3)),
            numbers("change", [each.get("change") for each in rows.values()], _signed),
            texts("95 % interval", [_span(each["interval"]) for each in rows.values()]),
        ],
    )
    random, charts = found["random_parts"], []
    if found["positions"]:
        charts.append(_parts_chart("Loss without a position", found["positions"], "position", random["positions"]))
    for site in dict.fromkeys(part["site"] for part in found["layers"]):
        parts, drawn = ([part for part in some if part["site"] == site] for some in (found["layers"], random["layers"]))
        charts.append(_parts_chart(f"Loss with a layer replaced by {by} ({site})", parts, "layer", drawn))
    return [table, tuple(charts)] if charts else [table]


def _nearest(found: Found) -> list[Block]:
    means = {"this prefix": found["mean_best"], **{_name_of(name): each for name, each in found["controls"].items()}}
    shown = found["positions"][:_MOST_ROWS]
    near = [" · ".join(f"{n['token']!r} {n['cosine']:.2f}" for n in row["nearest"]) for row in shown]
    caption = f"Nearest tokens among {found['tokens']:,} of {found['corpus']}"
    if len(found["positions"]) > len(shown):
        caption += f"; the first {len(shown)} of {len(found['positions'])} positions"
    return [
        Table(
            "Cosine of the nearest token, mean over positions",
            [texts("prefix", means), numbers("values", means.values(), lambda value: fixed(value, 3))],
        ),
        Table(
            caption,
            [
                texts("position", [row["position"] for row in shown]),
                texts("nearest", near),
                texts("where", [row["nearest"][0]["context"] if row["nearest"] else "" for row in shown]),
            ],
        ),
    ]


def _description(found: Found) -> list[Block]:
    rows = [(_name_of(name), *pair) for name, by in found["descriptions"].items() for pair in by.items()]
    blocks: list[Block] = []
    if "unrelated" in found:
        rows.append(("(an unrelated task)", "", found["unrelated"]))
        gain = f"{found['bare_loss']:.3f} without and {found['prefix_loss']:.3f} with the prefix"
        blocks.append(Text(f"Loss per label on {found['rows']} rows: {gain}."))
    table = Table(
        "What the model writes when it is asked for the task, and the share of the prefix's gain that these words "
        "bring in its place",
        [
            texts("prefix", [name for name, _, _ in rows]),
            texts("question", [question.replace("_", " ") for _, question, _ in rows]),
            texts("description", [said["text"] or "(nothing)" for _, _, said in rows]),
            numbers("loss", [said.get("loss") for _, _, said in rows], lambda value: fixed(value, 3)),
            numbers("faithfulness", [said.get("faithfulness") for _, _, said in rows], lambda value: fixed(value, 2)),
        ],
        num_headers=2,
    )
    asked = [texts("question", [name.replace("_", " ") for name in found["questions"]])]
    asked.append(texts("text", found["questions"].values()))
    return [*blocks, table, Section("The questions", [Table("The questions", asked)], folded=True)]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _heat_map(title: str, mass: Found) -> HeatMap:
    """Shares by layer, from top to bottom, and position; positions beyond 48 in blocks."""
    matrix = mass["by_layer_and_position"]
    grouped = in_blocks(len(matrix[0]), _MOST_CELLS)
    names, rows = [_block(each[0], each[-1]) for each in grouped], [str(index) for index in range(len(matrix))]
    values = [[sum(row[index] for index in each) for each in grouped] for row in matrix]
    columns = [
        numbers(f"position {name}", column, short)
        for name, column in zip(names, zip(*values, strict=True), strict=True)
    ]
    largest, layer, at = max((value, y, x) for y, row in enumerate(values) for x, value in enumerate(row))
    description = f"The largest share is {short(largest)}, in layer {layer} at position {names[at]}."
    table = Table(title, [texts("layer", rows), *columns])
    return HeatMap(title, description, rows, names, values, "position", "layer", table)


def _by_layer(site: str, lines: Mapping[str, Sequence[float]]) -> Chart:
    """The attention by layer of this prefix, with markers, and of its controls."""
    title = f"Attention by layer ({site})"
    series = [
        Series(name, list(enumerate(values)), style, kind="plain" if style else "marked")
        for style, (name, values) in enumerate(lines.items())
    ]
    columns = [numbers(name, values, short) for name, values in lines.items()]
    table = Table(title, [texts("layer", range(len(lines["this prefix"]))), *columns])
    ends = "; ".join(f"{name}: {short(min(values))} to {short(max(values))}" for name, values in lines.items())
    return Chart(title, f"{ends}.", series, "layer", "share of attention", table)


def _block(first: int, last: int) -> str:
    """A number, or the first and last of a block.

    >>> _block(3, 3), _block(0, 4)
    ('3', '0-4')
    """
    return str(first) if first == last else f"{first}-{last}"


def _parts_chart(title: str, parts: Sequence[Found], what: str, random: Sequence[Found]) -> Chart:
    """The change of the loss as each part alone is left out, with intervals; of a random prefix beside it."""
    names = [_block(part["first"], part["last"]) for part in parts]
    row_of = {name: row for row, name in enumerate(names)}
    series: list[Series] = []
    for name, some in (("this prefix", parts), ("random, same norms", random)):
        points = {_block(part["first"], part["last"]): part for part in some}
        points = {key: part for key, part in points.items() if key in row_of}
        ranges = [tuple(part["interval"]) for part in points.values() if part["interval"]]
        places = [(part["change"], row_of[key]) for key, part in points.items()]
        if places:
            style = len(series)
            series.append(Series(name, places, style, ranges if len(ranges) == len(places) else (), kind="dots"))
    table = Table(
        title,
        [
            texts(what, names),
            numbers("change of the loss", [part["change"] for part in parts], _signed),
            texts("95 % interval", [_span(part["interval"]) for part in parts]),
        ],
    )
    worst = max(parts, key=lambda part: float(part["change"]))
    description = f"The loss rises most, by {fixed(worst['change'], 3)}, without {what} "
    description += f"{_block(worst['first'], worst['last'])}."
    return Chart(title, description, series, "change of the loss", what, table, rows=names)


def _signed(value: float | None) -> str:
    return "" if value is None else signed(value, 3)


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{signed(interval[0], 3)} to {signed(interval[1], 3)}"
