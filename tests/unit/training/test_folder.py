"""The folder of a run: damaged logs, its lock, resuming with what it has stored; data that teaches nothing."""

import json
import tomllib

import pytest

import prefixtune as pt
from prefixtune.errors import CheckpointError, ConfigError, DataError, PrefixError
from prefixtune.prefix.prefix import save_prefix
from prefixtune.training.checkpoint import load_state, save_state
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
        if event["event"] not in ("start", "end"):
            return
        with pytest.raises(PrefixError) as caught:
            train()
        assert str(tmp_path / "run") in caught.value.message
        messages.append(caught.value.message)

    train(on_event=on_event)
    assert len(messages) == 2
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


def test_another_length_or_rate_is_refused(train, tmp_path, examples, no_backbone_loads):
    train(3)
    changed = {"prefix_length": 5, "seed": 3, "epochs": 50.0, "max_steps": 6, "learning_rate": 0.5, "patience": 2}
    for name, value in changed.items():
        with pytest.raises(ConfigError, match=name):
            pt.train(output=str(tmp_path / "run"), resume=True, examples=examples, **{name: value})
    with pytest.raises(ConfigError, match="already holds a run"):
        train(3)


def test_a_state_that_names_an_unknown_option_is_refused(train, tmp_path):
    train(3)
    path = tmp_path / "run" / "state.safetensors"
    tensors, facts = load_state(path)
    facts["config"]["optimizer"] = "muon"
    save_state(path, tensors, facts)
    with pytest.raises(ConfigError, match="optimizer"):
        train(3, resume=True)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("delete", {"initialization": "text", "prefix_length": 3, "compaction": "match"}),
        ("rewrite", {"initialization": "prefix", "prefix_length": 0}),
    ],
)
def test_the_files_of_the_start_are_not_read_again(
    train, train_until, backbone, random_prefix, tmp_path, options, change
):
    words, prefix = tmp_path / "words.txt", tmp_path / "start.safetensors"
    start = {"init_prefix": str(prefix)} if options["initialization"] == "prefix" else {"init_text": f"@{words}"}
    options = {**options, **start, "save_every": 1, "max_steps": 4}

    def write():
        words.write_text("hello there", encoding="utf-8")
        save_prefix(prefix, random_prefix(backbone, 2))

    write()
    whole = train(4, output=str(tmp_path / "whole"), **options)
    train_until(2, 4, output=str(tmp_path / "half"), **options)
    if change == "delete":
        words.unlink()
        prefix.unlink()
    else:
        words.write_text("quite another text, with more words", encoding="utf-8")
        save_prefix(prefix, random_prefix(backbone, 5))
    resumed = train(4, output=str(tmp_path / "half"), resume=True, **options)
    assert resumed.prefix.equal(whole.prefix)
    assert resumed.prefix.header["initialization"] == whole.prefix.header["initialization"]


def test_data_without_a_target_is_refused_before_the_backbone_loads(train, tmp_path, no_backbone_loads):
    bare = [pt.Example("a", ()), pt.Example("b", ())]
    with pytest.raises(DataError, match="2 examples"):
        train(examples=bare)
    with pytest.raises(DataError, match="development"):
        train(dev_examples=bare)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"classifier": "head"}, {"label_words": "a=b"}])
def test_options_of_classification_are_refused_where_texts_are_generated(options, train, no_backbone_loads):
    with pytest.raises(ConfigError, match="records"):
        train(**options)
