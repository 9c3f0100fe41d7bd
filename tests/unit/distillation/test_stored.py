"""What a run's folder keeps: it comes back as it was, and damage is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.soft_labels import SoftLabels
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.stored import Prepared, read_prepared, source_digest, write_prepared
from prefixtune.distillation.teacher import Teacher, label_examples, stored_labels
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.prefix.file import metadata_with_checksum, save_file


def test_work_comes_back_whatever_ends_a_line(tmp_path: Path) -> None:
    questions = [Question(f"Where{mark} is\n it?", f"a{mark}", 1, "fact", "It is.", False) for mark in "\u2028\x85\x0c"]
    assert read_prepared(tmp_path, "digest") is None
    write_prepared(tmp_path, "digest", Prepared(questions, questions[:1], {"loss": 0.5}))
    assert read_prepared(tmp_path, "digest") == Prepared(questions, questions[:1], {"loss": 0.5})
    with pytest.raises(CheckpointError, match="begun with another"):
        read_prepared(tmp_path, "other")


@pytest.mark.parametrize("damaged", ['{"question": "Where?"}\n', "no json\n", "[]\n", ""])
def test_damaged_questions_are_named(tmp_path: Path, damaged: str) -> None:
    write_prepared(tmp_path, "digest", Prepared([Question("Where?", "a")], []))
    (tmp_path / "questions.jsonl").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"questions\.jsonl"):
        read_prepared(tmp_path, "digest")


def test_the_digest_tells_texts_questions_teachers_and_backbones_apart(
    backbone: Backbone, tiny_backbone: Callable[..., Any], tmp_path: Path
) -> None:
    config = DistillConfig(document="doc.txt", questions="q.jsonl", teacher="one")
    trained, weights = config.replace(teacher=str(tmp_path)), tmp_path / "weights.safetensors"
    job = Job("", Path("run"), "doc.txt", "The Owl.", (Question("Where?"),), ())
    rounded = Backbone.from_model(copy.deepcopy(backbone.model).bfloat16(), backbone.tokenizer, backbone.name)
    digests = [
        source_digest(config, job, backbone),
        source_digest(config, replace(job, text="The Fox."), backbone),
        source_digest(config, replace(job, questions=(Question("Who?"),)), backbone),
        source_digest(config, replace(job, questions=(), test=job.questions), backbone),
        source_digest(config.replace(teacher="other"), job, backbone),
        source_digest(config.replace(answer_length=9), job, backbone),
        source_digest(config, job, tiny_backbone("llama", max_position_embeddings=512, seed=1)),
        source_digest(config, job, rounded),
        *(source_digest(trained, job, backbone) for some in (b"1", b"2") if weights.write_bytes(some)),
    ]
    assert len(set(digests)) == len(digests)
    assert source_digest(config.replace(max_steps=7), job, backbone) == digests[0]


LOG_PROBS = torch.log_softmax(torch.arange(42.0).view(2, 21) / 9, dim=-1)
IDS = torch.arange(40, dtype=torch.int32).view(2, 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_probs": None},
        {"log_probs": LOG_PROBS[:1]},
        {"log_probs": LOG_PROBS * torch.nan},
        {"log_probs": LOG_PROBS + 5},
        {"ids": IDS + 100},
        {"ids": IDS[:, :3].contiguous()},
    ],
)
def test_damaged_labels_are_named(tmp_path: Path, wrong: dict[str, torch.Tensor | None]) -> None:
    path = tmp_path / "teacher.safetensors"

    def store(**tensors: torch.Tensor | None) -> None:
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        header = {"format_version": 2, "data": "digest", "teacher": "t", "k": 20}
        save_file(kept, path, metadata_with_checksum("prefixtune_teacher", header, kept))

    example = TokenizedExample((1, 2), ((3, 4),))
    store(ids=IDS, log_probs=LOG_PROBS)
    assert stored_labels(path, "digest", [example], 105) is not None
    store(**{"ids": IDS, "log_probs": LOG_PROBS, **wrong})
    with pytest.raises(CheckpointError, match="holds no labels for a vocabulary of 105"):
        stored_labels(path, "digest", [example], 105)


def test_a_teacher_whose_numbers_are_not_finite_is_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Callable[..., Any]
) -> None:
    broken = tiny_backbone("llama", max_position_embeddings=512, num_hidden_layers=1)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BackboneError, match="not finite"):
        label_examples(
            Teacher(broken, "broken"),
            [TokenizedExample((1, 2), ((3, 4),))],
            [None],
            vocabulary=105,
            closing=[0],
            batch_size=1,
        )
    assert not SoftLabels.from_logits(torch.full((2, 60), torch.nan)).is_valid(60)
