"""What the Python functions take in place of their own types, and what they say to what they cannot take.

The calls run in a process of their own, without the tests' checks of types, as a user's do: see `python_calls`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CALLS = Path(__file__).resolve().parents[1] / "python_calls.py"


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calls")
    done = subprocess.run([sys.executable, CALLS, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given: dict[str, Any] = json.loads(done.stdout)
    return given


SAME = {
    "generate": (
        *("a prefix by text", "a prefix by Path", "a prefix by its run", "a pair", "a name", "a path", "a dict"),
        *("a config", "evaluate", "dicts", "load"),
    ),
    "engine": ("train_together", "PrefixModel: a pair", "PrefixModel: a name", "train: go on", "train: go on, by Path"),
}
"""Calls that say the same thing in other ways; and those that give a 2."""
TRAININGS = ("paths", "dicts", "a dict", "a config", "a name", "records", "silent")


def test_what_users_have_is_taken(calls: dict[str, Any]) -> None:
    for name, others in SAME.items():
        assert {other: calls[other] for other in others} == dict.fromkeys(others, calls[name])
    losses, has_prefix, shown = calls["train"]["value"]
    assert (len(losses), has_prefix) == (2, True)
    for name in TRAININGS:
        assert calls[f"train: {name}"]["value"][:2] == [losses, has_prefix]
    assert "training: 2/2" in shown
    assert calls["train: silent"]["value"][2] == ""


def test_a_text_format_may_be_a_dict(calls: dict[str, Any]) -> None:
    assert calls["a text format"] == calls["a text format as a dict"]
    assert calls["a text format"] != calls["bare"], "the format must show"


def test_one_target_is_one(calls: dict[str, Any]) -> None:
    assert calls["Example: one target"]["value"] == ["two words"]


def test_prefixes_of_several_kinds_and_none(calls: dict[str, Any]) -> None:
    with_prefix, bare = calls["generate"]["value"], calls["bare"]["value"]
    assert with_prefix != bare, "the prefix must show"
    for name in ("several prefixes", "several prefixes, ready-made"):
        assert calls[name]["value"] == [with_prefix[0], bare[1]]
    assert calls["stream"]["value"] == with_prefix[0]
    assert calls["load_prefix"]["value"] == 3
    assert calls["classify"]["value"][0] in ("yes", "no")
    assert calls["engine"]["value"] == 2


MESSAGES = {
    "train: again": ("ConfigError", ""),
    "PrefixModel: a mistyped option": ("ConfigError", "prefix_length"),
    "train: a number as examples": ("DataError", ""),
    "train: nothing to resume": ("CheckpointError", ""),
    "a bare model": ("ConfigError", ""),
    "a missing folder": ("BackboneError", "./no/such/model"),
    "a missing prefix": ("CheckpointError", "missing.safetensors"),
    "a hub id, offline": ("ConfigError", "nobody/such-prefix"),
    "one text": ("RequestError", ""),
    "a mistyped option": ("ConfigError", "num_beams"),
    "evaluate: a number": ("DataError", "3"),
    "Example: a number": ("DataError", ""),
    "Engine.add: a text": ("RequestError", ""),
}
"""Calls that are wrong: the error's class, and what its text must name."""


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_wrong_gets_one_line(calls: dict[str, Any], name: str) -> None:
    kind, words = MESSAGES[name]
    assert calls[name].get("error") == kind, calls[name]
    assert words in calls[name]["text"]
    assert "\n" not in calls[name]["text"]
