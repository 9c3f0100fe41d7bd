"""Outputs of any system and examples -> an `Evaluation` and its folder; no model is needed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, TaskKind, references_of
from prefixtune.data.files import LocatedRow, json_lines
from prefixtune.data.streams import read_text, shown
from prefixtune.errors import ConfigError, DataError, short_repr
from prefixtune.evaluation.metrics import Measurement, Unavailable, accuracy, macro_f1, measure, randomize, span_f1
from prefixtune.evaluation.metrics.scoring import metric_names
from prefixtune.results import EVALUATION_FILE, OUTPUTS_FILE, Against, Evaluation, GroupScores, OutputRow, Score
from prefixtune.utils.files import write_text
from prefixtune.utils.machine import describe_machine, versions

LEVEL = 0.95
"""Of intervals."""
_LABEL_METRICS = {"classification": ("accuracy", "macro_f1"), "tagging": ("span_f1", "accuracy")}


def check_examples(examples: Sequence[Example], protocol: str = "plain") -> None:
    """Refuse examples that cannot be scored.

    Args:
        examples: To evaluate on.
        protocol: By whose rules.

    Raises:
        DataError: There is no example, or one has no target, or under this protocol no reference.
    """
    if not examples:
        raise DataError("there is no example to evaluate on.", hint="check the file.")
    for number, example in enumerate(examples, start=1):
        if not any(text.strip() for text in references_of(example, protocol)):
            what = f"example {number} ({example.source[:60]!r}) has no target to compare with."
            raise DataError(what, hint="name the target column (--target), or a file with references.")


def check_metrics(
    metrics: str | Sequence[str] | None, *, kind: TaskKind = "generation", protocol: str = "plain"
) -> None:
    """Refuse names that are unknown.

    Args:
        metrics: The names; None: the usual ones.
        kind: Of the task.
        protocol: By whose rules texts are scored.

    Raises:
        ConfigError: There is no such metric for this kind of task, or no such protocol.
    """
    try:
        if metrics is not None and not _named(metrics):
            raise ValueError("no metric is named")
        if kind == "generation":
            metric_names(protocol, metrics)
        for name in _named(metrics) if kind != "generation" else ():
            if name not in _LABEL_METRICS[kind]:
                raise ValueError(f"there is no metric {name!r} for {kind}; known: {', '.join(_LABEL_METRICS[kind])}")
    except ValueError as error:
        raise ConfigError(f"{error}.", hint="choose another name.") from error


def _named(metrics: str | Sequence[str] | None) -> Sequence[str]:
    return [metrics] if isinstance(metrics, str) else metrics or ()


def score_outputs(
    outputs: Sequence[str],
    examples: Sequence[Example],
    *,
    kind: TaskKind = "generation",
    protocol: str = "plain",
    metrics: str | Sequence[str] | None = None,
    intervals: bool = False,
    strict: bool = False,
    against: tuple[str, Sequence[str]] | None = None,
) -> Evaluation:
    """Score outputs against the targets of examples, as a task's official script does.

    Args:
        outputs: One per example: a text, a label, or tags with a space between.
        examples: Each with one or more targets.
        kind: What the outputs are.
        protocol: By whose rules texts are scored (`Task.protocol`).
        metrics: The name of a score, or several; None: the usual ones.
        intervals: Also compute each score's bootstrap interval.
        strict: A metric that cannot be computed here is an error; otherwise it is left out.
        against: The name and the outputs of a second system; the difference is tested by paired randomization.

    Raises:
        ConfigError: A metric or the protocol is unknown, or cannot be computed here.
        DataError: The outputs do not fit the examples.
    """
    check_metrics(metrics, kind=kind, protocol=protocol)
    check_examples(examples, protocol if kind == "generation" else "plain")
    facts: dict[str, Any] = {"num_examples": len(examples), "outputs": tuple(outputs)}
    left_out = dict[str, str]()
    references = [references_of(example, protocol) for example in examples]
    systems = [outputs, *([against[1]] if against else [])]
    try:
        if kind != "generation":
            scored = _score_labels(outputs, examples, kind)
            return Evaluation(scores={name: scored[name] for name in _named(metrics) or scored}, **facts)
        measured = [
            measure(texts, references, protocol=protocol, metrics=metrics, left_out=None if strict else left_out)
            for texts in systems
        ]
    except Unavailable as error:
        raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}, or leave the metric out.") from error
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    # What cannot be computed of one system cannot be compared.
    names = [name for name in measured[0] if name in measured[-1]]
    if left_out and not names:
        raise ConfigError(f"no metric can be computed here: {next(iter(left_out.values()))}.")
    level = LEVEL if intervals else None
    scores, *other = ({name: one[name].to_score(level=level) for name in names} for one in measured)
    if against:
        tests = {name: randomize(measured[0][name], measured[1][name]) for name in names}
        facts["against"] = Against(outputs=against[0], scores=other[0], comparison=tests)
    groups = score_groups({name: measured[0][name] for name in names}, examples)
    return Evaluation(scores=scores, groups=groups, left_out=left_out, **facts)


def _score_labels(outputs: Sequence[str], examples: Sequence[Example], kind: str) -> dict[str, Score]:
    """Accuracy and macro F1 of labels; span F1 and accuracy of tags."""
    predicted, wanted = [output.strip() for output in outputs], [example.targets[0].strip() for example in examples]
    if kind == "classification":
        return {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)}
    rows, wanted_rows = [line.split() for line in predicted], [line.split() for line in wanted]
    flat, wanted_flat = list(itertools.chain(*rows)), list(itertools.chain(*wanted_rows))
    return {"span_f1": span_f1(rows, wanted_rows), "accuracy": accuracy(flat, wanted_flat)}


def score_groups(measured: Mapping[str, Measurement], examples: Sequence[Example]) -> dict[str, dict[str, GroupScores]]:
    """The scores of every group of examples; numbers are sorted, others as they first occur.

    A metric that cannot be computed of one of the groups is left out of it.
    """
    members: dict[str, dict[str, list[int]]] = {}
    for index, example in enumerate(examples):
        for grouping, group in example.groups.items():
            members.setdefault(grouping, {}).setdefault(group, []).append(index)
    scored: dict[str, dict[str, GroupScores]] = {}
    for grouping, groups in members.items():
        for group, items in sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0):
            scores = {}
            for name, metric in measured.items():
                with contextlib.suppress(Unavailable):
                    scores[name] = metric.part(items).to_score()
            scored.setdefault(grouping, {})[group] = GroupScores(num_examples=len(items), scores=scores)
    return scored


def write_evaluation(
    folder: Path, evaluation: Evaluation, examples: Sequence[Example], *, protocol: str = "plain", **facts: Any
) -> None:
    """Write scores, outputs and settings to a folder, for `prefixtune report` and other programs.

    Args:
        folder: Created if it does not exist. `evaluation.json` and `outputs.jsonl` in it are replaced.
        evaluation: What `evaluate` or `score_outputs` returned.
        examples: The examples that were evaluated.
        protocol: By whose rules they were.
        **facts: Task, data, method, backbone, settings and the like; added to `evaluation.json`.

    Raises:
        PrefixError: A file cannot be written.
    """
    lines = []
    for number, (example, output) in enumerate(zip(examples, evaluation.outputs, strict=True)):
        references, groups = tuple(references_of(example, protocol)), dict(example.groups)
        row = OutputRow(number=number, source=example.source, references=references, output=output, groups=groups)
        lines.append(row.model_dump_json() + "\n")
    write_text(folder / OUTPUTS_FILE, "".join(lines))
    whole = evaluation.with_facts(**facts, machine=describe_machine(), versions=versions())
    write_text(folder / EVALUATION_FILE, whole.model_dump_json(indent=1) + "\n")


# --- outputs of any system --------------------------------------------------------------------------------------------


def outputs_of(examples: Sequence[Example], path: Path, *, data: str, limit: int = 0) -> list[str]:
    """The outputs of a file, one for each example, or for the first ones.

    Args:
        examples: All that were read.
        path: Of the outputs: as many as examples, or as `limit`. Lines may be blank; rows with a `number` may be in
            any order.
        data: The examples' file, for messages.
        limit: How many are scored; 0: all.

    Raises:
        DataError: The file cannot be read, their number is another one, they are rows without outputs, or one names the
            source of another example.
    """
    text, chosen = read_text(path, needed="one output"), examples[: limit or None]
    first, name = text.lstrip().partition("\n")[0], path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl") or (first.startswith("{") and '"output"' in first):
        rows = list(json_lines(text.split("\n"), shown(path)))
        if all(type(values.get("number")) is int for _, values in rows):
            # An evaluation may have written `decoded.jsonl` in another order.
            rows.sort(key=lambda row: int(row[1]["number"]))
            for number, (location, row) in enumerate(rows, start=rows[0][1]["number"] == 1):
                if row["number"] != number:
                    what = f"{location}: the number is {row['number']}, but {number} is missing or there twice."
                    raise DataError(what, hint="number the outputs one by one; or evaluate to the end.")
    else:
        # Only "\n" ends a line; the one after the last line adds no empty output.
        rows = [("", {"output": line.removesuffix("\r")}) for line in text.removesuffix("\n").split("\n")]
    if len(rows) not in (len(chosen), len(examples)):
        what = f"{str(path)!r} has {len(rows):,} outputs, but {data!r} has {len(examples):,} examples."
        raise DataError(what, hint="write one output for each distinct source, in order; --limit N takes the first.")
    return [_output(row, example) for row, example in zip(rows[: len(chosen)], chosen, strict=True)]


def _output(row: LocatedRow, example: Example) -> str:
    location, values = row
    output, source = values.get("output"), values.get("source")
    if not isinstance(output, str):
        what = f"{location}: 'output' is {short_repr(output)}; a text is needed."
        raise DataError(what, hint='write lines as {"output": "..."}.')
    # White space does not count.
    if isinstance(source, str) and source.split() != example.source.split():
        what = f"{location}: it is for the source {short_repr(source)}, not for {short_repr(example.source)}."
        raise DataError(what, hint="name the references that these outputs are for; or leave out the key 'source'.")
    return output
