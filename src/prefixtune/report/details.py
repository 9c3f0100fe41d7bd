"""The details behind the scores: outputs next to each other, and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefixtune.pages.document import Block, Facts, Outputs, Section, Table, Text, texts
from prefixtune.pages.format import MISSING, plain, spread_out
from prefixtune.report.run import Run
from prefixtune.report.systems import System
from prefixtune.results import OutputRow

MOST_SYSTEMS, SAMPLE, MOST_OTHERS = 6, 20, 1_000
"""Systems and examples in the open, and further examples, that a page has at most: a browser has to open it."""


_Item = tuple[OutputRow, list[str | None]]
"""An example, and the output of each system."""


def outputs_section(systems: Sequence[System]) -> Section | None:
    """The outputs of each system, side by side."""
    chosen = [
        (system.name, {output.number: output for output in system.run.outputs})
        for system in systems
        if system.run.outputs
    ]
    if not chosen:
        return None
    blocks: list[Block] = []
    if len(chosen) > MOST_SYSTEMS:
        blocks.append(Text(f"The first {MOST_SYSTEMS} of {len(chosen)} systems are shown."))
        chosen = chosen[:MOST_SYSTEMS]
    items = [_item(index, chosen) for index in sorted({index for _, outputs in chosen for index in outputs})]
    sample = spread_out(items, SAMPLE)
    shown = {id(item) for item in sample}
    rest = [item for item in items if id(item) not in shown]
    blocks.append(Outputs([name for name, _ in chosen], sample, rest[:MOST_OTHERS]))
    if left := len(rest[MOST_OTHERS:]):
        blocks.append(Text(f"{left:,} more examples are left out of this page; outputs.jsonl of each run has them."))
    return Section("Outputs", blocks)


def _item(index: int, chosen: Sequence[tuple[str, Mapping[int, OutputRow]]]) -> _Item:
    """An example's outputs; the output of a system whose source at this index is another one is left out."""
    example = next(outputs[index] for _, outputs in chosen if index in outputs)
    candidates = [outputs.get(index) for _, outputs in chosen]
    return example, [None if o is None or o.source != example.source else o.output for o in candidates]


def settings_section(systems: Sequence[System], facts: Sequence[tuple[str, str]]) -> Section:
    """The settings of all runs: what differs as a table, what is equal folded away."""
    settings = [_settings(system.run) for system in systems]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    # A run without a key has no value for it: the bare model has no learning rate.
    differing = [key for key in keys if len({each[key] for each in settings if key in each}) > 1]
    blocks: list[Block] = [Facts(facts)]
    if differing:
        columns = [
            texts(system.name, [each.get(key, MISSING) for key in differing])
            for system, each in zip(systems, settings, strict=True)
        ]
        blocks.append(Table("What differs between the runs", [texts("setting", differing), *columns]))
    equal = {key: each[key] for each in settings for key in each if key not in differing}
    if equal:
        table = Table("Equal everywhere", [texts("setting", equal), texts("value", equal.values())])
        blocks.append(Section(f"{len(equal)} settings that the runs share", [table], folded=True))
    return Section("Settings", blocks)


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
