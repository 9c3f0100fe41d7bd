"""What is explained: a prefix on its backbone, with rows, controls and limits; and a view: what a look at it found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedDataset, TokenizedExample, encode_examples, format_of
from prefixtune.data.examples import Example
from prefixtune.data.labels import Labels, check_labels, encode_labelled, labels_of, with_label_words
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

__all__ = ["OUT_OF_TIME", "SHOWS", "TITLES", "Limits", "Subject", "View", "make_subject"]

TITLES = {
    "attention": "Attention to the prefix",
    "loss": "Loss with parts left out",
    "nearest": "Nearest real text",
    "description": "The model's own description",
}
"""The views, in the order in which they are made."""
SHOWS = {
    "attention": "It shows where attention goes while the targets are predicted, not what comes from there: a position "
    "with much attention may give next to nothing, as attention sinks do.",
    "loss": "It shows what the rest cannot make up for on these rows, each part alone: parts that do the same work "
    "each look as if they did none, and intervals are not corrected for the number of parts.",
    "nearest": "It shows which tokens' values point in a similar direction, and misleads about meaning: what "
    "is nearest need not be near, and need not say what the prefix does.",
    "description": "It shows what the model says of its prefix, and how much of the prefix's gain the words bring when "
    "they stand in its place; a small model's words may be wrong, or right by the examples in the question.",
}
"""What each view can and cannot show."""
OUT_OF_TIME = "the time was over before it began (--minutes)."


@dataclass(frozen=True)
class View:
    """One look at a prefix.

    Attributes:
        name: Of `TITLES`.
        numbers: What was found, as JSON; see docs/memories.md.
        notes: What a reader should know of this run of it, such as parts that were left out for time.
        left_out: Why there is nothing; empty: there is.
    """

    name: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def title(self) -> str:
        """Its heading."""
        return TITLES[self.name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: its numbers, or why there are none."""
        if self.left_out:
            return {"left_out": self.left_out}
        return {**self.numbers, "shows": SHOWS[self.name], "notes": list(self.notes)}


@dataclass(frozen=True)
class Limits:
    """How much is computed.

    Attributes:
        rows: Most examples, each with its first target; of texts alone, most windows.
        parts: Most blocks that the positions, and the layers, of a prefix are left out in, one block at a time.
        corpus_tokens: Most tokens of real text that values are compared with.
        batch_size: Examples per call of the model.
        seconds: No new part of a view begins after these; 0: no limit.
        seed: Of the controls and of the intervals.
    """

    rows: int = 32
    parts: int = 32
    corpus_tokens: int = 2048
    batch_size: int = 8
    seconds: float = 600.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """A prefix, and what it is looked at with.

    Attributes:
        backbone: The frozen model.
        prefix: In float32, on the CPU.
        text_format: The text around source and target.
        examples: The rows, each with one target; empty: no data.
        tokenized: The same as tokens; a long text in several windows.
        labels: Where the prefix classifies or tags; None: it generates.
        controls: Name -> a prefix to compare with: `random`, `shuffled`, `other`.
        limits: How much is computed.
        on_part: Called after each part of a view.
        origins: The example of each row of tokens, where some have several; empty: one each.
    """

    backbone: Backbone
    prefix: Prefix
    text_format: TextFormat
    examples: tuple[Example, ...]
    tokenized: Sequence[TokenizedExample]
    labels: Labels | None
    controls: Mapping[str, Prefix]
    limits: Limits
    on_part: Callable[[], None] = lambda: None
    origins: Sequence[int] = ()
    _began: float = field(default_factory=time.monotonic)

    @property
    def has_head(self) -> bool:
        """Whether labels come from a trained head, so that the model writes no text."""
        return self.prefix.head is not None

    @property
    def longest(self) -> int:
        """Positions of the longest of the prefix and its controls."""
        return max(each.prefix_length for each in (self.prefix, *self.controls.values()))

    def out_of_time(self) -> bool:
        """Whether the time is over."""
        return bool(self.limits.seconds) and time.monotonic() - self._began > self.limits.seconds

    def timed(self, parts: Sequence[Any]) -> Iterator[Any]:
        """These parts of a view one after the other, until the time is over."""
        for part in parts:
            if self.out_of_time():
                return
            yield part
            self.on_part()

    def tokenize(self, rows: Sequence[Example], text_format: TextFormat, prefix_length: int) -> TokenizedDataset:
        """Rows as tokens, as long as in training, and no longer than the backbone has room for.

        Args:
            rows: With one target each; where the header has no text format, those that are too long are cut.
            text_format: The text around source and target.
            prefix_length: Positions that the backbone has no more for the rows.
        """
        lengths: dict[str, Any] = {
            "prefix_length": prefix_length,
            "max_length": text_format.max_length,
            "on_too_long": text_format.on_too_long if self.prefix.header.get("text_format") is not None else "cut",
        }
        if self.labels is not None and self.labels.by == "head":
            return encode_labelled(self.backbone, rows, self.labels, text_format, **lengths)
        return encode_examples(self.backbone, rows, text_format, turns="last", **lengths)


def make_subject(
    backbone: Backbone,
    prefix: Prefix,
    examples: Sequence[Example],
    controls: Mapping[str, Prefix],
    limits: Limits,
    on_part: Callable[[], None] = lambda: None,
) -> Subject:
    """The first rows as tokens, as in training.

    Raises:
        DataError: An example is wrong or too long, or has a label or a tag that the prefix does not know.
        CheckpointError: The text format in the prefix's header cannot be used.
    """
    labels, text_format = labels_of(prefix), format_of(backbone, prefix)
    rows = [replace(example, targets=example.targets[:1]) for example in examples if example.targets][: limits.rows]
    if labels is not None:
        check_labels(rows, labels.names, labels.kind)
        rows = list(with_label_words(rows, labels)) if labels.by == "words" else rows
    whole = prefix.to(torch.float32, "cpu")
    subject = Subject(backbone, whole, text_format, tuple(rows), (), labels, controls, limits, on_part)
    if not rows:
        return subject
    dataset = subject.tokenize(rows, text_format, subject.longest)
    tokenized, origins = dataset.examples[: limits.rows], list(map(int, dataset.origins[: limits.rows]))
    kept = subject.examples[: origins[-1] + 1] if origins else subject.examples
    return replace(subject, examples=kept, tokenized=tokenized, origins=origins)


def blocks(count: int, most: int) -> list[range]:
    """Numbers from 0 to `count`, in at most `most` blocks of neighbours.

    >>> blocks(5, 2), blocks(2, 9)
    ([range(0, 3), range(3, 5)], [range(0, 1), range(1, 2)])
    """
    size = max(1, math.ceil(count / most))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]
