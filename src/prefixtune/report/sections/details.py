"""The details behind the scores: differences with their tests, tuning, outputs next to each other, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefixtune.pages.document import Block, Column, Facts, Listing, Outputs, Section, Table, Text, Value, texts
from prefixtune.pages.format import MISSING, decimals_for, fixed, metric_name, plain, signed, spread_out, words
from prefixtune.report.results import Difference, Output, Run, Study
from prefixtune.report.sections.systems import System, mark_best

__all__ = ["differences_section", "outputs_section", "settings_section", "tuning_section"]


LEVEL = 0.05
MOST_SYSTEMS, SAMPLE = 6, 20
MOST_OTHERS, MOST_CHARACTERS = 2_000, 4_000_000
"""Examples besides the sample, and characters of them, that a page has at most: a browser has to open it."""


_Item = tuple[Output, list[str | None]]
"""An example, and the output of each system."""


def differences_section(study: Study, systems: Sequence[System], names: Mapping[str, str]) -> Section | None:
    """How far each point is from its counterpart on the same test items, with p-values; None where nothing is known.

    Args:
        study: With its differences.
        systems: The study's.
        names: What points are called, by what the ids of their cells begin with.
    """
    differences = study.differences
    if not differences:
        return None
    decimals = decimals_for([spread.mean for system in systems if (spread := system.spread(study.metric)) is not None])
    columns = [
        texts("of", [names.get(d.point, d.point) for d in differences]),
        texts("less that of", [names.get(d.reference, d.reference) for d in differences]),
    ]
    if any(difference.part for difference in differences):
        columns.append(texts("test items", [d.part or "all" for d in differences]))
    columns.append(Column("mean", [_mean(d, decimals) for d in differences], "± standard error"))
    columns += _mean_columns(differences, decimals)
    columns.append(
        Column("each run", [Value("; ".join(signed(x, decimals) for x in d.differences)) for d in differences])
    )
    has_tests = any(p_value is not None for difference in differences for p_value in difference.p_values)
    if has_tests:
        p_values = [Value("; ".join(fixed(p_value, 3) for p_value in d.p_values)) for d in differences]
        columns.append(Column("p", p_values, "each run"))
    table = Table(f"Differences in {metric_name(study.metric)}", columns, num_headers=2)
    notes = []
    if has_tests:
        notes += [
            f"p of each run: {study.comparisons.test}, over the test items: how often chance alone gives a difference "
            "this large. It is about these runs; how much a score changes with another seed or sample is in the "
            "standard error, where there are several runs.",
            f"★: every run differs in the same direction, each with p below {LEVEL}.",
        ]
    if any(difference.corrected_p_value is not None for difference in differences):
        notes.append(
            "Interval and p of the mean: Student's t over the runs, each pair on the same sample and seed; of a single "
            "run, its own p. Corrected: by Holm, over all rows of this table with the same test items."
        )
    return Section("Differences", [table, Listing(notes)] if notes else [table])


def _mean_columns(differences: Sequence[Difference], decimals: int) -> Iterator[Column]:
    """What is known of the means, besides their standard errors."""
    if any(difference.interval is not None for difference in differences):
        yield Column("95 % interval", [_interval(d, decimals) for d in differences], "of the mean")
    if any(difference.corrected_p_value is not None for difference in differences):
        pairs = [(difference.p_value, difference.corrected_p_value) for difference in differences]
        yield Column("p", [Value(fixed(p_value, 3), number=p_value) for p_value, _ in pairs], "of the mean")
        yield Column("p, corrected", [Value(fixed(p_value, 3), number=p_value) for _, p_value in pairs], "Holm")


def _interval(difference: Difference, decimals: int) -> Value:
    ends = difference.interval
    return Value(MISSING) if ends is None else Value(f"{signed(ends[0], decimals)} to {signed(ends[1], decimals)}")


def _mean(difference: Difference, decimals: int) -> Value:
    error, mean = difference.standard_error, difference.mean
    tested = [p_value is not None and p_value < LEVEL for p_value in difference.p_values]
    one_way = len({value > 0 for value in difference.differences}) == 1
    small = "" if error is None else f"± {fixed(error, decimals)}"
    return Value(signed(mean, decimals), small, number=mean, significant=all(tested) and one_way)


def tuning_section(tuning: Mapping[str, Any]) -> Section | None:
    """A table of all values that were tried; None where there are none.

    Args:
        tuning: `{point: {setting: {value: loss}, "chosen": value}}`; anything else is ignored.
    """
    rows: list[tuple[str, str, str, Value, str]] = []
    at_edge = []
    entries = [(point, entry) for point, entry in tuning.items() if isinstance(entry, Mapping)]
    for point, setting, losses, entry in ((p, key, value, e) for p, e in entries for key, value in e.items()):
        if not isinstance(losses, Mapping):
            continue
        names = sorted(losses, key=_as_number)
        chosen = next((name for name in names if _is_same(name, entry.get("chosen"))), None)
        values = mark_best([_loss(losses[name]) for name in names], higher=False)
        rows += [
            (point, words(setting), name, value, "chosen" if name == chosen else "")
            for name, value in zip(names, values, strict=True)
        ]
        if len(names) > 1 and chosen in (names[0], names[-1]):
            at_edge.append(f"{point}: {words(setting)} {chosen}")
    if not rows:
        return None
    points, settings, tried, losses, choices = zip(*rows, strict=True)
    columns = [
        texts("method", points),
        texts("setting", settings),
        Column(
            "tried", [Value(name, number=value if (value := _as_number(name)) < math.inf else None) for name in tried]
        ),
        Column("development loss", losses),
        texts("choice", choices),
    ]
    blocks: list[Block] = [Table("Tried before the study, by development loss", columns, num_headers=3)]
    if at_edge:
        blocks.append(
            Text(f"Chosen at the edge of what was tried, so that a better one may lie beyond: {'; '.join(at_edge)}.")
        )
    return Section("Tuning", blocks)


def _loss(loss: Any) -> Value:
    known = isinstance(loss, float | int) and -1e300 < loss < 1e300
    return Value(fixed(loss, 4), number=loss) if known else Value(fixed(None))


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _is_same(name: str, chosen: Any) -> bool:
    return name == str(chosen) or _as_number(name) == _as_number(str(chosen)) < math.inf


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
    sample = spread_out(items, SAMPLE)
    shown = {id(item) for item in sample}
    rest = [item for item in items if id(item) not in shown]
    others = _as_many_as_fit(rest)
    blocks: list[Block] = [Text(note)] if note else []
    blocks.append(Outputs([name for name, _ in chosen], sample, others))
    if left := len(rest) - len(others):
        blocks.append(Text(f"{left:,} more examples are left out of this page; outputs.jsonl of each run has them."))
    return Section("Outputs", blocks)


def _as_many_as_fit(items: Sequence[_Item]) -> list[_Item]:
    """The first of the items, as many as a page has room for."""
    kept: list[_Item] = []
    room = MOST_CHARACTERS
    for example, outputs in items[:MOST_OTHERS]:
        room -= len(example.source) + sum(map(len, example.references)) + sum(len(text or "") for text in outputs)
        if room < 0:
            break
        kept.append((example, outputs))
    return kept


def _item(index: int, chosen: Sequence[tuple[str, Mapping[int, Output]]]) -> _Item:
    """An example's outputs; the output of a system whose source at this index is another one is left out."""
    example = next(outputs[index] for _, outputs in chosen if index in outputs)
    candidates = [outputs.get(index) for _, outputs in chosen]
    return example, [None if o is None or o.source != example.source else o.output for o in candidates]


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
    equal = {key: values[key][0] for key in keys if key not in differing}
    if equal and len(everything) > 1:
        blocks.append(_folded(f"that {len(everything)} runs share", "Equal everywhere", equal))
    elif equal:
        blocks.append(_folded("of the run", "All settings", equal))
    if study:
        settings = {key: plain(value) or '""' for key, value in _flat(study, "")}
        blocks.append(_folded("of the study", "The study's settings", settings))
    return Section("Settings", blocks) if blocks else None


def _folded(what: str, caption: str, settings: Mapping[str, str]) -> Section:
    table = Table(caption, [texts("setting", settings), texts("value", settings.values())])
    return Section(f"{len(settings)} settings {what}", [table], folded=True)


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


def _differing_table(systems: Sequence[tuple[str, list[dict[str, str]]]], keys: Sequence[str]) -> Table:
    """A column for each system; where there are many systems, one column with all values."""
    few = len(systems) <= MOST_SYSTEMS
    shown = systems if few else [("values", [settings for _, runs in systems for settings in runs])]
    columns = [
        texts(name, [_distinct([settings[key] for settings in runs if key in settings]) for key in keys])
        for name, runs in shown
    ]
    return Table("What differs between the runs", [texts("setting", keys), *columns])


def _distinct(values: Sequence[str]) -> str:
    """All values, or how many there are."""
    distinct = list(dict.fromkeys(values)) or [MISSING]
    if len(distinct) > 4:
        return f"{len(distinct)} different values"
    return distinct[0] if len(distinct) == 1 else ", ".join(f"{value} ({values.count(value)})" for value in distinct)
