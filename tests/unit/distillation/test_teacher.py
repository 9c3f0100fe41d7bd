"""Teachers and their labels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.soft_labels import SoftLabels
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.teacher import (
    Teacher,
    check_same_tokens,
    label_examples,
    store_labels,
    stored_labels,
)
from prefixtune.distillation.wording import Wording, in_view
from prefixtune.errors import BackboneError, CheckpointError

WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")


def example(backbone: Backbone, question: str, answer: str) -> TokenizedExample:
    prompt = backbone.encode(WORDING.text_format.format_prompt(question, ""))
    target = [*backbone.encode(WORDING.text_format.format_target(answer)), backbone.eos_id]
    return TokenizedExample(tuple(prompt), (tuple(target),))


def labelled(backbone: Backbone, examples: list[TokenizedExample], views: Any, closing: int = 0) -> list[SoftLabels]:
    teacher = Teacher(backbone, "teacher")
    made = label_examples(teacher, examples, views, vocabulary=105, closing=[closing] * len(examples), batch_size=2)
    return [one.soft_targets[0] for one in made]


def test_labels_are_those_of_the_whole_text_through_the_plain_model(backbone: Backbone) -> None:
    texts = ["The Owl goes to Ashby.", "The Fox goes to Dover."]
    views = [in_view(backbone, WORDING, text) for text in texts]
    asked = [("Where?", "Ashby"), ("Owl?", "Dover, far"), ("Fox?", "B")]
    chosen = [1, 0, 1]
    examples = [example(backbone, *pair) for pair in asked]
    labels = labelled(backbone, examples, [views[index] for index in chosen], closing=2)
    for index, one, own in zip(chosen, examples, labels, strict=True):
        text = backbone.encode(WORDING.view(backbone, texts[index]))
        ids = torch.tensor([[*text, *one.prompt, *one.targets[0]]])
        with torch.no_grad():
            logits = backbone.model(ids).logits[0, len(text) + len(one.prompt) - 1 : -1]
        wanted = SoftLabels.from_logits(logits)
        count = len(one.targets[0]) - 2
        torch.testing.assert_close(own.log_probs[:count], wanted.log_probs[:count], rtol=1e-3, atol=1e-3)
        # The line break and the end token are certain.
        assert own.ids[count:, 0].tolist() == list(one.targets[0][count:])
        assert own.log_probs[count:, 0].tolist() == [0.0, 0.0]


def test_a_teacher_with_more_logits_is_read_in_the_students_vocabulary(tiny_backbone: Callable[..., Any]) -> None:
    larger = tiny_backbone("llama", vocab_size=128, max_position_embeddings=512)
    (labels,) = labelled(larger, [example(larger, "Who?", "Mira")], [None], closing=0)
    assert int(labels.ids.max()) < 105
    torch.testing.assert_close(labels.log_probs.exp().sum(dim=1), torch.ones(len(labels)))


def test_kept_labels_come_back_and_damage_is_named(backbone: Backbone, tmp_path: Path) -> None:
    examples = [example(backbone, "Who?", "Mira"), example(backbone, "When?", "At 8:00")]
    labels = labelled(backbone, examples, [None, None], closing=2)
    made = [dataclasses.replace(one, soft_targets=(own,)) for one, own in zip(examples, labels, strict=True)]
    path = tmp_path / "teacher.safetensors"
    assert stored_labels(path, "digest", examples, 105) is None
    store_labels(path, made, "digest")
    back = stored_labels(path, "digest", examples, 105)
    assert back is not None
    for one, own in zip(back, labels, strict=True):
        assert torch.equal(one.soft_targets[0].ids, own.ids)
        assert torch.equal(one.soft_targets[0].log_probs, own.log_probs)
    with pytest.raises(CheckpointError, match="of other data"):
        stored_labels(path, "another", examples, 105)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        stored_labels(path, "digest", examples, 105)


def test_a_teacher_with_another_tokenizer_is_refused(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.add_tokens(["owl"])
    with pytest.raises(BackboneError, match="another tokenizer than 'tiny-llama': 1 of 106 tokens differ"):
        check_same_tokens(backbone, dataclasses.replace(backbone, tokenizer=tokenizer))


def test_a_teacher_of_another_kind_is_refused(backbone: Backbone, tiny_backbone: Callable[..., Any]) -> None:
    with pytest.raises(BackboneError, match="of kind 'encoder-decoder'"):
        check_same_tokens(backbone, tiny_backbone("bart"))
