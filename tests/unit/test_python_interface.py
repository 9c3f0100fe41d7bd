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


ALIKE = (
    *("a prefix by text", "a prefix by Path", "a prefix by its run", "a pair", "a name", "a path", "a dict"),
    *("a config", "evaluate", "dicts", "load"),
)
"""Calls that say the same thing in other ways."""


@pytest.mark.parametrize("name", ALIKE)
def test_what_users_have_is_taken(calls: dict[str, Any], name: str) -> None:
    assert calls[name] == calls["generate"]


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


TRAININGS = (
    "train: paths",
    "train: dicts",
    "train: a dict",
    "train: a config",
    "train: a name",
    "train: records",
    "train: silent",
)
"""Runs that are the same, asked for in other ways."""


OBJECTS = ("train_together", "PrefixModel: a pair", "PrefixModel: a name")
"""Other functions, each with a 2 in what it gives."""


@pytest.mark.parametrize("name", TRAININGS)
def test_training_takes_what_users_have(calls: dict[str, Any], name: str) -> None:
    losses, has_prefix, _ = calls["train"]["value"]
    assert len(losses) == 2
    assert has_prefix
    assert calls[name]["value"][:2] == [losses, has_prefix]


def test_training_shows_its_progress_unless_it_is_switched_off(calls: dict[str, Any]) -> None:
    shown = calls["train"]["value"][2]
    assert "4 targets of 2 sources" in shown
    assert "training: 2/2" in shown
    assert calls["train: silent"]["value"][2] == ""


def test_a_run_goes_on_with_its_own_configuration(calls: dict[str, Any]) -> None:
    assert calls["train: go on"] == calls["train: go on, by Path"] == {"value": 3}


@pytest.mark.parametrize("name", OBJECTS)
def test_other_functions_take_what_users_have(calls: dict[str, Any], name: str) -> None:
    assert calls[name] == {"value": 2}


MESSAGES = {
    "train: again": ("ConfigError", "already holds a run"),
    "train: no dev examples": ("DataError", "the development data has no example"),
    "PrefixModel: a mistyped option": ("ConfigError", "did you mean 'prefix_length'?"),
    "push_to_hub: no name": ("ConfigError", "None"),
    "train: a model": ("ConfigError", "(model, tokenizer)"),
    "train: a number as config": ("ConfigError", "TrainConfig, or a dict"),
    "train: a number as examples": ("DataError", "3 (of type int)"),
    "train: a dict without source": ("DataError", "has the columns words"),
    "train: nothing to resume": ("CheckpointError", "no run to resume"),
    "a bare model": ("ConfigError", "(model, tokenizer)"),
    "a pair the wrong way round": ("ConfigError", "in this order"),
    "no backbone": ("ConfigError", "the backbone is None"),
    "a number as backbone": ("ConfigError", "3 (of type int)"),
    "a missing folder": ("BackboneError", "./no/such/model"),
    "load_backbone: a model": ("ConfigError", "(model, tokenizer)"),
    "load_backbone: a pair and options": ("ConfigError", "options were given too"),
    "load_backbone: a wrong dtype": ("ConfigError", "dtype is 3"),
    "load_backbone: a wrong device": ("ConfigError", "device None"),
    "a number as prefix": ("ConfigError", "3 (of type int)"),
    "a number among prefixes": ("ConfigError", "3 (of type int)"),
    "a dict as prefix": ("ConfigError", "of type dict"),
    "a missing prefix": ("CheckpointError", "missing.safetensors"),
    "a hub id, offline": ("ConfigError", "nobody/such-prefix"),
    "a hub id without hub:": ("CheckpointError", "hub:nobody/such-prefix is downloaded from the hub"),
    "load: a number": ("ConfigError", "3 (of type int)"),
    "load: a number as prefix": ("ConfigError", "3 (of type int)"),
    "load: a mistyped option": ("ConfigError", "did you mean 'num_beams'?"),
    "load: texts and messages": ("RequestError", "no chat template"),
    "load: a number as texts": ("RequestError", "3 (of type int)"),
    "load: no template": ("RequestError", "no chat template"),
    "load: a number as messages": ("RequestError", "3 (of type int)"),
    "load: numbers as messages": ("RequestError", "not a list of dicts"),
    "load: a number as content": ("RequestError", "conversation 1"),
    "load_prefix: a number": ("ConfigError", "3 (of type int)"),
    "load_prefix: a wrong backbone": ("ConfigError", "the backbone is 3"),
    "save_prefix: the wrong way round": ("ConfigError", "save_prefix(path, prefix)"),
    "save_prefix: a wrong dtype": ("ConfigError", "did you mean 'float32'?"),
    "one text": ("RequestError", "write [text]"),
    "a number as texts": ("RequestError", "3 (of type int)"),
    "a dict among texts": ("RequestError", "text 2 is of type dict"),
    "do_sample": ("ConfigError", "set temperature above 0"),
    "GenerateConfig: do_sample": ("ConfigError", "set temperature above 0"),
    "num_return_sequences": ("ConfigError", "[text] * 3"),
    "max_length": ("ConfigError", "max_new_tokens"),
    "a mistyped option": ("ConfigError", "did you mean 'num_beams'?"),
    "a text as a number": ("ConfigError", "max_new_tokens is '4'"),
    "a number as config": ("ConfigError", "GenerateConfig, or a dict"),
    "a number as stop": ("ConfigError", "stop is 3"),
    "stream: several": ("RequestError", "of type list"),
    "evaluate: no list": ("DataError", "3 (of type int)"),
    "evaluate: a number": ("DataError", "example 1 is 3"),
    "evaluate: another key": ("DataError", "has the columns words"),
    "evaluate: a wrong option": ("ConfigError", "set temperature above 0"),
    "evaluate: a number as metrics": ("ConfigError", "metrics is 3"),
    "evaluate: another kind": ("ConfigError", "one of generation"),
    "a number as text format": ("ConfigError", "TextFormat or a dict"),
    "a mistyped text format": ("ConfigError", "did you mean 'prompt'?"),
    "Example: a number": ("DataError", "3 (of type int)"),
    "Example: a number as target": ("DataError", "not texts"),
    "Prefix: no dict": ("ConfigError", "not a prefix"),
    "Prefix: no tensors": ("ConfigError", "(key, value) pairs"),
    "train: no target": ("DataError", "none has a target"),
    "Engine.add: a text": ("RequestError", "not a Request"),
    "classify: one text": ("RequestError", "write [text]"),
    "classify: labels": ("ConfigError", "list of strings"),
    "classify: a number as prefix": ("ConfigError", "3 (of type int)"),
    "tag: one text": ("RequestError", "text.split()"),
    "tag: a number as prefix": ("ConfigError", "3 (of type int)"),
    "Engine: a number": ("ConfigError", "3 (of type int)"),
    "Engine: a wrong option": ("ConfigError", "did you mean 'num_slots'?"),
    "Engine: a text as a number": ("ConfigError", "num_slots is '3'"),
    "Request: a text": ("RequestError", "backbone.encode"),
    "Request: a number as prefix": ("RequestError", "3 (of type int)"),
    "Request: a number as sampling": ("RequestError", "SamplingParams or a dict"),
    "Sampling: a text as a number": ("RequestError", "max_new_tokens is '3'"),
    "TrainConfig: lr": ("ConfigError", "learning_rate"),
    "TrainConfig: a backbone": ("ConfigError", "of type Backbone"),
    "ServeConfig: a text as a number": ("ConfigError", "port is '80'"),
    "ServeConfig: a mistyped option": ("ConfigError", "did you mean 'port'?"),
}
"""Calls that are wrong: the error's class, and what its text must name."""


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_wrong_gets_one_line(calls: dict[str, Any], name: str) -> None:
    kind, words = MESSAGES[name]
    assert calls[name].get("error") == kind, calls[name]
    assert words in calls[name]["text"]
    assert "\n" not in calls[name]["text"]
    assert "Hint: " in calls[name]["text"]


def test_every_call_is_checked(calls: dict[str, Any]) -> None:
    shown = {"generate", "bare", "stream", "load_prefix", "load_backbone", "classify", "engine"}
    shown |= {"several prefixes", "several prefixes, ready-made"}
    shown |= {"Example: one target", "a text format", "a text format as a dict", "train", *TRAININGS, *OBJECTS}
    shown |= {"train: go on", "train: go on, by Path"}
    assert calls.keys() == shown | set(ALIKE) | MESSAGES.keys()
