"""The views of a prefix as a document: a sentence, pictures and tables each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefixtune.explain.pictures import heat_map, parts_chart, profile_chart
from prefixtune.explain.view import SHOWS, View
from prefixtune.pages.document import Block, Document, Facts, Listing, Section, Table, Text, Value, numbers, texts
from prefixtune.pages.format import MISSING, fixed, signed

__all__ = ["compose"]


_MOST_ROWS = 64
"""Of a table of positions."""
_NAMES = {"random": "random, same norms", "shuffled": "values shuffled", "other": "other prefix", "start": "its start"}


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
        "likeness": _likeness,
        "start": _start,
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
                heat_map(
                    f"Attention by layer and head group ({site})",
                    mass["by_layer_and_head_group"],
                    "head group",
                    "layer",
                ),
                profile_chart(f"Attention by layer ({site})", lines, "layer", "share of attention"),
                profile_chart(
                    f"Attention by position ({site})",
                    {"this prefix": mass["by_position"]},
                    "position",
                    "share of attention",
                ),
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
    by = "the start's" if found["replaced_by"] == "start" else "their mean over positions"
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
    means = {"this prefix": found["mean_best"], **{name_of(k): v for k, v in found["controls"].items()}}
    means = {("real text" if name == "text" else name): each for name, each in means.items()}
    table = Table(
        "Cosine of the nearest token, mean over positions",
        [
            texts("prefix", means),
            *(numbers(p, [each[p] for each in means.values()], lambda v: fixed(v, 3)) for p in ("keys", "values")),
        ],
    )
    shown = found["positions"][:_MOST_ROWS]

    def cells(part: str) -> list[str]:
        return [" · ".join(f"{near['token']!r} {near['cosine']:.2f}" for near in row[part]) for row in shown]

    columns = [texts("position", [row["position"] for row in shown]), texts("by keys", cells("keys"))]
    columns.append(texts("by values", cells("values")))
    columns.append(texts("where (values)", [row["values"][0]["context"] if row["values"] else "" for row in shown]))
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


def _likeness(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (name_of(name), site, part, sides[part])
        for name, by_site in found["with"].items()
        for site, sides in by_site.items()
        for part in ("keys", "values")
    ]
    measures = {
        "cosine": "cosine",
        "cka": "CKA",
        "overlap": "subspace overlap",
        "overlap_by_chance": "overlap by chance",
    }
    table = Table(
        "Likeness, mean over layers: cosine of the same positions, linear CKA, overlap of the heads' subspaces",
        [
            texts("with", [row[0] for row in rows]),
            texts("site", [row[1] for row in rows]),
            texts("of", [row[2] for row in rows]),
            *(numbers(label, [row[3][key] for row in rows], lambda v: fixed(v, 3)) for key, label in measures.items()),
        ],
        num_headers=3,
    )
    charts = [
        profile_chart(
            f"Cosine of {part} by layer ({site})",
            {row[0]: row[3]["by_layer"]["cosine"] for row in rows if (row[1], row[2]) == (site, part)},
            "layer",
            "cosine",
        )
        for site, part in dict.fromkeys((row[1], row[2]) for row in rows)
    ]
    return [table, tuple(charts)]


def _start(found: Mapping[str, Any]) -> list[Block]:
    sites = list(found["keys"])
    rows = [("this prefix", found), *((name_of(name), each) for name, each in found["controls"].items())]
    cells = [
        (name, site, part, each[part][site]) for name, each in rows for site in sites for part in ("keys", "values")
    ]
    table = Table(
        "Distance from the start, relative to the start's length, and cosine with it; mean over layers",
        [
            texts("prefix", [cell[0] for cell in cells]),
            texts("site", [cell[1] for cell in cells]),
            texts("of", [cell[2] for cell in cells]),
            numbers("moved by", [cell[3]["moved"] for cell in cells], lambda v: fixed(v, 3)),
            numbers("cosine", [cell[3]["cosine"] for cell in cells], lambda v: fixed(v, 3)),
        ],
        num_headers=3,
    )
    charts = [
        profile_chart(
            f"Distance from the start by {along} ({site})",
            {part: found[part][site][f"by_{along}"] for part in ("keys", "values")},
            along,
            "relative distance",
        )
        for site in sites
        for along in ("layer", "position")
    ]
    return [Text(f"Training started from {found['start']}."), table, tuple(charts)]
