"""What a distillation reads, and what it refuses before a model loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import read_jobs
from prefixtune.errors import ConfigError, DataError


@pytest.fixture
def of_prompt(tmp_path: Path) -> dict[str, Any]:
    """Of a run on a prompt, without its inputs."""
    (tmp_path / "prompt.txt").write_text("Answer in small letters.")
    return {"prompt": str(tmp_path / "prompt.txt"), "output": str(tmp_path / "run")}


@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "completion"), ("source", "target")])
def test_of_a_folder_the_training_set_is_learned_and_the_test_set_held_out(
    of_prompt: dict[str, Any], write_rows: Callable[..., str], tmp_path: Path, names: tuple[str, str]
) -> None:
    for split in ("train", "test"):
        write_rows(f"data/{split}.jsonl", [dict(zip(names, (f"a {split}?", "b"), strict=True))])
    config = DistillConfig(data=str(tmp_path / "data"), test=str(tmp_path / "data"), **of_prompt)
    (job,) = read_jobs(config, resume=False)
    assert [question.question for question in job.questions] == ["a train?"]
    assert [question.question for question in job.test] == ["a test?"]


def test_a_folder_without_a_test_set_holds_nothing_out(
    of_prompt: dict[str, Any], write_rows: Callable[..., str], tmp_path: Path
) -> None:
    write_rows("data/train.jsonl", [{"question": "a?"}])
    config = DistillConfig(data=str(tmp_path / "data"), test=str(tmp_path / "data"), **of_prompt)
    with pytest.raises(DataError, match="no test set"):
        read_jobs(config, resume=False)


@pytest.mark.parametrize("name", ["chat_template", "system"])
def test_options_of_chats_are_refused(of_prompt: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        DistillConfig(data="inputs.jsonl", **of_prompt, **{name: "model"})


@pytest.mark.parametrize(
    ("options", "name"),
    [({"test": "self"}, "test"), ({"kinds": ("paraphrase", "list")}, "kinds")],
)
def test_what_a_document_does_not_use_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        DistillConfig(document="doc.txt", questions="self", **options)


def test_a_start_from_examples_is_no_choice_and_a_prefix_is_one(of_prompt: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        DistillConfig(data="inputs.jsonl", **of_prompt, initialization="examples")
    assert "initialization is 'examples'" in caught.value.message
    assert "prefix_length" not in caught.value.message
    started = DistillConfig(data="inputs.jsonl", **of_prompt, init_prefix="p")
    assert (started.initialization, started.prefix_length) == ("prefix", 0)
    assert DistillConfig(data="inputs.jsonl", **of_prompt, init_prefix="p", prefix_length=5).prefix_length == 5
    with pytest.raises(ConfigError, match="a memory is to be shorter than its text"):
        DistillConfig(data="inputs.jsonl", **of_prompt, prefix_length=0)
