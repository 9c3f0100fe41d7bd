"""A collator for transformers' `Trainer`: examples or token ids -> padded batches with labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, as_examples
from prefixtune.data.batching import check_prompts
from prefixtune.data.encoding import encode_examples, is_text
from prefixtune.data.files import listed
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy

IGNORED = -100
"""The label of a position without a loss."""


@dataclass(frozen=True, eq=False)
class Collator:
    """Makes padded batches: one row for each target, with labels only at the target.

    It takes `Example`s, rows of a form of data (`source` and `target`, `messages` and so on), or rows of token ids with
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
                continue
            examples = as_examples([feature])
            if isinstance(feature, Mapping) and is_text(examples[0]):
                what = f"a row of the data set has the columns {listed(feature)}; needed are a source and a target."
                raise DataError(what, hint="rename them; set remove_unused_columns=False in the trainer's arguments.")
            rows.extend(self._encode(examples))
        ids, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.backbone.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _unpad(self, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of a row without the padding that its mask shows."""
        ids, labels = [*map(int, feature["input_ids"])], [*map(int, feature["labels"])]
        mask = [*map(bool, feature.get("attention_mask", [1] * len(ids)))]
        # An encoder-decoder's labels are another text.
        apart = self.backbone.kind == "encoder-decoder"
        kept = [*compress(ids, mask)]
        if not kept or len(mask) != len(ids) or not (apart or len(labels) == len(ids)):
            what = f"a row has {len(ids)} input_ids, {len(mask)} numbers in attention_mask and {len(labels)} labels."
            raise DataError(
                what, hint=f"a decoder-only model has a label for each id, {IGNORED} where none is learned."
            )
        return kept, labels if apart else [*compress(labels, mask)]

    def _encode(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and labels of the rows of examples, one for each target.

        Of a conversation there is one row, in which the assistant's turns are labels.
        """
        dataset = encode_examples(
            self.backbone,
            examples,
            self.text_format,
            prefix_length=self.prefix_length,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
        )
        for tokenized in dataset.examples:
            check_prompts([tokenized])
            prompt = list(tokenized.prompt)
            for target, spans in zip(tokenized.targets, tokenized.label_spans(), strict=True):
                if self.backbone.kind == "encoder-decoder":
                    yield prompt, list(target)
                    continue
                labels = [IGNORED] * (len(prompt) + len(target))
                for first, stop in spans:
                    labels[len(prompt) + first : len(prompt) + stop] = target[first:stop]
                yield [*prompt, *target], labels
