"""What stands behind the scores: loss curves, outputs side by side, and the settings.

Knows folders' contents and the document's blocks; nothing of how either is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixtune.report.charts import Line, line_chart, swatch
from prefixtune.report.document import (
    Block,
    Chart,
    Charts,
    Column,
    Details,
    Facts,
    Item,
    Outputs,
    Section,
    Table,
    Text,
    Value,
)
from prefixtune.report.format import MISSING, Number, count, fixed, plain
from prefixtune.report.load import Output, Run
from prefixtune.report.sections.losses import points, smooth
from prefixtune.report.sections.systems import System

__all__ = ["losses_section", "outputs_section", "settings_section", "spread_out"]


TWO_COLUMNS = [Column("setting", numeric=False), Column("value", numeric=False)]
MOST_CHARTS, MOST_POINTS, MOST_ROWS, MOST_SYSTEMS, SAMPLE = 6, 240, 24, 6, 20


def spread_out(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, the first and the last among them.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]


# --- losses ----------------------------------------------------------------------------------------------------------


def losses_section(systems: Sequence[System], identity: str) -> Section | None:
    """Training and development loss of each system, its repetitions in one picture."""
    charts: list[Chart] = []
    for system in systems:
        chart = _loss_chart(system.label, system.runs, f"{identity}-loss-{len(charts) + 1}")
        if chart is not None:
            charts.append(chart)
    if not charts:
        return None
    blocks: list[Block] = [Charts(charts[:MOST_CHARTS])]
    if len(charts) > MOST_CHARTS:
        blocks.append(Details(f"{len(charts) - MOST_CHARTS} more loss curves", [Charts(charts[MOST_CHARTS:])]))
    return Section("Losses", blocks)


def _loss_chart(name: str, runs: Sequence[Run], identity: str) -> Chart | None:
    lines: list[Line] = []
    rows: list[list[Value]] = []
    per_token = any("loss_per_token" in event for run in runs for event in run.events)
    for number, run in enumerate(runs, start=1):
        # The development loss is per token.
        training = points(run.events, "step", "loss_per_token" if per_token else "loss")
        smoothed = list(zip(training[0], smooth(training[1]), strict=True))
        development = list(zip(*points(run.events, "evaluation"), strict=True))
        if len(runs) == 1 and training[0]:
            raw: list[tuple[Number, Number]] = list(zip(*training, strict=True))
            lines.append(Line(spread_out(raw, 2 * MOST_POINTS), 0, kind="faint"))
        if smoothed:
            lines.append(Line(spread_out(smoothed, MOST_POINTS), 0, kind="plain"))
        if development:
            lines.append(Line(development, 1, kind="marked" if len(runs) == 1 else "plain"))
        rows += _loss_rows(str(number), dict(smoothed), dict(development), with_run=len(runs) > 1)
    if not lines:
        return None
    unit = "loss per token" if per_token else "loss"
    ends = [line.points[-1][1] for line in lines if line.style == 1]
    least = [min(y for _, y in line.points) for line in lines if line.style == 1]
    text = f"{unit} over the optimizer steps of {len(runs)} {'run' if len(runs) == 1 else 'runs'}."
    if ends:
        text += f" The least development loss is {fixed(min(least), 3)}, the last {fixed(ends[-1], 3)}."
    picture = line_chart(lines, x_label="optimizer step", y_label=unit, identity=identity, title=name, text=text)
    kinds = {line.style for line in lines}
    legend = [("training, smoothed", 0, "plain"), ("development", 1, "marked" if len(runs) == 1 else "plain")]
    columns = [Column("step"), Column("training, smoothed"), Column("development")]
    columns = [Column("run"), *columns] if len(runs) > 1 else columns
    return Chart(
        title=name,
        description=text,
        svg=picture,
        legend=[(label, swatch(style, kind)) for label, style, kind in legend if style in kinds],
        table=Table(f"Losses of {name}", columns, rows, num_headers=len(columns) - 2),
    )


def _loss_rows(
    number: str, training: Mapping[int, float], development: Mapping[int, float], *, with_run: bool
) -> list[list[Value]]:
    """Every development loss, and some training losses."""
    steps = sorted({*spread_out(sorted(development), MOST_ROWS), *spread_out(sorted(training), MOST_ROWS // 2)})
    head = [Value(number)] if with_run else []
    return [
        [
            *head,
            Value(count(step), number=step),
            *(
                Value("" if step not in losses else fixed(losses[step], 3), number=losses.get(step))
                for losses in (training, development)
            ),
        ]
        for step in steps
    ]


# --- outputs ---------------------------------------------------------------------------------------------------------


def outputs_section(systems: Sequence[System], note: str = "") -> Section | None:
    """The first finished run's outputs of each system, side by side."""
    chosen: list[tuple[str, dict[int, Output]]] = []
    for system in systems:
        found = next((each.outputs for each in system.evaluations if each.outputs), ())
        if found:
            chosen.append((system.name, {output.number: output for output in found}))
    if not chosen:
        return None
    if len(chosen) > MOST_SYSTEMS:
        note = f"{note} The first {MOST_SYSTEMS} of {len(chosen)} systems are shown.".strip()
        chosen = chosen[:MOST_SYSTEMS]
    items = [_item(number, chosen) for number in sorted({n for _, outputs in chosen for n in outputs})]
    picked = {id(item) for item in spread_out(items, SAMPLE)}
    outputs = Outputs(
        [name for name, _ in chosen],
        [item for item in items if id(item) in picked],
        [item for item in items if id(item) not in picked],
    )
    return Section("Outputs", [Text(note), outputs] if note else [outputs])


def _item(number: int, chosen: Sequence[tuple[str, Mapping[int, Output]]]) -> Item:
    """An example's outputs; that of a system which was asked something else under this number is left out."""
    example = next(outputs[number] for _, outputs in chosen if number in outputs)
    found = [outputs.get(number) for _, outputs in chosen]
    return Item(example, [None if one is None or one.source != example.source else one.output for one in found])


# --- settings --------------------------------------------------------------------------------------------------------


def settings_section(
    systems: Sequence[System], facts: Sequence[tuple[str, str]] = (), study: Mapping[str, Any] | None = None
) -> Section | None:
    """What every run was set to: what differs as a table, what is equal folded away; and a study's own settings."""
    columns: list[tuple[str, list[dict[str, str]]]] = [
        (system.label, [_settings(run) for run in system.runs]) for system in systems if system.runs
    ]
    everything = [settings for _, runs in columns for settings in runs]
    keys = list(dict.fromkeys(key for settings in everything for key in settings))
    # A run that lacks a key was not set to anything: the bare model has no learning rate.
    values = {key: [settings[key] for settings in everything if key in settings] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    blocks: list[Block] = [Facts(facts)] if facts else []
    if differing:
        blocks.append(_differing_table(columns, differing))
    equal = [key for key in keys if key not in differing]
    if equal:
        rows = [[Value(key), Value(values[key][0])] for key in equal]
        table = Table("Equal everywhere" if len(everything) > 1 else "All settings", TWO_COLUMNS, rows)
        of = f"that {len(everything)} runs share" if len(everything) > 1 else "of the run"
        blocks.append(Details(f"{len(equal)} settings {of}", [table]))
    if study:
        rows = [[Value(key), Value(plain(value) or '""')] for key, value in _flat(study, "")]
        blocks.append(Details(f"{len(rows)} settings of the study", [Table("The study's settings", TWO_COLUMNS, rows)]))
    return Section("Settings", blocks) if blocks else None


def _settings(run: Run) -> dict[str, str]:
    found: dict[str, Any] = dict(run.config)
    evaluation = run.evaluation
    if evaluation is not None:
        for key in ("data", "split", "num_examples", "prefix", "backbone", "method"):
            found[f"evaluation: {key}"] = getattr(evaluation, key)
        for above, values in (("evaluation: ", evaluation.settings), ("machine: ", evaluation.machine)):
            found.update(_flat(values, above))
        found.update(_flat(evaluation.versions, "version: "))
    return {key: plain(value) or '""' for key, value in found.items()}


def _flat(values: Mapping[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _differing_table(columns: Sequence[tuple[str, list[dict[str, str]]]], keys: Sequence[str]) -> Table:
    """A column for each system, or for many systems one with all values."""
    few = len(columns) <= MOST_SYSTEMS
    shown = columns if few else [("values", [settings for _, runs in columns for settings in runs])]
    rows = [[Value(key), *(Value(_distinct([s[key] for s in runs if key in s])) for _, runs in shown)] for key in keys]
    heads = [Column("setting", numeric=False), *(Column(name, numeric=False) for name, _ in shown)]
    return Table("What differs between the runs", heads, rows)


def _distinct(values: Sequence[str]) -> str:
    """All values, or how many there are."""
    found = list(dict.fromkeys(values)) or [MISSING]
    if len(found) > 4:
        return f"{len(found)} different values"
    return found[0] if len(found) == 1 else ", ".join(f"{value} ({values.count(value)})" for value in found)
