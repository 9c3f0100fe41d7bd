"""Prefix x data -> scores: generate for every example (or tell its label or tags) and compare with its references.

What was decoded can be kept on disk as it comes, so that an evaluation that was stopped goes on where it was. Knows
nothing of how a score is computed, nor of how results are shown.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data import Example, ExampleLike, as_examples, label_names, references_of
from prefixtune.data.encoding import TextFormatLike, as_text_format
from prefixtune.data.labels import Labels, labels_of
from prefixtune.errors import ConfigError, DataError, describe_value, did_you_mean
from prefixtune.evaluation.metrics import METRICS, PROTOCOLS, Measurement, accuracy, macro_f1, measure, span_f1
from prefixtune.evaluation.records import Evaluation, GroupScores, append_decoded, digest_of, read_decoded
from prefixtune.inference.classify import classify, tag
from prefixtune.inference.config import GenerateConfig, check_tagging_lengths
from prefixtune.inference.generate import generate, prepare_prompts
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.options import as_config
from prefixtune.utils.writable import check_writable

__all__ = ["check_examples", "check_kind", "evaluate"]

_KINDS = ("generation", "classification", "tagging")


def evaluate(
    backbone: BackboneLike,
    examples: Sequence[ExampleLike],
    prefix: PrefixLike | None = None,
    *,
    text_format: TextFormatLike | None = None,
    config: GenerateConfig | Mapping[str, Any] | None = None,
    kind: str = "generation",
    protocol: str = "plain",
    metrics: str | Sequence[str] | None = ("bleu",),
    intervals: bool = False,
    kept: str | Path | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Generate for every example, and score the outputs against its targets.

    A prefix that classifies or tags, by its header, is scored by accuracy and F1 instead, whatever `metrics` says.

    Args:
        backbone: The frozen model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        examples: Each with one or more targets: `Example`s, or dicts such as `{"source": "...", "targets": ["..."]}`.
        prefix: A `Prefix`, a path, or a repository of the hub; None: the bare model.
        text_format: None: what the prefix was trained with.
        config: How to decode: a `GenerateConfig`, or a dict of its fields; None: greedy.
        kind: What the bare model is asked for: `generation`, or `classification` by the labels' own words. A prefix
            says itself what it was trained for.
        protocol: Whose rules texts are scored by (`Task.protocol`).
        metrics: Which scores, or one; None: the protocol's usual ones. What cannot be computed here is left out and
            said.
        intervals: Also give each score's bootstrap interval.
        kept: A file that keeps what is decoded as it comes; an evaluation that finds it goes on from there.
        on_batch: Told after each batch how many examples are done.
        on_cut: Called before the work with the numbers of the sources that were cut to fit, counted from 0, where any
            were.
        **options: Fields of `GenerateConfig`, in place of `config`.

    Raises:
        DataError: There is no example, or one is wrong or has no target.
        RequestError: A source is too long, and not to be cut; before any work is done.
        ConfigError: `kept` holds the outputs of another evaluation; a metric or the protocol is unknown; intervals
            were asked for of labels or tags; or an argument is of a wrong type.
    """
    decoding = as_config(GenerateConfig, config, options)
    examples = as_examples(examples)
    form = as_text_format(text_format)
    kept = None if kept is None else Path(kept)
    if kind not in _KINDS:
        raise ConfigError(f"kind is {kind!r}, but must be one of {', '.join(_KINDS)}.", hint="leave it out for texts.")
    check_examples(examples)
    backbone = as_backbone(backbone)
    prefix = as_prefix(prefix, backbone)
    cuts: list[int] = []

    def keep_cut(numbers: Sequence[int]) -> None:
        cuts.extend(numbers)
        if on_cut is not None:
            on_cut(numbers)

    labels = labels_of(prefix)
    check_kind(kind, labelled=labels is not None, intervals=intervals)
    if labels is None and kind != "generation":
        labels = Labels(kind, "words", label_names(examples))
    if labels is not None:
        shared: dict[str, Any] = {"text_format": form, "on_batch": on_batch}
        shared["batch_size"] = decoding.batch_size
        if labels.kind == "classification":
            lengths = {"max_total_length": decoding.max_total_length, "on_too_long": decoding.on_too_long}
            shared |= {**lengths, "on_cut": keep_cut}
        else:
            check_tagging_lengths(decoding)
        return dataclasses.replace(_evaluate_labels(backbone, examples, prefix, labels, shared), num_cut=len(cuts))
    # Before the work and not after it.
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    if metrics is not None and not isinstance(metrics, Sequence):
        raise ConfigError(f"metrics is {describe_value(metrics)}, but must be a list of names.", hint='write ["bleu"].')
    _check_names(protocol, metrics)
    if kept is not None:
        check_writable(kept)
    outputs, seconds = _decode(backbone, examples, prefix, form, decoding, kept, on_batch, keep_cut)
    left_out: dict[str, str] = {}
    measured = _measure(outputs, examples, protocol, metrics, left_out)
    level = 0.95 if intervals else None
    return Evaluation(
        {name: one.to_score(level=level) for name, one in measured.items()},
        tuple(outputs),
        _score_groups(measured, examples),
        left_out,
        seconds,
        len(cuts),
    )


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse what cannot be scored, before any decoding.

    Raises:
        DataError: There is no example, or one has no target.
    """
    if not examples:
        raise DataError("there is no example to evaluate on.", hint="check the file.")
    for number, example in enumerate(examples):
        if not any(target.strip() for target in example.targets):
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )


def check_kind(kind: str, *, labelled: bool, intervals: bool) -> None:
    """Refuse what does not go with labels and tags.

    Args:
        kind: Of the task.
        labelled: Whether the prefix was trained to classify or tag.
        intervals: Whether they are asked for.

    Raises:
        ConfigError: Tags of the bare model, or intervals of labels or tags.
    """
    if kind == "tagging" and not labelled:
        raise ConfigError("the bare model cannot tag.", hint="give a prefix that was trained for tagging.")
    if intervals and (labelled or kind != "generation"):
        raise ConfigError("intervals are for texts, not for labels and tags.", hint="leave them out.")


# --- decoding --------------------------------------------------------------------------------------------------------


def _decode(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    config: GenerateConfig,
    kept: Path | None,
    on_batch: Callable[[int], None] | None,
    on_cut: Callable[[Sequence[int]], None],
) -> tuple[list[str], float]:
    """One output per example, and the seconds that it took; texts of like length share a batch."""
    sources = [example.source for example in examples]
    # Every length is checked, and every cut counted, before the first batch.
    prepare_prompts(backbone, sources, [prefix] * len(sources), config, text_format, on_cut=on_cut)
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].source))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    digest = "" if kept is None else digest_of(backbone, examples, prefix, text_format, config)
    rows = [] if kept is None else list(read_decoded(kept, digest))
    outputs = {row["number"]: row["output"] for row in rows}
    seconds = sum(row["seconds"] for row in rows)
    for number, batch in enumerate(batches):
        if any(place not in outputs for place in batch):
            chosen = config if config.seed is None else dataclasses.replace(config, seed=config.seed + number)
            shared: dict[str, Any] = {"text_format": text_format, "config": chosen, "on_cut": lambda _: None}
            texts = [sources[place] for place in batch]
            began = time.perf_counter()
            made = dict(zip(batch, generate(backbone, texts, prefix, **shared), strict=True))
            took = time.perf_counter() - began
            outputs.update(made)
            seconds += took
            if kept is not None:
                append_decoded(kept, digest, made, took)
        if on_batch is not None:
            on_batch(min(len(order), (number + 1) * config.batch_size))
    return [outputs[place] for place in range(len(examples))], seconds


# --- scoring ---------------------------------------------------------------------------------------------------------


def _check_names(protocol: str, metrics: Sequence[str] | None) -> None:
    if protocol not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {protocol!r}.", hint=did_you_mean(protocol, PROTOCOLS))
    for name in metrics or ():
        if name not in METRICS:
            raise ConfigError(f"there is no metric {name!r}.", hint=did_you_mean(name, METRICS))


def _measure(
    outputs: Sequence[str],
    examples: Sequence[Example],
    protocol: str,
    metrics: Sequence[str] | None,
    left_out: dict[str, str],
) -> dict[str, Measurement]:
    references = [references_of(example, protocol) for example in examples]
    try:
        return measure(outputs, references, protocol=protocol, metrics=metrics, left_out=left_out)
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check the references.") from error


def _score_groups(
    measured: Mapping[str, Measurement], examples: Sequence[Example]
) -> dict[str, dict[str, GroupScores]]:
    """The scores of every group, in the order of the groups' first examples."""
    members: dict[str, dict[str, list[int]]] = {}
    for number, example in enumerate(examples):
        for grouping, group in example.groups.items():
            members.setdefault(grouping, {}).setdefault(group, []).append(number)
    return {
        grouping: {
            group: GroupScores(
                len(numbers),
                {name: one.part(numbers).to_score() for name, one in measured.items()},
            )
            for group, numbers in groups.items()
        }
        for grouping, groups in members.items()
    }


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
