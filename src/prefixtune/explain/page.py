"""The views of a prefix as a document: a sentence, tables and pictures each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.explain.ablation import blocks as in_blocks
from prefixtune.explain.subject import SHOWS, TITLES, View
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
}
Found = Mapping[str, Any]


def compose(views: Sequence[View], facts: Sequence[tuple[str, str]], title: str) -> Document:
    """Make a document of the views that are done.

    Args:
        views: In order.
        facts: Names and values of what was looked at.
        title: Of the page.
    """
    write: Mapping[str, Callable[[Found], list[Block]]] = {
        "attention": _attention,
        "loss": _loss,
        "nearest": _nearest,
        "description": _description,
        "general": _general,
    }
    missing = [f"{TITLES[view.name]} is left out: {view.left_out}" for view in views if view.left_out]
    summary: list[Block] = [Facts(list(facts)), *([Listing(missing)] if missing else [])]
    sections = [
        Section(TITLES[view.name], [Text(SHOWS[view.name]), *write[view.name](view.numbers)])
        for view in views
        if not view.left_out
    ]
    return Document(title, "", [Section("Summary", summary), *sections], command="explain")


def _named(own: Any, controls: Found) -> dict[str, Any]:
    """What was found of the prefix and of its controls, by the names that a reader knows."""
    return {"this prefix": own, **{_NAMES[name]: found for name, found in controls.items()}}


def _attention(found: Found) -> list[Block]:
    sites = found["sites"]
    by_name = _named(sites, found["controls"])
    rows = {name: {site: mass["total"] for site, mass in by_site.items()} for name, by_site in by_name.items()}
    rows["this prefix, without its first position"] = {s: mass["total_without_first"] for s, mass in sites.items()}
    columns = [texts(site, [f"{row[site]:.1%}" if site in row else MISSING for row in rows.values()]) for site in sites]
    table = Table("Share of the attention, mean over layers and heads", [texts("prefix", rows), *columns])
    return [table, tuple(_heat_map(site, mass["by_layer_and_position"]) for site, mass in sites.items())]


def _heat_map(site: str, matrix: Sequence[Sequence[float]]) -> HeatMap:
    """Shares by layer, from top to bottom, and position; positions beyond 48 in blocks."""
    title = f"Attention by layer and position ({site})"
    grouped = in_blocks(len(matrix[0]), _MOST_CELLS)
    names, rows = [_block(each[0], each[-1]) for each in grouped], [str(index) for index in range(len(matrix))]
    values = [[sum(row[index] for index in each) for each in grouped] for row in matrix]
    largest, layer, at = max((value, y, x) for y, row in enumerate(values) for x, value in enumerate(row))
    description = f"The largest share is {short(largest)}, in layer {layer} at position {names[at]}."
    return HeatMap(title, description, rows, names, values, "position", "layer")


def _block(first: int, last: int) -> str:
    """A number, or the first and last of a block.

    >>> _block(3, 3), _block(0, 4)
    ('3', '0-4')
    """
    return str(first) if first == last else f"{first}-{last}"


def _loss(found: Found) -> list[Block]:
    by = "replaced by their mean over positions"
    rows = _named(found["whole"], found["controls"])
    rows |= {"without the prefix": found["without_prefix"]}
    rows |= {f"its {name} {by}": found[name] for name in ("keys", "values")}
    table = Table(
        f"Loss per label on {found['rows']} rows ({found['labels']:,} labels), with 95 % intervals over the rows",
        [
            texts("prefix", rows),
            numbers("loss", [each.get("loss") for each in rows.values()], lambda value: fixed(value, 3)),
            numbers("change", [each.get("change") for each in rows.values()], _signed),
            texts(
                "95 % interval",
                [_span(each["interval"], signed if "change" in each else fixed) for each in rows.values()],
            ),
        ],
    )
    charts = [_parts_chart("Loss without a position", found["positions"], "position")]
    for site in dict.fromkeys(part["site"] for part in found["layers"]):
        parts = [part for part in found["layers"] if part["site"] == site]
        charts.append(_parts_chart(f"Loss with a layer {by} ({site})", parts, "layer"))
    return [table, tuple(charts)]


def _parts_chart(title: str, parts: Sequence[Found], what: str) -> Chart:
    """The change of the loss as each part alone is left out, with intervals."""
    names = [_block(part["first"], part["last"]) for part in parts]
    places = [(part["change"], row) for row, part in enumerate(parts)]
    spans = [tuple(part["interval"]) for part in parts if part["interval"]]
    series = [Series("this prefix", places, 0, spans, kind="dots")]
    worst = max(parts, key=lambda part: float(part["change"]))
    description = f"The loss rises most, by {fixed(worst['change'], 3)}, without {what} "
    description += f"{_block(worst['first'], worst['last'])}."
    if worst["change"] <= 0:
        description = f"The loss rises without no {what}."
    return Chart(title, description, series, "change of the loss", what, names)


def _signed(value: float | None) -> str:
    return "" if value is None else signed(value, 3)


def _span(interval: Sequence[float] | None, written: Callable[[float, int], str]) -> str:
    return "" if interval is None else f"{written(interval[0], 3)} to {written(interval[1], 3)}"


def _nearest(found: Found) -> list[Block]:
    means = _named(found["mean_best"], found["controls"])
    shown = found["positions"][:_MOST_ROWS]
    near = [" · ".join(f"{n['token']!r} {n['cosine']:.2f}" for n in row["nearest"]) for row in shown]
    caption = f"Nearest tokens among {found['tokens']:,} of the data; at most {_MOST_ROWS} positions"
    columns = [
        texts("position", [row["position"] for row in shown]),
        texts("nearest", near),
        texts("where", [row["nearest"][0]["context"] for row in shown]),
    ]
    cosine = [texts("prefix", means), numbers("values", means.values(), lambda value: fixed(value, 3))]
    return [Table("Cosine of the nearest token, mean over positions", cosine), Table(caption, columns)]


def _description(found: Found) -> list[Block]:
    rows = [(_NAMES[name], *pair) for name, by in found["descriptions"].items() for pair in by.items()]
    rows.append(("(an unrelated task)", "", found["unrelated"]))
    gain = f"{found['bare_loss']:.3f} without and {found['prefix_loss']:.3f} with the prefix"
    table = Table(
        "What the model writes when it is asked for the task, and the share of the prefix's gain that these words "
        "bring in its place",
        [
            texts("prefix", [name for name, _, _ in rows]),
            texts("question", [question.replace("_", " ") for _, question, _ in rows]),
            texts("description", [said["text"] or "(nothing)" for _, _, said in rows]),
            numbers("loss", [said["loss"] for _, _, said in rows], lambda value: fixed(value, 3)),
            numbers("faithfulness", [said["faithfulness"] for _, _, said in rows], lambda value: fixed(value, 2)),
        ],
        num_headers=2,
    )
    return [Text(f"Loss per label on {found['rows']} rows: {gain}."), table]


def _general(found: Found) -> list[Block]:
    by_name = _named(found["prefix"], {"random": found["random"]})
    unchanged = texts("texts unchanged", [f"{each['unchanged']} of {each['requests']}" for each in by_name.values()])
    divergence = numbers("KL per token", [each["kl"] for each in by_name.values()], lambda value: fixed(value, 3))
    columns = [texts("prefix", by_name), unchanged, divergence]
    return [Table("Answers with the prefix, beside those of the bare model", columns)]
