"""A collator for transformers' `Trainer`: examples or token ids -> padded batches with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import chat_example
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy

__all__ = ["IGNORED", "Collator"]


IGNORED = -100
"""The label of a position without a loss."""


@dataclass(frozen=True, eq=False)
class Collator:
    """Makes padded batches: one row for each target, with labels only at the target.

    It takes `Example`s, rows with `source` and `target` (one text, or several) or `messages`, or rows of token ids with
    `input_ids` and `labels`, of which those where `attention_mask` is 0 are left out. Sources that do not fit are cut,
    as in `train`.

    Attributes:
        backbone: The model that the batches are for.
        text_format: The text around source and target.
        prefix_length: P, which takes positions of a decoder-only model.
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: the backbone's.
        on_too_long: `cut` the source, or raise an `error`.
    """

    backbone: Backbone
    text_format: TextFormat
    prefix_length: int
    max_length: int = 0
    on_too_long: TruncationPolicy = "cut"

    def __call__(self, features: Sequence[Example | Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels`.

        Raises:
            DataError: A row has none of the known columns, or does not fit.
        """
        rows: list[tuple[list[int], list[int]]] = []
        for feature in features:
            if isinstance(feature, Mapping) and {"input_ids", "labels"} <= feature.keys():
                rows.append(self._unpad(feature))
            else:
                rows.extend(self._encode(_to_example(feature)))
        ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        pad = self.backbone.pad_id
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _unpad(self, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of a row without the padding that its mask shows."""
        ids, labels = [*map(int, feature["input_ids"])], [*map(int, feature["labels"])]
        mask = [*map(bool, feature.get("attention_mask", [1] * len(ids)))]
        ids = [*compress(ids, mask)]
        # An encoder-decoder's labels are another text.
        return ids, labels if self.backbone.kind == "encoder-decoder" else [*compress(labels, mask)]

    def _encode(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of the rows of an example, one for each target."""
        dataset = encode_examples(
            self.backbone,
            [example],
            self.text_format,
            prefix_length=self.prefix_length,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
        )
        return [row for tokenized in dataset.examples for row in self._rows_of(tokenized)]

    def _rows_of(self, tokenized: TokenizedExample) -> list[tuple[list[int], list[int]]]:
        """Of a conversation there is one row, in which the assistant's turns are labels."""
        prompt = list(tokenized.prompt)
        if not prompt:
            raise DataError(
                "an empty prompt cannot predict a target's first token.", hint="use a prompt format with a separator."
            )
        if self.backbone.kind == "encoder-decoder":
            return [(prompt, list(target)) for target in tokenized.targets]
        rows = []
        for target, spans in zip(tokenized.targets, tokenized.label_spans(), strict=True):
            labels = [IGNORED] * (len(prompt) + len(target))
            for first, stop in spans:
                labels[len(prompt) + first : len(prompt) + stop] = target[first:stop]
            rows.append(([*prompt, *target], labels))
        return rows


def _to_example(feature: Example | Mapping[str, Any]) -> Example:
    if isinstance(feature, Example):
        return feature
    if "messages" in feature:
        return chat_example(feature["messages"])
    target = feature.get("target")
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    if not isinstance(feature.get("source"), str) or not all(isinstance(text, str) for text in targets):
        columns = ", ".join(map(repr, feature)) or "none, as the trainer removed them"
        raise DataError(
            f"a row of the data set has the columns {columns}; needed are source and target, messages, or "
            "input_ids and labels.",
            hint="rename the columns, and set remove_unused_columns=False in the trainer's arguments.",
        )
    return Example(feature["source"], targets)
