"""Scores of labels and tags: accuracy, macro F1, span F1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from prefixtune.results import Score

_TAG = re.compile(r"O|([BI])-(.+)", re.DOTALL)


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """The share of items whose prediction is their reference, in percent.

    >>> accuracy(["good", "bad", "good"], ["good", "bad", "bad"]).score
    66.66666666666667

    Args:
        predictions: One label per item, compared exactly: case and white space count.
        references: The correct labels.

    Raises:
        ValueError: The counts differ.
    """
    hits = sum(one == other for one, other in zip(predictions, references, strict=True))
    implementation = "prefixtune (share of equal strings)"
    return Score(name="accuracy", score=100 * hits / len(references), implementation=implementation)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """The mean of the labels' F1 scores, in percent: each label counts the same, however rare.

    The labels are those that occur in the predictions or the references. So a prediction outside the set of labels
    counts as a label of its own, with F1 0, and lowers the mean.

    >>> macro_f1(["good", "good"], ["good", "bad"]).score
    33.33333333333333

    Args:
        predictions: One label per item, compared exactly: case and white space count.
        references: The correct labels.

    Raises:
        ValueError: The counts differ.
    """
    hits = Counter(one for one, other in zip(predictions, references, strict=True) if one == other)
    occurrences = Counter([*predictions, *references])
    scores = [2 * hits[label] / occurrences[label] for label in sorted(occurrences)]
    implementation = "prefixtune (mean F1 of the labels in predictions or references)"
    return Score(name="macro F1", score=100 * sum(scores) / len(scores), implementation=implementation)


def span_f1(predicted_tags: Sequence[Sequence[str]], reference_tags: Sequence[Sequence[str]]) -> Score:
    """Micro F1 of spans, in percent: a span counts if its type, start and end equal those of a reference span.

    Tags are BIO and read leniently, as by default in seqeval: `I-TYPE` after `O`, or after another type, also begins a
    span. A predicted tag that is neither `O`, `B-TYPE` nor `I-TYPE` counts as `O`. Without any span in either, the
    score is 0.

    >>> span_f1([["B-TIME", "I-TIME", "O"]], [["B-TIME", "I-TIME", "B-TRAIN"]]).score
    66.66666666666667

    Args:
        predicted_tags: For each sentence one tag per token.
        reference_tags: The correct tags.

    Raises:
        ValueError: The numbers of sentences, or of tags in one, differ, or a reference is no tag.
    """
    hits = num_predicted = num_references = 0
    for index, (predicted, reference) in enumerate(zip(predicted_tags, reference_tags, strict=True)):
        if len(predicted) != len(reference):
            raise ValueError(f"sentence {index} (from 0) has {len(predicted)} tags for {len(reference)} words")
        if wrong := [tag for tag in reference if not _TAG.fullmatch(tag)]:
            raise ValueError(f"sentence {index} (from 0): reference {wrong[0]!r} is none of O, B-TYPE and I-TYPE")
        predicted_spans, reference_spans = set(_spans(predicted)), set(_spans(reference))
        hits += len(predicted_spans & reference_spans)
        num_predicted += len(predicted_spans)
        num_references += len(reference_spans)
    total = num_predicted + num_references
    implementation = "prefixtune (micro F1 of equal BIO spans, read as seqeval's default)"
    return Score(name="span F1", score=200 * hits / total if total else 0.0, implementation=implementation)


def _spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Type, start and end (exclusive) of each span."""
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        begins, tag_kind = (match[1] == "B", match[2] or "") if match else (False, "")
        if kind and (begins or tag_kind != kind):
            yield kind, start, position
        if begins or tag_kind != kind:
            kind, start = tag_kind, position
