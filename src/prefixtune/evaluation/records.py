"""The outcome of an evaluation, and the folder that it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, references_of
from prefixtune.evaluation.metrics import Measurement, Score, Unavailable
from prefixtune.utils.files import write_text
from prefixtune.utils.machine import describe_machine, versions

__all__ = [
    "EVALUATION_FILE",
    "OUTPUTS_FILE",
    "Evaluation",
    "GroupScores",
    "groups_to_dict",
    "score_groups",
    "summarize",
    "write_evaluation",
    "write_outputs",
]


EVALUATION_FILE, OUTPUTS_FILE = "evaluation.json", "outputs.jsonl"


@dataclass(frozen=True)
class GroupScores:
    """The scores of a part of the examples.

    Attributes:
        num_examples: How many examples the part has.
        scores: By metric.
    """

    num_examples: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the outputs that they were computed on.

    Attributes:
        scores: By metric; each names its implementation.
        outputs: One per example.
        groups: Grouping -> group -> its scores, if examples are grouped (category, seen or unseen, ...).
        left_out: Metric -> why it could not be computed here.
        seconds: How long decoding took, or predicting labels or tags; of an evaluation that was stopped and continued,
            the whole time.
        num_truncated: Sources that were truncated to fit.
        num_unended: Outputs that took all tokens they may have and did not end.
    """

    scores: dict[str, Score]
    outputs: tuple[str, ...]
    groups: dict[str, dict[str, GroupScores]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    num_truncated: int = 0
    num_unended: int = 0


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
        by_metric = {name: scores for name, metric in measured.items() if (scores := _score_parts(metric, groups))}
        scored[grouping] = {
            group: GroupScores(len(indices), {name: scores[group] for name, scores in by_metric.items()})
            for group, indices in sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0)
        }
    return scored


def _score_parts(metric: Measurement, groups: Mapping[str, Sequence[int]]) -> dict[str, Score]:
    """The score of each group; none, if it cannot be computed of one of them."""
    try:
        return {group: metric.part(indices).to_score() for group, indices in groups.items()}
    except Unavailable:
        return {}


def write_evaluation(
    folder: Path, outcome: Evaluation, examples: Sequence[Example], facts: Mapping[str, Any], *, protocol: str = "plain"
) -> None:
    """Write scores, outputs and settings to a folder, for `prefixtune report` and other programs.

    Args:
        folder: Created if it does not exist. `evaluation.json` and `outputs.jsonl` in it are replaced.
        outcome: The evaluation.
        examples: The examples that were evaluated.
        facts: Task, data, method, backbone, settings and the like; added to `evaluation.json`.
        protocol: As in `evaluate`.

    Raises:
        PrefixError: A file cannot be written.
    """
    write_outputs(folder, outcome.outputs, examples, protocol=protocol)
    summary = {
        "kind": "evaluation",
        **facts,
        "num_examples": len(examples),
        **summarize(outcome),
        "seconds": round(outcome.seconds, 2),
        "machine": describe_machine(),
        "versions": versions(),
    }
    write_text(folder / EVALUATION_FILE, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")


def write_outputs(folder: Path, outputs: Sequence[str], examples: Sequence[Example], *, protocol: str) -> None:
    """Write `outputs.jsonl`: each example with its output, on a line.

    Args:
        folder: Created if it does not exist.
        outputs: One per example.
        examples: The examples that were evaluated.
        protocol: As in `evaluate`.

    Raises:
        PrefixError: The file cannot be written.
    """
    rows = [
        {
            "number": index,
            "source": example.source,
            "references": references_of(example, protocol),
            "output": output,
            "groups": dict(example.groups),
        }
        for index, (example, output) in enumerate(zip(examples, outputs, strict=True))
    ]
    write_text(folder / OUTPUTS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def summarize(outcome: Evaluation) -> dict[str, Any]:
    """All scores, those of groups too, as JSON."""
    return {
        "scores": {name: {"interval": None} | score.to_dict() for name, score in outcome.scores.items()},
        "groups": groups_to_dict(outcome.groups),
        "left_out": outcome.left_out,
        "num_cut": outcome.num_truncated,
        "num_unended": outcome.num_unended,
    }


def groups_to_dict(scored: Mapping[str, Mapping[str, GroupScores]]) -> dict[str, Any]:
    """The scores of groups, as JSON."""
    return {
        grouping: {
            group: {
                "num_examples": part.num_examples,
                "scores": {name: {"interval": None} | score.to_dict() for name, score in part.scores.items()},
            }
            for group, part in groups.items()
        }
        for grouping, groups in scored.items()
    }
