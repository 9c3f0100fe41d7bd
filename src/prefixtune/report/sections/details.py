"""The details behind the scores: outputs next to each other, and the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixtune.report.document import Block, Column, Details, Facts, Item, Outputs, Section, Table, Text, Value
from prefixtune.report.format import MISSING, plain, spread_out
from prefixtune.report.results import Output, Run
from prefixtune.report.sections.systems import System

__all__ = ["outputs_section", "settings_section"]


MOST_SYSTEMS, SAMPLE = 6, 20


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
        caption = "Equal everywhere" if len(everything) > 1 else "All settings"
        table = _two_columns(caption, [(key, values[key][0]) for key in equal])
        of = f"that {len(everything)} runs share" if len(everything) > 1 else "of the run"
        blocks.append(Details(f"{len(equal)} settings {of}", [table]))
    if study:
        rows = [(key, plain(value) or '""') for key, value in _flat(study, "")]
        blocks.append(Details(f"{len(rows)} settings of the study", [_two_columns("The study's settings", rows)]))
    return Section("Settings", blocks) if blocks else None


def _two_columns(caption: str, rows: Sequence[tuple[str, str]]) -> Table:
    columns = [
        Column(head, [Value(row[i]) for row in rows], numeric=False) for i, head in enumerate(("setting", "value"))
    ]
    return Table(caption, columns)


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
    heads = [Column("setting", [Value(key) for key in keys], numeric=False)]
    for name, runs in shown:
        values = [Value(_distinct([settings[key] for settings in runs if key in settings])) for key in keys]
        heads.append(Column(name, values, numeric=False))
    return Table("What differs between the runs", heads)


def _distinct(values: Sequence[str]) -> str:
    """All values, or how many there are."""
    distinct = list(dict.fromkeys(values)) or [MISSING]
    if len(distinct) > 4:
        return f"{len(distinct)} different values"
    return distinct[0] if len(distinct) == 1 else ", ".join(f"{value} ({values.count(value)})" for value in distinct)
