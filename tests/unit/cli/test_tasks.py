"""`prefixtune data --tasks` as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from command_line import call
from prefixtune.data import TASKS
from prefixtune.inference.config import GenerateConfig
from prefixtune.training.presets import preset


def test_json_holds_what_a_program_needs(capsys: pytest.CaptureFixture[str]):
    assert call("data", "--tasks", "--json") == 0
    tasks: dict[str, Any] = {task["name"]: task for task in json.loads(capsys.readouterr().out)["tasks"]}
    assert list(tasks) == list(TASKS)
    assert tasks["webnlg"]["formats"] == [".xml", ".jsonl"]
    assert tasks["webnlg"]["metrics"] == ["bleu", "meteor", "ter"]
    assert tasks["dart"]["presets"]["paper"]["prefix"] == preset("paper", "dart")
    assert (tasks["toy"]["parts"], tasks["toy"]["formats"]) == (["train", "held_out"], [])
    for task in tasks.values():
        GenerateConfig(**task["decoding"])
