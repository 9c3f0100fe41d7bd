"""What a run's folder keeps: it comes back as it was, and damage is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
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
from prefixtune.distillation.stored import (
    check_sources,
    read_prepared,
    read_seconds,
    write_prepared,
    write_seconds,
    write_sources,
)
from prefixtune.distillation.teacher import Teacher, label_examples, stored_labels
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.prefix.tensor_file import metadata_with_checksum, save_file


def job(folder: Path, text: str = "The Owl.", questions: tuple[Question, ...] = ()) -> Job:
    return Job("", folder, "doc.txt", text, questions, ())


def test_questions_come_back_whatever_ends_a_line(tmp_path: Path) -> None:
    questions = [Question(f"Where{mark} is\n it?", f"a{mark}", 1, "fact", "It is.", False) for mark in "\u2028\x85\x0c"]
    write_prepared(job(tmp_path), questions, questions[:1])
    assert read_prepared(job(tmp_path), 2) == (questions, questions[:1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"question": 5},
        {"answer": None},
        {"answer": ""},
        {"chunk": 2},
        {"chunk": -1},
        {"chunk": True},
        {"kind": []},
        {"held_out": "no"},
        {"held_out": 2},
        {"held_out": 1},
        {"ended": 1},
        {"more": 1},
    ],
)
def test_damaged_questions_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    row = {"question": "Where?", "answer": "a", "chunk": 0, "kind": "given", "held_out": False, **wrong}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError, match="does not hold the questions of a run"):
        read_prepared(job(tmp_path), 2)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("document", {"text": "The Fox."}),
        ("questions", {"questions": (Question("Where?", "b"),)}),
        ("teacher", {"teacher": "other"}),
    ],
)
def test_another_source_is_refused_by_name(
    tmp_path: Path, backbone: Backbone, name: str, changed: dict[str, Any]
) -> None:
    asked = (Question("Where?", "a"),)
    config = DistillConfig(document="doc.txt", questions="q.jsonl", teacher="one")
    write_sources(config, job(tmp_path, questions=asked), backbone)
    check_sources(config, job(tmp_path, questions=asked), backbone)
    other = config.replace(teacher=changed.pop("teacher")) if "teacher" in changed else config
    with pytest.raises(CheckpointError, match=f"begun with another {name}"):
        check_sources(other, job(tmp_path, **{"questions": asked, **changed}), backbone)


@pytest.mark.parametrize("name", ["prefix.safetensors", "model.gguf"])
def test_a_teacher_with_other_weights_is_another(tmp_path: Path, backbone: Backbone, name: str) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / name).write_bytes(b"one")
    config = DistillConfig(teacher=str(teacher), data="d.jsonl")
    write_sources(config, job(tmp_path, ""), backbone)
    (teacher / name).write_bytes(b"two")
    with pytest.raises(CheckpointError, match="another teacher"):
        check_sources(config, job(tmp_path, ""), backbone)


@pytest.mark.parametrize("teacher", ["", "prefix.safetensors", "adapter", "model"])
def test_a_backbone_that_teaches_is_known_again(
    tmp_path: Path, backbone: Backbone, tiny_backbone: Callable[..., Any], teacher: str
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    config = DistillConfig(prompt="p.txt", data="d.jsonl", teacher=str(tmp_path / teacher) if teacher else "")
    write_sources(config, job(tmp_path), backbone)
    other = tiny_backbone("llama", max_position_embeddings=512, seed=1)
    if teacher == "model":
        check_sources(config, job(tmp_path), other)
    else:
        with pytest.raises(CheckpointError, match="begun with another backbone"):
            check_sources(config, job(tmp_path), other)
    rounded = Backbone.from_model(copy.deepcopy(backbone.model).bfloat16(), backbone.tokenizer, backbone.name)
    with pytest.raises(CheckpointError, match="begun with another dtype"):
        check_sources(config, job(tmp_path), rounded)


def test_given_answers_need_no_teacher(tmp_path: Path, tiny_backbone: Callable[..., Any]) -> None:
    asked = (Question("Where?", "a"),)
    config = DistillConfig(document="doc.txt", questions="q.jsonl")
    write_sources(config, job(tmp_path, questions=asked), tiny_backbone("llama"))
    check_sources(config, job(tmp_path, questions=asked), tiny_backbone("llama", seed=1))


@pytest.mark.parametrize("content", ["[]", "no json", '{"training": "x"}', '{"training": NaN}', '{"training": -1}'])
def test_times_that_are_damaged_are_not_known(tmp_path: Path, content: str) -> None:
    write_seconds(job(tmp_path), {"labels": 1.5})
    assert read_seconds(job(tmp_path)) == {"labels": 1.5}
    (tmp_path / "seconds.json").write_text(content)
    assert read_seconds(job(tmp_path)) == {}


LOG_PROBS = torch.log_softmax(torch.arange(42.0).view(2, 21) / 9, dim=-1)
IDS = torch.arange(40, dtype=torch.int32).view(2, 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_probs": None},
        {"log_probs": LOG_PROBS[:1]},
        {"log_probs": LOG_PROBS * torch.nan},
        {"log_probs": LOG_PROBS + 5},
        {"log_probs": LOG_PROBS.int()},
        {"ids": IDS.float()},
        {"ids": IDS + 100},
        {"ids": IDS - 1},
        {"ids": IDS[:, :3].contiguous()},
        {"ids": IDS[:, 0].contiguous()},
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
