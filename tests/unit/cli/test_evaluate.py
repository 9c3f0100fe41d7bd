"""`prefixtune evaluate`: how data is read with a trained prefix, what is said of wrong data, and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import call, run
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix


def save(path: Path, **header: Any) -> str:
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    facts = {"backbone": {"name": "model", "kind": "decoder", "fingerprint": "a:b"}, "task": "records", **header}
    return str(save_prefix(path, Prefix({"decoder": (pair,)}, facts)))


def test_a_form_is_read_with_a_prefix_that_was_trained_by_templates(tmp_path: Path) -> None:
    prefix = save(tmp_path / "p.safetensors", text_format={"source": "{name} is {food}", "target_template": "text"})
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"question": "Who?", "answer": "Ann."}) + "\n")
    words = ("evaluate", "--prefix", prefix, "--data", str(data), "--print-config")
    with pytest.raises(DataError, match="no column 'name'"):
        call(*words)
    out, err = run(*words, "--form", "question")
    assert "max_new_tokens" in out
    assert "read as questions and answers: 1 question, 1 answer" in err


def test_a_target_alone_says_the_way_out_where_the_training_recognized_the_form(tmp_path: Path) -> None:
    prefix = save(tmp_path / "p.safetensors", text_format={}, form="question")
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"question": "Who?", "answer": "Ann."}) + "\n")
    words = ("evaluate", "--prefix", prefix, "--data", str(data), "--print-config")
    with pytest.raises(ConfigError, match="target is 'answer', but there is no source") as caught:
        call(*words, "--target", "answer")
    assert "give source too" in caught.value.hint
    assert "or leave target out" in caught.value.hint
    assert call(*words) == 0


@pytest.mark.parametrize(
    ("options", "text", "hint"),
    [
        (("--task", "e2e"), '{"mr": "name[A]"}', "name the file with references, such as testset_w_refs.csv."),
        (
            ("--task", "dart"),
            '{"triples": [["a", "b", "c"]]}',
            "name the file with references.",
        ),
        (("--source", "a"), '{"a": "b"}', "name the target column (--target), or a file with references."),
    ],
)
def test_data_without_references_says_what_its_task_allows(
    tmp_path: Path, options: tuple[str, ...], text: str, hint: str
) -> None:
    data, outputs = tmp_path / "test.jsonl", tmp_path / "outputs.txt"
    data.write_text(text + "\n")
    outputs.write_text("A.\n")
    for words in (("evaluate", "--data", data), ("score", "--references", data, "--hypotheses", outputs)):
        with pytest.raises(DataError, match="example 1 ") as caught:
            call(*words, *options)
        assert caught.value.hint == hint


def test_groups_have_as_many_digits_as_the_whole(
    tmp_path: Path, tiny_models: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    tiny_models("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "test.csv"
    data.write_text("mr,ref\nname[A],A is a pub.\n")
    words = ("--task", "e2e", "--data", str(data), "--backbone", str(tmp_path / "model"), "--metrics", "ter")
    out, _ = run("evaluate", *words, "--num-beams", "1", "--min-new-tokens", "1", "--max-new-tokens", "1")
    whole = next(line.split()[1] for line in out.splitlines() if line.startswith("ter"))
    group = out.split("by attributes")[1].split()
    assert len(whole.partition(".")[2]) == 4
    assert group[-1] == whole
