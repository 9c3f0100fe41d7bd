"""The folder of a run: damaged logs, and its lock."""

import json
import tomllib

import pytest

from prefixtune.errors import CheckpointError, ConfigError, PrefixError
from prefixtune.utils.files import claim_folder


def test_a_torn_last_line_is_left_out(train, train_until, tmp_path):
    log = tmp_path / "run" / "events.jsonl"
    train_until(2)
    log.write_bytes(log.read_bytes() + b'{"event": "st')
    result = train(resume=True)
    steps = [event["step"] for event in result.events if event["event"] == "step"]
    assert steps == [1, 2, 3]
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()].count("step") == 3


def test_a_damaged_log_is_named_with_a_hint(train, train_until, tmp_path):
    log = tmp_path / "run" / "events.jsonl"
    train_until(2)
    first, *rest = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([first, b"\x00\xff\xfe", *rest]))
    with pytest.raises(CheckpointError, match=r"line 2 of '.*events\.jsonl'"):
        train(resume=True)
    log.unlink()
    # As the hint says.
    assert [event["step"] for event in train(resume=True).events if event["event"] == "step"] == [3]


def test_a_run_locks_its_folder_to_its_end(train, tmp_path):
    messages = []

    def on_event(event):
        with pytest.raises(PrefixError, match="in use") as caught:
            train()
        messages.append(caught.value.message)

    train(on_event=on_event)
    assert len(messages) > 3
    with claim_folder(tmp_path / "run"):
        pass


def test_a_run_names_the_backbone_that_it_was_given(train, train_until, tiny_backbone, tmp_path):
    train_until(2)
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (stored["backbone"], stored["dtype"]) == ("tiny-llama", "float32")
    for other in (tiny_backbone("gpt2"), tiny_backbone("llama", seed=1)):
        with pytest.raises(ConfigError, match="another backbone"):
            train(resume=True, backbone=other)
    assert train(resume=True).steps == 3
