"""Prefix and examples -> scores: decode for every example (or predict its label or tags), and score the outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.encoding import TextFormatLike, as_text_format, default_format, is_text
from prefixtune.data.examples import Example, ExampleLike, TaskKind, has_messages
from prefixtune.data.given import as_examples
from prefixtune.data.labels import Labels, check_labels, label_names, labels_of
from prefixtune.engine.base import Engine
from prefixtune.errors import ConfigError, DataError
from prefixtune.evaluation.decode import decode
from prefixtune.evaluation.language import evaluate_texts
from prefixtune.evaluation.scores import check_examples, check_metrics, score_outputs
from prefixtune.inference.classify import classify, tag
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.results import Evaluation
from prefixtune.utils.console import show_batches


def evaluate(
    backbone: BackboneLike,
    examples: Sequence[ExampleLike],
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    engine: Engine | None = None,
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
        engine: An open engine of this backbone that generates; None: torch, for this call. Labels and perplexity need
            torch.
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
    decoding, examples = GenerateConfig.from_arguments(config, options), as_examples(examples)
    shape = as_text_format(text_format)
    check_metrics(metrics, protocol=protocol)
    check_examples(examples, protocol)
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    labels = _labels(labels, prefix, kind, examples, intervals=intervals)
    if engine is not None and (labels is not None or all(map(is_text, examples))):
        raise ConfigError(f"{engine.name} gives no labels and no perplexity.", hint="use the engine torch.")
    truncated: list[int] = []

    def note_truncated(indices: Sequence[int]) -> None:
        truncated.extend(indices)
        if on_cut is not None:
            on_cut(indices)

    start, num_unended = time.perf_counter(), 0
    with show_batches("evaluating", len(examples), on_batch, progress) as show:
        work: dict[str, Any] = {"text_format": shape, "config": decoding, "on_batch": show}
        if labels is not None:
            outputs = _predict(backbone, examples, prefix, labels, on_cut=note_truncated, **work)
            seconds = time.perf_counter() - start
        elif all(map(is_text, examples)):
            length = decoding.max_total_length
            return evaluate_texts(
                backbone, examples, prefix, shape, max_length=length, intervals=intervals, on_batch=show
            )
        else:
            if prefix is None and shape is None and not has_messages(examples):
                # As a prefix would read them; alone, the model would go on with the source.
                work["text_format"] = default_format(backbone)
            file = None if resume_file is None else Path(resume_file)
            outputs, seconds, num_unended = decode(
                backbone, examples, prefix, engine=engine, resume_file=file, on_cut=note_truncated, **work
            )
    outcome = (
        score_outputs(outputs, examples, protocol=protocol, metrics=metrics, intervals=intervals)
        if labels is None
        else score_outputs(outputs, examples, kind=labels.kind)
    )
    return outcome.with_facts(seconds=seconds, num_truncated=len(truncated), num_unended=num_unended)


def _labels(
    given: Labels | None, prefix: Prefix | None, kind: TaskKind, examples: Sequence[Example], *, intervals: bool
) -> Labels | None:
    """What is predicted: the labels that are given, the prefix's, or those of the examples; None: texts are written."""
    if given is not None and prefix is not None:
        raise ConfigError("labels are given, but a prefix has its own.", hint="leave them out.")
    labels = given or labels_of(prefix)
    if kind == "tagging" and labels is None and prefix is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    if kind != "generation" and labels is None and prefix is not None:
        raise ConfigError(
            f"a prefix for generation cannot be used for {kind}.",
            hint=f"give a prefix that was trained for {kind}, or name a source and a target of your data.",
        )
    if kind != "generation" and labels is None:
        names = label_names(examples)
        labels = Labels(kind, "words", names, names)
    if labels is not None:
        check_labels(examples, labels.names, labels.kind)
        if intervals:
            raise ConfigError("intervals are for texts, not for labels and tags.", hint="leave them out.")
    return labels


def _predict(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    labels: Labels,
    *,
    on_cut: Callable[[Sequence[int]], None],
    **work: Any,
) -> list[str]:
    """The label of each example, or its tags with a space between."""
    if labels.kind == "classification":
        own = labels if prefix is None else None
        sources = [example.source for example in examples]
        predictions = classify(backbone, sources, prefix, labels=own, on_cut=on_cut, **work)
        return [prediction.label for prediction in predictions]
    if prefix is None:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    for example in examples:
        if not {"tokens", "tags"} <= example.fields.keys():
            raise DataError(
                f"the example {example.source[:60]!r} has no tokens and tags.",
                hint="read the file with the task 'tagging'.",
            )
    tagged = tag(backbone, [example.fields["tokens"] for example in examples], prefix, **work)
    return [" ".join(prediction.label for prediction in row) for row in tagged]
