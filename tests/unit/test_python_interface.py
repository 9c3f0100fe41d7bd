"""What the Python functions take in place of their own types, and what they say to what they cannot take.

The calls run in a process of their own, without the tests' checks of types, as a user's do: see `python_calls`.

Slow, once: that process imports everything anew.
"""

import json
import subprocess
from pathlib import Path

import pytest

from forked_command import forking_python

CALLS = Path(__file__).resolve().parents[1] / "python_calls.py"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    done = subprocess.run([forking_python(), CALLS, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ALIKE = (
    *("a prefix by text", "a prefix by Path", "a prefix by its run", "a pair", "a name", "a path", "a dict"),
    *("a config", "evaluate", "dicts", "load"),
)
"""Calls that say the same thing in other ways."""


@pytest.mark.parametrize("name", ALIKE)
def test_what_users_have_is_taken(calls, name):
    assert calls[name] == calls["generate"]


def test_a_text_format_may_be_a_dict(calls):
    assert calls["a text format"] == calls["a text format as a dict"]
    assert calls["a text format"] != calls["bare"], "the format must show"


def test_one_target_is_one(calls):
    assert calls["Example: one target"]["value"] == ["two words"]


def test_prefixes_of_several_kinds_and_none(calls):
    with_prefix, bare = calls["generate"]["value"], calls["bare"]["value"]
    assert with_prefix != bare, "the prefix must show"
    for name in ("several prefixes", "several prefixes, ready-made"):
        assert calls[name]["value"] == [with_prefix[0], bare[1]]
    assert calls["stream"]["value"] == with_prefix[0]
    assert calls["load_prefix"]["value"] == 3
    assert calls["classify"]["value"][0] in ("yes", "no")
    assert calls["engine"]["value"] == 2


TRAININGS = [f"train: {how}" for how in ("paths", "dicts", "a dict", "a config", "a name", "records", "silent")]
"""Runs that are the same, asked for in other ways."""


OBJECTS = ("train_together", "PrefixModel: a pair", "PrefixModel: a name")
"""Other functions, each with a 2 in what it gives."""


@pytest.mark.parametrize("name", TRAININGS)
def test_training_takes_what_users_have(calls, name):
    losses, has_prefix, _ = calls["train"]["value"]
    assert len(losses) == 2
    assert has_prefix
    assert calls[name]["value"][:2] == [losses, has_prefix]


def test_training_shows_its_progress_unless_it_is_switched_off(calls):
    shown = calls["train"]["value"][2]
    assert "4 targets of 2 sources" in shown
    assert "training: 2/2" in shown
    assert calls["train: silent"]["value"][2] == ""


def test_a_run_goes_on_with_its_own_configuration(calls):
    assert calls["train: go on"] == calls["train: go on, by Path"] == {"value": 2}
    assert calls["train: go on, moved"] == {"value": "moved"}


@pytest.mark.parametrize("name", OBJECTS)
def test_other_functions_take_what_users_have(calls, name):
    assert calls[name] == {"value": 2}


MESSAGES = {
    "train: again": ("ConfigError", ""),
    "train: no dev examples": ("DataError", ""),
    "PrefixModel: a mistyped option": ("ConfigError", "prefix_length"),
    "train: a number as config": ("ConfigError", ""),
    "train: nothing to resume": ("CheckpointError", ""),
    "train_together: of one": ("ConfigError", "2"),
    "a bare model": ("ConfigError", ""),
    "no backbone": ("ConfigError", ""),
    "a missing folder": ("BackboneError", "./no/such/model"),
    "a number as prefix": ("ConfigError", ""),
    "a missing prefix": ("CheckpointError", "missing.safetensors"),
    "a hub id, offline": ("ConfigError", "nobody/such-prefix"),
    "load: no template": ("RequestError", ""),
    "save_prefix: the wrong way round": ("ConfigError", ""),
    "one text": ("RequestError", ""),
    "a mistyped option": ("ConfigError", "num_beams"),
    "evaluate: a number": ("DataError", "3"),
    "Example: a number": ("DataError", ""),
    "Prefix: no tensors": ("ConfigError", ""),
    "train: no target": ("DataError", ""),
    "TorchEngine.add: a text": ("RequestError", ""),
    "classify: one text": ("RequestError", ""),
    "TorchEngine: a wrong option": ("ConfigError", "num_slots"),
    "Request: a text": ("RequestError", ""),
}
"""Calls that are wrong: the error's class, and what its text must name."""


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_wrong_gets_one_line(calls, name):
    kind, words = MESSAGES[name]
    assert calls[name].get("error") == kind, calls[name]
    assert words in calls[name]["text"]
    assert "\n" not in calls[name]["text"]


def test_every_call_is_checked(calls):
    shown = {"generate", "bare", "stream", "load_prefix", "load_backbone", "classify", "engine"}
    shown |= {"several prefixes", "several prefixes, ready-made", "train: go on", "train: go on, by Path"}
    shown |= {"train: go on, moved"}
    shown |= {"Example: one target", "a text format", "a text format as a dict", "train", *TRAININGS, *OBJECTS}
    assert calls.keys() == shown | set(ALIKE) | MESSAGES.keys()
