"""What is explained: a prefix on its backbone, the rows of data it is run on, and the limits of the work."""

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
from prefixtune.data.labels import Labels, check_known, encode_labelled, labels_of, with_label_words
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

__all__ = ["Limits", "Subject", "make_subject"]


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
        origins: The example of each row of tokens, where some have several; empty: one each.
        labels: Where the prefix classifies or tags; None: it generates.
        controls: Name -> a prefix to compare with: `random`, `shuffled`, `other`.
        limits: How much is computed.
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
        check_known(rows, labels)
    if labels is not None and labels.by == "words":
        rows = list(with_label_words(rows, labels))
    longest = max((each.prefix_length for each in (prefix, *controls.values())), default=0)
    tokenized: Sequence[TokenizedExample] = ()
    origins: Sequence[int] = ()
    if rows:
        dataset = tokenize(prefix, backbone, rows, text_format, labels, longest)
        tokenized, origins = dataset.examples[: limits.rows], list(map(int, dataset.origins[: limits.rows]))
    return Subject(
        backbone=backbone,
        prefix=prefix.to(torch.float32, "cpu"),
        text_format=text_format,
        examples=tuple(rows[: origins[-1] + 1] if origins else rows),
        tokenized=tokenized,
        labels=labels,
        controls=controls,
        limits=limits,
        on_part=on_part,
        origins=origins,
    )


def tokenize(
    prefix: Prefix,
    backbone: Backbone,
    rows: Sequence[Example],
    text_format: TextFormat,
    labels: Labels | None,
    prefix_length: int,
) -> TokenizedDataset:
    """The rows as tokens, as long as in training, and no longer than the backbone has room for.

    Args:
        prefix: Where its header has no text format, rows that are too long are cut.
        backbone: Of the prefix.
        rows: With one target each.
        text_format: Of the prefix.
        labels: Likewise.
        prefix_length: Positions that the backbone has no more for the rows.
    """
    lengths: dict[str, Any] = {
        "prefix_length": prefix_length,
        "max_length": text_format.max_length,
        "on_too_long": text_format.on_too_long if prefix.header.get("text_format") is not None else "cut",
    }
    if labels is not None and labels.by == "head":
        return encode_labelled(backbone, rows, labels, text_format, **lengths)
    return encode_examples(backbone, rows, text_format, turns="last", **lengths)


def blocks(count: int, most: int) -> list[range]:
    """Numbers from 0 to `count`, in at most `most` blocks of neighbours.

    >>> blocks(5, 2), blocks(2, 9)
    ([range(0, 3), range(3, 5)], [range(0, 1), range(1, 2)])
    """
    size = max(1, math.ceil(count / most))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]
