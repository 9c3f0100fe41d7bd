"""`prefixtune data` on the command line."""

import json

import pytest

import command_line
from prefixtune.data import TASKS
from prefixtune.inference.config import GenerateConfig
from prefixtune.training.presets import preset


@pytest.fixture
def words(tmp_path, tiny_models, tiny_tokenizer):
    """A command on a small file, with a backbone that has no weights."""
    tiny_models("llama").config.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Say {n}", "completion": "n" * n} for n in range(1, 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["data", str(tmp_path / "rows.jsonl"), "--backbone", str(tmp_path / "model")]


def test_for_people_and_for_programs(words, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    shown, _ = command_line.run(*words)
    assert "read as prompts and completions: examples 29, targets 29" in shown
    assert "[[ n </s>]]" in shown
    figures = json.loads(command_line.run(*words, "--json", "--max-length", "20")[0])
    assert figures["positions"] == 20
    assert figures["cut"] + figures["refused"] > 0
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_characters_that_steer_a_terminal_are_not_shown(words, tmp_path):
    row = {"prompt": "a\x1b[2J", "completion": "b\u202ec"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    shown = command_line.run(*words)[0]
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    rows = [{"text": f"t{n}", "label": label, "\x1b[2J": 1} for n, label in enumerate(("good", "b\x1b[31mad"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = command_line.run(*words)[0]
    assert "not used: \ufffd[2J" in shown
    assert "b\ufffd[31mad 1" in shown
    assert "\x1b" not in shown


def test_the_list_of_tasks_holds_what_a_program_needs():
    listed = json.loads(command_line.run("data", "--tasks", "--json")[0])["tasks"]
    tasks = {task["name"]: task for task in listed}
    assert list(tasks) == list(TASKS)
    assert tasks["webnlg"]["formats"] == [".xml", ".jsonl"]
    assert tasks["dart"]["presets"]["paper"]["prefix"] == preset("paper", "dart")
    assert (tasks["toy"]["parts"], tasks["toy"]["formats"]) == (["train", "held_out"], [])
    for task in tasks.values():
        GenerateConfig(**task["decoding"])
    command_line.run("data", "some.jsonl", "--tasks", code=2)
