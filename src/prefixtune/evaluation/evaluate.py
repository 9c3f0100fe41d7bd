"""Prefix and examples -> scores: decode for every example (or predict its label or tags), and score the outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import PrefixLike, as_prefix
from prefixtune.data.chat import end_of_turn
from prefixtune.data.encoding import (
    DEFAULT_WINDOW,
    TEXT_FORMAT,
    TextFormatLike,
    as_text_format,
    default_format,
    encode_examples,
    is_text,
)
from prefixtune.data.examples import Example, ExampleLike, TaskKind, has_messages
from prefixtune.data.forms import as_examples
from prefixtune.data.labels import Labels, check_labels, label_names, labels_of
from prefixtune.data.truncation import position_limit
from prefixtune.engine.base import Engine
from prefixtune.errors import ConfigError, DataError
from prefixtune.evaluation.decode import decode
from prefixtune.evaluation.metrics.measurement import Array, Measurement
from prefixtune.evaluation.scores import LEVEL, check_examples, check_metrics, score_groups, score_outputs
from prefixtune.inference.classify import classify, tag
from prefixtune.inference.config import GenerateConfig
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.results import Evaluation
from prefixtune.training.score import score_targets
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
    name = "torch" if engine is None else engine.name
    labels = labels_to_predict(labels, prefix, kind, examples, intervals=intervals, engine=name)
    truncated: list[int] = []

    def note_truncated(indices: Sequence[int]) -> None:
        truncated.extend(indices)
        if on_cut is not None:
            on_cut(indices)

    are_texts, start = all(map(is_text, examples)), time.perf_counter()
    with show_batches("evaluating", len(examples), on_batch, progress) as show:
        if labels is None and are_texts:
            limits: dict[str, Any] = {"max_length": decoding.max_total_length, "intervals": intervals}
            return evaluate_texts(backbone, examples, prefix, shape, on_batch=show, **limits)
        if prefix is None and shape is None and labels is None and not has_messages(examples):
            # As a prefix would read them; alone, the model would go on with the source.
            shape = default_format(backbone)
        work: dict[str, Any] = {"text_format": shape, "config": decoding, "on_batch": show, "on_cut": note_truncated}
        if labels is not None:
            outputs = _predict(backbone, examples, prefix, labels, **work)
            outcome = score_outputs(outputs, examples, kind=labels.kind).with_facts(seconds=time.perf_counter() - start)
        else:
            file = None if resume_file is None else Path(resume_file)
            outputs, seconds, unended = decode(backbone, examples, prefix, engine=engine, resume_file=file, **work)
            outcome = score_outputs(outputs, examples, protocol=protocol, metrics=metrics, intervals=intervals)
            outcome = outcome.with_facts(seconds=seconds, num_unended=unended)
    return outcome.with_facts(num_truncated=len(truncated))


def labels_to_predict(
    given: Labels | None,
    prefix: Prefix | None,
    kind: TaskKind,
    examples: Sequence[Example],
    *,
    intervals: bool,
    engine: str = "torch",
) -> Labels | None:
    """What is predicted: the labels that are given, the prefix's, or those of the examples; None: texts are written.

    Raises:
        ConfigError: They do not go with the prefix, the task, intervals or the engine.
        DataError: The examples have other labels.
    """
    if given is not None and prefix is not None:
        raise ConfigError("labels are given, but a prefix has its own.", hint="leave them out.")
    labels = given or labels_of(prefix)
    writes = labels is None and kind == "generation"
    if engine != "torch" and (not writes or all(map(is_text, examples))):
        raise ConfigError(f"{engine} gives no labels and no perplexity.", hint="use the engine torch.")
    if writes:
        return None
    if labels is None and (prefix is not None or kind == "tagging"):
        what = "the bare model" if prefix is None else "a prefix for generation"
        raise ConfigError(f"{what} cannot be used for {kind}.", hint=f"give a prefix that was trained for {kind}.")
    if intervals:
        raise ConfigError("intervals are for texts, not for labels and tags.", hint="leave them out.")
    if labels is None:
        names = label_names(examples)
        labels = Labels(kind, "words", names, names)
    check_labels(examples, labels.names, labels.kind)
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
    if not all({"tokens", "tags"} <= example.fields.keys() for example in examples):
        raise DataError("an example has no tokens and tags.", hint="read the file with the task 'tagging'.")
    tagged = tag(backbone, [example.fields["tokens"] for example in examples], prefix, **work)
    return [" ".join(prediction.label for prediction in row) for row in tagged]


# --- texts alone: perplexity per token, and bits per byte -------------------------------------------------------------

# Long texts are read in windows, as in training (see `data.encoding.text_windows`); every token counts once, the end
# token, too.

_BATCH_SIZE = 4
"""Windows in a pass: each may have hundreds of labels."""


def evaluate_texts(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    text_format: TextFormat | None,
    *,
    max_length: int,
    intervals: bool,
    on_batch: Callable[[int], None] | None,
) -> Evaluation:
    """Compute the losses of texts.

    Args:
        backbone: The frozen model, decoder-only.
        examples: Texts as their only targets, without sources.
        prefix: In front; None: the bare model.
        text_format: None: the prefix's, else the token that begins texts and the text.
        max_length: Positions of a window; 0: those of the text format, else 512. Never more than the model has, or had
            before LongRoPE.
        intervals: Also compute bootstrap intervals over texts.
        on_batch: Called with the number of texts done so far.

    Raises:
        ConfigError: The model is not decoder-only.
    """
    if backbone.kind != "decoder":
        what = f"{backbone.name!r} is an {backbone.kind}, which does not go on with texts, but the data is texts alone."
        raise ConfigError(what, hint="choose a decoder-only model, or give sources and targets.")
    begun = time.perf_counter()
    stored = None if prefix is None else read_text_format(prefix.header)
    chosen = (text_format or stored or TEXT_FORMAT).with_lengths(max_length)
    length = 0 if prefix is None else prefix.length("decoder")
    longest = chosen.max_length
    if backbone.longrope_limit is not None:
        # A longer window would turn the keys of the shorter ones in its batch.
        longest = min(longest or DEFAULT_WINDOW, backbone.longrope_limit)
    window = min(position_limit(backbone, length, longest), longest or DEFAULT_WINDOW)
    dataset = encode_examples(backbone, examples, chosen, prefix_length=length, max_length=longest)
    ends = np.cumsum(np.bincount(dataset.origins or range(len(examples))))

    def report(windows: int) -> None:
        if on_batch is not None:
            on_batch(int(np.searchsorted(ends, windows, side="right")))

    rows = score_targets(backbone, prefix, dataset.examples, _BATCH_SIZE, report).numpy()
    sums = np.add.reduceat(rows, [0, *ends[:-1]], axis=0)
    num_bytes = np.array([[len(example.targets[0].encode())] for example in examples], dtype=float)
    values, of = np.concatenate([sums, num_bytes], axis=1), f"windows of {window} positions"
    by_token = f"prefixtune: exp of the mean loss per token, the end token included, {of}"
    by_byte = f"prefixtune: summed loss in bits per byte of UTF-8, {of}"
    measured = {
        "perplexity": Measurement(values, _perplexity, by_token, "perplexity", higher_is_better=False),
        "bits_per_byte": Measurement(values, _bits_per_byte, by_byte, "bits per byte", higher_is_better=False),
    }
    return Evaluation(
        scores={name: one.to_score(level=LEVEL if intervals else None) for name, one in measured.items()},
        outputs=tuple(f"perplexity {_perplexity(row):.3f} of {int(row[1]):,} tokens" for row in values),
        num_examples=len(examples),
        groups=score_groups(measured, examples),
        seconds=time.perf_counter() - begun,
    )


def _perplexity(sums: Array) -> float:
    return math.exp(min(sums[0] / sums[1], 700))  # a larger one is no float


def _bits_per_byte(sums: Array) -> float:
    return float(sums[0] / math.log(2) / sums[2])


# --- the bare model: instructions, and solved examples (few-shot prompting) -------------------------------------------


def few_shot_format(text_format: TextFormat, examples: Sequence[Example], separator: str, end: str) -> TextFormat:
    """A text format that shows a few solved examples before the source, in the same format.

    >>> shown = few_shot_format(TextFormat("{source} =", " {target}"), [Example("1+1", ("2",))], "", ".")
    >>> shown.format_prompt("2+3", "")
    '1+1 = 2.2+3 ='

    Args:
        text_format: The format without examples.
        examples: The examples to show, each with its first target.
        separator: What the format's `{separator}` means.
        end: The text that ends a target.

    Raises:
        DataError: The format has a chat template, or an example contains a placeholder of the template.
        ConfigError: It becomes too long for a template.
    """
    if text_format.is_chat:
        hint = "give conversations whose earlier turns are the examples."
        raise DataError("solved examples cannot be shown in a chat template.", hint=hint)
    check_literal("", examples)
    shown = "".join(
        text_format.format_prompt(example.source, separator) + text_format.format_target(example.targets[0]) + end
        for example in examples
    )
    return _with_prompt(text_format, shown + text_format.prompt)


def instruction_format(backbone: Backbone, instruction: str, examples: Sequence[Example] = ()) -> TextFormat:
    """A text format that instructs the bare model, and may show it a few solved examples.

    If the tokenizer has a chat template, it is used, and outputs end where its turns do; otherwise instruction and
    examples are put before the source, which is formatted as for a prefix.

    Args:
        backbone: The model.
        instruction: What to do with the source, in words.
        examples: The examples to show, each with its first target.

    Raises:
        DataError: The instruction or an example contains a placeholder of the template.
        ConfigError: It becomes too long for a template.
    """
    check_literal(instruction, examples)
    tokenizer = backbone.tokenizer
    if backbone.kind == "decoder" and tokenizer.chat_template:
        messages = []
        for example in (*examples, Example("{source}", ("",))):
            messages.append({"role": "user", "content": f"{instruction}\n{example.source}"})
            messages.append({"role": "assistant", "content": example.targets[0]})
        del messages[-1]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return _with_prompt(TextFormat(target="{target}", end=end_of_turn(backbone)), str(prompt))
    shown = few_shot_format(default_format(backbone), examples, backbone.separator, backbone.end)
    return _with_prompt(shown, f"{instruction}\n{shown.prompt}")


def _with_prompt(text_format: TextFormat, prompt: str) -> TextFormat:
    """A text format with another prompt; refused in words where it is too long."""
    return TextFormat.from_dict(text_format.to_dict() | {"prompt": prompt})


def check_literal(instruction: str, examples: Sequence[Example]) -> None:
    """Refuse an instruction or solved examples that would change the template that they are shown in, or not fit it.

    Raises:
        DataError: They have a placeholder of it, or an example has several messages.
    """
    if any(len(one.messages) > 1 for one in examples):
        hint = "show examples of one message each, or give conversations whose earlier turns are the examples."
        raise DataError("a solved example has several messages.", hint=hint)
    for text in (instruction, *(text for one in examples for text in (one.source, one.targets[0]))):
        if "{source}" in text or "{separator}" in text:
            what = f"{text[:60]!r} contains a placeholder of text formats, {{source}} or {{separator}}."
            raise DataError(what, hint="word it otherwise, or show other examples.")
