"""Batches of conversations for trainers: what the assistant writes is learned, and nothing else."""

import pytest

from prefixtune.data.encoding import default_format
from prefixtune.errors import DataError
from prefixtune.interop.collator import Collator


def test_rows_that_are_padded_already(tiny_backbone):
    row = {"input_ids": [2, 2, 5, 6], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, 5, 6]}
    longer = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    for name, learned in (("llama", [5, 6, -100]), ("bart", [-100, -100, 5, 6])):
        backbone = tiny_backbone(name)
        batch = Collator(backbone, default_format(backbone), prefix_length=3)([row, longer])
        assert batch["input_ids"].tolist() == [[5, 6, backbone.pad_id], [3, 4, 5]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        assert batch["labels"][0].tolist() == learned


def test_labels_of_another_length_are_refused(tiny_backbone):
    """As those of a data set for encoder-decoders."""
    backbone = tiny_backbone("llama")
    collator = Collator(backbone, default_format(backbone), prefix_length=3)
    for ids, labels in (([5, 6, 7], [20, 21]), ([5], [20, 21]), ([], [])):
        with pytest.raises(DataError):
            collator([{"input_ids": ids, "labels": labels}])
