"""Prefix x data -> scores: generate for every example (or tell its label or tags) and compare with its references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.backbone import Backbone
from prefixtune.errors import ConfigError, DataError
from prefixtune.generation import GenerateConfig, generate
from prefixtune.labelling import Labels, classify, labels_of, tag
from prefixtune.metrics import Score, accuracy, bleu, macro_f1, span_f1
from prefixtune.prefix import Prefix
from prefixtune.tasks import Example, TextFormat, label_names

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the outputs that they were computed on.

    Attributes:
        scores: By metric; each names its implementation.
        outputs: One per example.
    """

    scores: dict[str, Score]
    outputs: tuple[str, ...]


def evaluate(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None = None,
    *,
    text_format: TextFormat | None = None,
    config: GenerateConfig | None = None,
    kind: str = "generation",
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate for every example, and score the outputs against its targets.

    A prefix that classifies or tags, by its header, is scored by accuracy and F1 instead of BLEU.

    Args:
        backbone: The frozen model.
        examples: Each with one or more targets.
        prefix: None: the bare model.
        text_format: None: what the prefix was trained with.
        config: How to decode; None: greedy.
        kind: What the bare model is asked for: `generation`, or `classification` by the labels' own words. A prefix
            says itself what it was trained for.
        on_batch: Told after each batch how many examples are done.

    Raises:
        DataError: There is no example, or one has no target.
    """
    if not examples:
        raise DataError("there is no example to evaluate on.", hint="check the file.")
    for number, example in enumerate(examples):
        if not example.targets:
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
    labels = labels_of(prefix)
    if labels is None and kind != "generation":
        if kind == "tagging":
            raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
        labels = Labels(kind, "words", label_names(examples))
    if labels is not None:
        shared: dict[str, Any] = {"text_format": text_format, "on_batch": on_batch}
        shared["batch_size"] = 16 if config is None else config.batch_size
        return _evaluate_labels(backbone, examples, prefix, labels, shared)
    outputs = generate(
        backbone,
        [example.source for example in examples],
        prefix,
        text_format=text_format,
        config=config or GenerateConfig(),
        on_batch=on_batch,
    )
    scores = {"bleu": bleu(outputs, [list(example.targets) for example in examples])}
    return Evaluation(scores, tuple(outputs))


def _evaluate_labels(
    backbone: Backbone, examples: Sequence[Example], prefix: Prefix | None, labels: Labels, shared: dict[str, Any]
) -> Evaluation:
    """Accuracy and macro F1 of labels; span F1 and accuracy of tags."""
    if labels.kind == "classification":
        bare = labels.names if prefix is None else None
        texts = [example.source for example in examples]
        told = [found.label for found in classify(backbone, texts, prefix, labels=bare, **shared)]
        wanted = [example.targets[0] for example in examples]
        return Evaluation({"accuracy": accuracy(told, wanted), "macro_f1": macro_f1(told, wanted)}, tuple(told))
    if prefix is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    found = tag(backbone, [_field(example, "tokens") for example in examples], prefix, **shared)
    rows = [[each.label for each in row] for row in found]
    references = [_field(example, "tags") for example in examples]
    flat = [name for row in rows for name in row], [name for row in references for name in row]
    scores = {"span_f1": span_f1(rows, references), "accuracy": accuracy(*flat)}
    return Evaluation(scores, tuple(" ".join(row) for row in rows))


def _field(example: Example, name: str) -> Sequence[str]:
    if name not in example.fields:
        raise DataError(
            f"the example {example.source[:60]!r} has no {name}.", hint="read the file with the task 'tagging'."
        )
    given: Sequence[str] = example.fields[name]
    return given
