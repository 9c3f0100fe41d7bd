"""Prefix and examples -> scores: decode for every example (or predict its label or tags), and score the outputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.encoding import TextFormatLike, as_text_format, default_format
from prefixtune.data.examples import Example, ExampleLike, TaskKind, has_messages, references_of
from prefixtune.data.given import as_examples
from prefixtune.data.label_names import label_names
from prefixtune.data.labels import Labels, check_known, labels_of
from prefixtune.data.windows import is_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.evaluation.decode import Decoded, decode
from prefixtune.evaluation.language import evaluate_texts
from prefixtune.evaluation.metrics import accuracy, macro_f1, measure, metric_names, span_f1
from prefixtune.evaluation.records import Evaluation, score_groups
from prefixtune.inference.classify import classify, tag
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.console import show_batches

__all__ = ["check_examples", "check_kind", "evaluate"]


def evaluate(
    backbone: BackboneLike,
    examples: Sequence[ExampleLike],
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    kind: TaskKind = "generation",
    labels: Labels | None = None,
    protocol: str = "plain",
    metrics: str | Sequence[str] | None = ("bleu",),
    intervals: bool = False,
    resume_file: str | Path | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Generate for every example, and score the outputs against its targets.

    A prefix that classifies or tags, by its header, is scored by accuracy and F1 instead, whatever `metrics` says; and
    texts without sources by their perplexity and bits per byte, in windows of `max_total_length`, with nothing
    generated.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        examples: Each with one or more targets: `Example`s, or dicts such as `{"source": "...", "targets": ["..."]}`.
        prefix: A `Prefix`, a path, or a repository of the hub; None: the bare model.
        text_format: None: the one that the prefix was trained with; without a prefix, that of training by default.
        config: How to decode: a `GenerateConfig`, or a dict of its fields; None: greedy.
        kind: The bare model's task: `generation`, or `classification` by the labels' own words. A prefix knows its
            task.
        labels: Those that the model's own weights were trained with (`labels_in` the header of a run of another
            method); None: the prefix's own, or for the bare model those of the examples.
        protocol: By whose rules texts are scored (`Task.protocol`).
        metrics: The name of a score, or several; None: the protocol's usual ones. Those that cannot be computed here
            are left out, with the reason in `Evaluation.left_out`.
        intervals: Also compute each score's bootstrap interval.
        resume_file: A file to which every batch's outputs are written; if it exists, decoding continues after them.
        on_batch: Called after each batch with the number of examples done so far.
        on_cut: Called before the work with the indices of the sources that were truncated to fit, if there are any.
        progress: Show the progress on stderr.
        **options: Fields of `GenerateConfig`, instead of `config`.

    Raises:
        DataError: There is no example, one is wrong or has no target, or one has a label that the prefix does not know.
        RequestError: A source is too long and may not be truncated; raised before any work is done.
        ConfigError: `resume_file` holds the outputs of another evaluation; a metric or the protocol is unknown;
            intervals of labels or tags; the prefix is for something else; or an argument is of a wrong type.
    """
    decoding = GenerateConfig.from_arguments(config, options)
    examples = as_examples(examples)
    chosen_format = as_text_format(text_format)
    check_examples(examples, protocol)
    try:
        names = metric_names(protocol, metrics)
    except ValueError as error:
        raise ConfigError(f"{error}.", hint="choose another name.") from error
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    truncated: list[int] = []

    def note_truncated(indices: Sequence[int]) -> None:
        truncated.extend(indices)
        if on_cut is not None:
            on_cut(indices)

    if labels is not None and prefix is not None:
        raise ConfigError("labels are given, but a prefix has its own.", hint="leave them out.")
    labels = labels or labels_of(prefix)
    check_kind(kind, labelled=labels is not None, intervals=intervals, has_prefix=prefix is not None)
    if labels is not None:
        check_known(examples, labels)
    if labels is None and kind != "generation":
        names_of_examples = label_names(examples)
        labels = Labels(kind, "words", names_of_examples, names_of_examples)
    predicts_texts = labels is None and all(is_text(example) for example in examples)
    with show_batches("evaluating", len(examples), on_batch, progress) as show:
        if labels is not None:
            outcome = _evaluate_labels(
                backbone, examples, prefix, labels, chosen_format, decoding, show, note_truncated
            )
        elif predicts_texts:
            outcome = evaluate_texts(
                backbone,
                examples,
                prefix,
                chosen_format,
                max_length=decoding.max_total_length,
                intervals=intervals,
                on_batch=show,
            )
        else:
            if prefix is None and chosen_format is None and not has_messages(examples):
                # As a prefix would read them; alone, the model would go on with the source.
                chosen_format = default_format(backbone)
            decoded = decode(
                backbone,
                examples,
                prefix,
                chosen_format,
                decoding,
                resume_file=None if resume_file is None else Path(resume_file),
                on_batch=show,
                on_cut=note_truncated,
            )
    if labels is None and not predicts_texts:
        outcome = _score_texts(decoded, examples, protocol, names, intervals=intervals)
    return dataclasses.replace(outcome, num_truncated=len(truncated))


def check_examples(examples: Sequence[Example], protocol: str = "plain") -> None:
    """Refuse examples that cannot be scored, before any decoding.

    Args:
        examples: To evaluate on.
        protocol: As in `evaluate`.

    Raises:
        DataError: There is no example, or one has no target, or under this protocol no reference.
    """
    if not examples:
        raise DataError("there is no example to evaluate on.", hint="check the file.")
    for number, example in enumerate(examples, start=1):
        if not any(target.strip() for target in example.targets):
            raise DataError(
                f"example {number} ({example.source[:60]!r}) has no target.",
                hint="name the target column (--target), or a file with references.",
            )
        if not any(text.strip() for text in references_of(example, protocol)):
            raise DataError(
                f"the references of example {number} ({example.source[:60]!r}) by the protocol {protocol!r} are blank "
                "(official_references_3).",
                hint="fill in the official references of its row, or leave that column out.",
            )


def check_kind(kind: TaskKind, *, labelled: bool, intervals: bool, has_prefix: bool = False) -> None:
    """Refuse what labels and tags do not support.

    Args:
        kind: Of the task.
        labelled: Whether the prefix, or the model's own weights, were trained to classify or tag.
        intervals: Whether intervals are wanted.
        has_prefix: Whether there is a prefix.

    Raises:
        ConfigError: Labels or tags of a prefix that generates, tags of the bare model, or intervals of labels or tags.
    """
    if kind != "generation" and has_prefix and not labelled:
        raise ConfigError(
            f"a prefix for generation cannot be used for {kind}.",
            hint=f"give a prefix that was trained for {kind}, or name a source and a target of your data.",
        )
    if kind == "tagging" and not labelled:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    if intervals and (labelled or kind != "generation"):
        raise ConfigError("intervals are for texts, not for labels and tags.", hint="leave them out.")


# --- texts -----------------------------------------------------------------------------------------------------------


def _score_texts(
    decoded: Decoded,
    examples: Sequence[Example],
    protocol: str,
    metrics: Sequence[str] | None,
    *,
    intervals: bool,
) -> Evaluation:
    references = [references_of(example, protocol) for example in examples]
    left_out: dict[str, str] = {}
    try:
        measured = measure(decoded.outputs, references, protocol=protocol, metrics=metrics, left_out=left_out)
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check the references.") from error
    level = 0.95 if intervals else None
    return Evaluation(
        {name: measurement.to_score(level=level) for name, measurement in measured.items()},
        tuple(decoded.outputs),
        score_groups(measured, examples),
        left_out,
        decoded.seconds,
        num_unended=decoded.num_unended,
    )


# --- labels and tags -------------------------------------------------------------------------------------------------


def _evaluate_labels(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    labels: Labels,
    text_format: TextFormat | None,
    decoding: GenerateConfig,
    on_batch: Callable[[int], None] | None,
    on_cut: Callable[[Sequence[int]], None],
) -> Evaluation:
    """Accuracy and macro F1 of labels; span F1 and accuracy of tags."""
    shared: dict[str, Any] = {
        "text_format": text_format,
        "config": decoding,
        "on_batch": on_batch,
    }
    start_time = time.perf_counter()
    if labels.kind == "classification":
        predictions = classify(
            backbone,
            [example.source for example in examples],
            prefix,
            labels=labels if prefix is None else None,
            on_cut=on_cut,
            **shared,
        )
        seconds = time.perf_counter() - start_time
        predicted = [prediction.label for prediction in predictions]
        wanted = [example.targets[0] for example in examples]
        scores = {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)}
        return Evaluation(scores, tuple(predicted), seconds=seconds)
    if prefix is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    tagged = tag(backbone, [_field(example, "tokens") for example in examples], prefix, **shared)
    seconds = time.perf_counter() - start_time
    predicted_tags = [[prediction.label for prediction in row] for row in tagged]
    wanted_tags = [_field(example, "tags") for example in examples]
    flat = [name for row in predicted_tags for name in row], [name for row in wanted_tags for name in row]
    scores = {"span_f1": span_f1(predicted_tags, wanted_tags), "accuracy": accuracy(*flat)}
    return Evaluation(scores, tuple(" ".join(row) for row in predicted_tags), seconds=seconds)


def _field(example: Example, name: str) -> Sequence[str]:
    if name not in example.fields:
        raise DataError(
            f"the example {example.source[:60]!r} has no {name}.", hint="read the file with the task 'tagging'."
        )
    values: Sequence[str] = example.fields[name]
    return values
