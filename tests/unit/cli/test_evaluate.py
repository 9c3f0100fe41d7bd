"""`prefixtune evaluate`: how data is read with a trained prefix, what is said of wrong data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import call, run
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.prefix import Prefix, save_prefix


def save(path: Path, **header: Any) -> str:
    pair = torch.zeros(2, 4, 8), torch.ones(2, 4, 8)
    facts = {"backbone": {"name": "model", "kind": "decoder", "fingerprint": "a:b"}, "task": "records", **header}
    return str(save_prefix(path, Prefix({"decoder": (pair,)}, facts)))


def test_a_form_is_read_with_a_prefix_that_was_trained_by_templates(tmp_path: Path) -> None:
    prefix = save(tmp_path / "p.safetensors", text_format={"source": "{name} is {food}", "target_template": "text"})
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"question": "Who?", "answer": "Ann."}) + "\n")
    words = ("evaluate", "--prefix", prefix, "--data", str(data), "--print-config")
    with pytest.raises(DataError, match="'name'"):
        call(*words)
    out, err = run(*words, "--form", "question")
    assert "max_new_tokens" in out
    assert "questions and answers" in err


@pytest.mark.parametrize("option", [("--metrics", "bleu"), ("--instruction", "Go on.")])
def test_texts_alone_are_not_generated(option: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one two"}\n')
    with pytest.raises(ConfigError, match=option[0]):
        call("evaluate", "--data", str(tmp_path / "texts.jsonl"), *option)
