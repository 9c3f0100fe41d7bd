"""Batches of conversations for trainers: what the assistant writes is learned, and nothing else."""

import pytest

from prefixtune.data.chat import chat_format
from prefixtune.data.encoding import default_format
from prefixtune.interop.collator import Collator

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
REWRITES = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:1] }}")
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
    {"role": "assistant", "content": "No."},
]


def test_rows_that_are_padded_already(tiny_backbone):
    row = {"input_ids": [2, 2, 5, 6], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, 5, 6]}
    longer = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    for name, learned in (("llama", [5, 6, -100]), ("bart", [-100, -100, 5, 6])):
        backbone = tiny_backbone(name)
        batch = Collator(backbone, default_format(backbone), prefix_length=3)([row, longer])
        assert batch["input_ids"].tolist() == [[5, 6, backbone.pad_id], [3, 4, 5]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        assert batch["labels"][0].tolist() == learned


@pytest.mark.parametrize(
    ("template", "expected"),
    [(TEMPLATE, ["Yes?<pad>No.<pad>", "No.<pad>"]), (REWRITES, ["Yes?<pad>", "No.<pad>", "No.<pad>"])],
)
def test_labels_of_conversations(tiny_backbone, template, expected):
    backbone = tiny_backbone("llama")
    collate = Collator(backbone, chat_format(backbone, template), prefix_length=3)
    batch = collate([{"messages": CHAT}, {"source": "Go on", "target": "No."}])
    learned = [row[row >= 0].tolist() for row in batch["labels"]]
    assert [backbone.tokenizer.decode(ids) for ids in learned] == expected
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert ids[labels >= 0].tolist() == labels[labels >= 0].tolist()
