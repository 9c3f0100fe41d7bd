"""Outputs of any system and examples -> an `Evaluation` and its folder; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, TaskKind, references_of
from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.evaluation.metrics import (
    Measurement,
    Unavailable,
    accuracy,
    macro_f1,
    measure,
    metric_names,
    randomize,
    span_f1,
)
from prefixtune.results import EVALUATION_FILE, OUTPUTS_FILE, Against, Evaluation, GroupScores, OutputRow
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
            raise DataError(
                f"example {number} ({example.source[:60]!r}) has no target to compare with.",
                hint="name the target column (--target), or a file with references.",
            )


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
    if kind == "generation":
        try:
            metric_names(protocol, metrics)
        except ValueError as error:
            raise ConfigError(f"{error}.", hint="choose another name.") from error
        return
    for name in [metrics] if isinstance(metrics, str) else metrics or ():
        if name not in _LABEL_METRICS[kind]:
            raise ConfigError(f"there is no metric {name!r} for {kind}.", hint=did_you_mean(name, _LABEL_METRICS[kind]))


def score_outputs(
    outputs: Sequence[str],
    examples: Sequence[Example],
    *,
    kind: TaskKind = "generation",
    protocol: str = "plain",
    metrics: str | Sequence[str] | None = None,
    intervals: bool = False,
    samples: int = 1000,
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
        samples: Draws of intervals and of the test.
        strict: A metric that cannot be computed here is an error; otherwise it is left out.
        against: The name and the outputs of a second system; the difference is tested by paired randomization.

    Raises:
        ConfigError: A metric or the protocol is unknown, or cannot be computed here.
        DataError: The outputs do not fit the examples.
    """
    check_metrics(metrics, kind=kind, protocol=protocol)
    facts: dict[str, Any] = {"num_examples": len(examples), "outputs": tuple(outputs)}
    level, left_out = (LEVEL if intervals else None), dict[str, str]()
    references = [references_of(example, protocol) for example in examples]
    try:
        if kind != "generation":
            return Evaluation(scores=_score_labels(outputs, examples, kind, metrics), **facts)
        measured, *other = (
            measure(texts, references, protocol=protocol, metrics=metrics, left_out=None if strict else left_out)
            for texts in (outputs, *([against[1]] if against else []))
        )
    except Unavailable as error:
        raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}, or leave the metric out.") from error
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    # What cannot be computed of one system cannot be compared.
    measured = {name: one for name, one in measured.items() if all(name in second for second in other)}
    if left_out and not measured:
        reason, _, remedy = next(iter(left_out.values())).partition("; ")
        raise ConfigError(f"no metric can be computed here: {reason}.", hint=f"{remedy}.")
    scores, *second = (
        {name: one[name].to_score(level=level, samples=samples) for name in measured} for one in (measured, *other)
    )
    compared = None
    if against:
        tests = {name: randomize(one, other[0][name], samples=samples) for name, one in measured.items()}
        compared = Against(outputs=against[0], scores=second[0], comparison=tests)
    groups = score_groups(measured, examples)
    return Evaluation(scores=scores, groups=groups, left_out=left_out, against=compared, **facts)


def _score_labels(
    outputs: Sequence[str], examples: Sequence[Example], kind: str, metrics: str | Sequence[str] | None
) -> dict[str, Any]:
    """Accuracy and macro F1 of labels; span F1 and accuracy of tags."""
    predicted, wanted = [output.strip() for output in outputs], [example.targets[0] for example in examples]
    if kind == "classification":
        scores = {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)}
    else:
        rows, wanted_rows = [line.split() for line in predicted], [line.split() for line in wanted]
        flat, wanted_flat = ([tag for row in tags for tag in row] for tags in (rows, wanted_rows))
        scores = {"span_f1": span_f1(rows, wanted_rows), "accuracy": accuracy(flat, wanted_flat)}
    names = [metrics] if isinstance(metrics, str) else metrics or scores
    return {name: scores[name] for name in names}


def score_groups(measured: Mapping[str, Measurement], examples: Sequence[Example]) -> dict[str, dict[str, GroupScores]]:
    """The scores of every group of examples; numbers are sorted, others as they first occur.

    A metric that cannot be computed of one of the groups is left out of their grouping.
    """
    members: dict[str, dict[str, list[int]]] = {}
    for index, example in enumerate(examples):
        for grouping, group in example.groups.items():
            members.setdefault(grouping, {}).setdefault(group, []).append(index)
    scored: dict[str, dict[str, GroupScores]] = {}
    for grouping, groups in members.items():
        by_metric = {}
        for name, metric in measured.items():
            try:
                by_metric[name] = {group: metric.part(indices).to_score() for group, indices in groups.items()}
            except Unavailable:
                continue
        scored[grouping] = {
            group: GroupScores(
                num_examples=len(indices), scores={name: scores[group] for name, scores in by_metric.items()}
            )
            for group, indices in sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0)
        }
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
    rows = [
        OutputRow(
            number=number,
            source=example.source,
            references=tuple(references_of(example, protocol)),
            output=output,
            groups=dict(example.groups),
        )
        for number, (example, output) in enumerate(zip(examples, evaluation.outputs, strict=True))
    ]
    write_text(folder / OUTPUTS_FILE, "".join(row.model_dump_json() + "\n" for row in rows))
    whole = evaluation.with_facts(**facts, machine=describe_machine(), versions=versions())
    write_text(folder / EVALUATION_FILE, whole.model_dump_json(indent=1) + "\n")
