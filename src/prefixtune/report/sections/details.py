"""The details behind the scores: loss curves, outputs side by side, and the settings."""

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
from prefixtune.report.results import Output, Run
from prefixtune.report.sections.losses import points, smooth
from prefixtune.report.sections.systems import System

__all__ = ["losses_section", "outputs_section", "settings_section", "spread_out"]


TWO_COLUMNS = [Column("setting", numeric=False), Column("value", numeric=False)]
MOST_CHARTS, MOST_POINTS, MOST_ROWS, MOST_SYSTEMS, SAMPLE = 6, 240, 24, 6, 20


def spread_out(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, with the first and the last.

    >>> spread_out(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]


# --- losses ----------------------------------------------------------------------------------------------------------


def losses_section(systems: Sequence[System], identity: str) -> Section | None:
    """Training and development loss of each system, all repetitions in one chart."""
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
    for repetition, run in enumerate(runs, start=1):
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
        rows += _loss_rows(str(repetition), dict(smoothed), dict(development), with_run=len(runs) > 1)
    if not lines:
        return None
    unit = "loss per token" if per_token else "loss"
    ends = [line.points[-1][1] for line in lines if line.style == 1]
    lowest = [min(y for _, y in line.points) for line in lines if line.style == 1]
    text = f"{unit} over the optimizer steps of {len(runs)} {'run' if len(runs) == 1 else 'runs'}."
    if ends:
        text += f" The lowest development loss is {fixed(min(lowest), 3)}, the last {fixed(ends[-1], 3)}."
    svg = line_chart(lines, x_label="optimizer step", y_label=unit, identity=identity, title=name, text=text)
    kinds = {line.style for line in lines}
    legend = [("training, smoothed", 0, "plain"), ("development", 1, "marked" if len(runs) == 1 else "plain")]
    columns = [Column("step"), Column("training, smoothed"), Column("development")]
    columns = [Column("run"), *columns] if len(runs) > 1 else columns
    return Chart(
        title=name,
        description=text,
        svg=svg,
        legend=[(label, swatch(style, kind)) for label, style, kind in legend if style in kinds],
        table=Table(f"Losses of {name}", columns, rows, num_headers=len(columns) - 2),
    )


def _loss_rows(
    repetition: str, training: Mapping[int, float], development: Mapping[int, float], *, with_run: bool
) -> list[list[Value]]:
    """Every development loss, and some training losses."""
    steps = sorted({*spread_out(sorted(development), MOST_ROWS), *spread_out(sorted(training), MOST_ROWS // 2)})
    head = [Value(repetition)] if with_run else []
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
        outputs = next((evaluation.outputs for evaluation in system.evaluations if evaluation.outputs), ())
        if outputs:
            chosen.append((system.name, {output.index: output for output in outputs}))
    if not chosen:
        return None
    if len(chosen) > MOST_SYSTEMS:
        note = f"{note} The first {MOST_SYSTEMS} of {len(chosen)} systems are shown.".strip()
        chosen = chosen[:MOST_SYSTEMS]
    items = [_item(index, chosen) for index in sorted({index for _, outputs in chosen for index in outputs})]
    sample = {id(item) for item in spread_out(items, SAMPLE)}
    block = Outputs(
        [name for name, _ in chosen],
        [item for item in items if id(item) in sample],
        [item for item in items if id(item) not in sample],
    )
    return Section("Outputs", [Text(note), block] if note else [block])


def _item(index: int, chosen: Sequence[tuple[str, Mapping[int, Output]]]) -> Item:
    """An example's outputs; the output of a system whose source at this index is another one is left out."""
    example = next(outputs[index] for _, outputs in chosen if index in outputs)
    candidates = [outputs.get(index) for _, outputs in chosen]
    return Item(example, [None if o is None or o.source != example.source else o.output for o in candidates])


# --- settings --------------------------------------------------------------------------------------------------------


def settings_section(
    systems: Sequence[System], facts: Sequence[tuple[str, str]] = (), study: Mapping[str, Any] | None = None
) -> Section | None:
    """The settings of all runs: what differs as a table, what is equal folded away; and a study's own settings."""
    columns: list[tuple[str, list[dict[str, str]]]] = [
        (system.label, [_settings(run) for run in system.runs]) for system in systems if system.runs
    ]
    everything = [settings for _, runs in columns for settings in runs]
    keys = list(dict.fromkeys(key for settings in everything for key in settings))
    # A run without a key has no value for it: the bare model has no learning rate.
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
    settings: dict[str, Any] = dict(run.config)
    evaluation = run.evaluation
    if evaluation is not None:
        for key in ("data", "split", "num_examples", "prefix", "backbone", "method"):
            settings[f"evaluation: {key}"] = getattr(evaluation, key)
        for above, values in (("evaluation: ", evaluation.settings), ("machine: ", evaluation.machine)):
            settings.update(_flat(values, above))
        settings.update(_flat(evaluation.versions, "version: "))
    return {key: plain(value) or '""' for key, value in settings.items()}


def _flat(values: Mapping[str, Any], above: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _differing_table(columns: Sequence[tuple[str, list[dict[str, str]]]], keys: Sequence[str]) -> Table:
    """A column for each system; where there are many systems, one column with all values."""
    few = len(columns) <= MOST_SYSTEMS
    shown = columns if few else [("values", [settings for _, runs in columns for settings in runs])]
    rows = [[Value(key), *(Value(_distinct([s[key] for s in runs if key in s])) for _, runs in shown)] for key in keys]
    heads = [Column("setting", numeric=False), *(Column(name, numeric=False) for name, _ in shown)]
    return Table("What differs between the runs", heads, rows)


def _distinct(values: Sequence[str]) -> str:
    """All values, or how many there are."""
    distinct = list(dict.fromkeys(values)) or [MISSING]
    if len(distinct) > 4:
        return f"{len(distinct)} different values"
    return distinct[0] if len(distinct) == 1 else ", ".join(f"{value} ({values.count(value)})" for value in distinct)
