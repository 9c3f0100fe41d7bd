"""A curve over lengths: its losses, what is chosen, and going on where it was stopped."""

import json

import numpy as np
import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import ConfigError
from prefixtune.evaluation import length as module
from prefixtune.evaluation.length import choose, curve_lengths, find_length, measure_lengths
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.data import tokenize
from prefixtune.training.score import evaluation_loss, score_targets

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.", f"it is {letter}")) for letter in "abcdef"]
DEV = [pt.Example("n : x", ("xx it is.", "it is x")), pt.Example("n : y", ("yy it is.",)), pt.Example("n : z", ("z",))]


def config(tmp_path, **more):
    values = {"prefix_length": 6, "init_text": "abc", "max_steps": 4, "save_every": 2, "batch_size": 4}
    return pt.TrainConfig(**{**values, "output": str(tmp_path / "run"), **more})


def study(llama, tmp_path, **arguments):
    given = {"backbone": llama, "examples": EXAMPLES, "dev_examples": DEV, "progress": False}
    return find_length(config(tmp_path), **{**given, **arguments})


def test_the_artifact_is_cut_to_a_length_of_the_curve(llama, tmp_path):
    seen = []
    result = study(llama, tmp_path, on_length=seen.append)
    whole, short = load_prefix(tmp_path / "run"), load_prefix(result.path)
    assert whole.header["training"]["nested"] is True
    assert short.equal(Prefix(whole[: result.chosen].layers))
    assert short.prefix_length == result.chosen < whole.prefix_length
    measured = {point.prefix_length: point.loss for point in result.lengths}
    assert short.header["training"]["dev_loss"] == measured[result.chosen]
    assert short.header["composition"]["parts"][0]["dev_loss"] == whole.header["training"]["dev_loss"]
    assert [point.prefix_length for point in result.lengths] == [1, 2, 3, 4, 6]
    data = tokenize(config(tmp_path), llama, EXAMPLES, DEV)
    for point in result.lengths:
        loss = evaluation_loss(llama, whole[: point.prefix_length], data.dev.examples)
        assert point.loss == pytest.approx(loss, rel=1e-6)
        assert point.interval[0] <= point.loss <= point.interval[1]
        assert point.num_bytes == whole.num_bytes * point.prefix_length // 6
    stored = json.loads((tmp_path / "run" / "length.json").read_text())
    assert (stored["chosen"], stored["best"], stored["file"]) == (result.chosen, result.best, result.path.name)
    assert [each["loss"] for each in stored["lengths"]] == [point.loss for point in result.lengths]
    assert seen == [1, 2, 3, 4, 6]


def test_a_stopped_curve_goes_on(llama, tmp_path, monkeypatch):
    whole = study(llama, tmp_path / "whole", lengths=(2, 4))
    measured = []
    original = score_targets

    def counted(backbone, prefix, *arguments):
        measured.append(prefix.prefix_length)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(backbone, prefix, *arguments)

    monkeypatch.setattr(module, "score_targets", counted)
    with pytest.raises(KeyboardInterrupt):
        study(llama, tmp_path, lengths=(2, 4))
    assert not (tmp_path / "run" / "length.json").exists()
    result = study(llama, tmp_path, lengths=(2, 4), resume=True)
    assert result.lengths == whole.lengths


def points(losses, noise, count=200):
    """Sources whose difficulty varies far more than the lengths differ; only pairs show the difference."""
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 1, count)
    by_source = {
        length: np.stack([10 * (hard + loss + rng.normal(0, noise, count)), np.full(count, 10.0)], axis=1)
        for length, loss in losses.items()
    }
    layer = (torch.zeros(1, 64, 2), torch.zeros(1, 64, 2))
    return measure_lengths(by_source, Prefix({"decoder": (layer,)}))


def test_the_shortest_that_is_not_significantly_worse_is_chosen():
    curve = points({1: 0.5, 4: 0.1, 16: 0.0, 64: 0.0}, noise=0.05)
    best, chosen = choose(curve)
    assert best.prefix_length in (16, 64)
    assert chosen.prefix_length == 16
    by_length = {point.prefix_length: point for point in curve}
    # Unpaired, 4 could not be told from 16: its interval is wider than the difference.
    low, high = by_length[4].interval
    assert high - low > 0.2
    assert by_length[4].difference == pytest.approx(0.1, abs=0.02)
    low, high = by_length[4].difference_interval
    assert 0.05 < low < 0.1 < high < 0.15
    assert by_length[4].p_value < 0.01
    assert choose(points({1: 0.5, 4: 0.1, 16: 0.0, 64: 0.0}, noise=2.0, count=8))[1].prefix_length < 16


def test_usual_lengths_and_wrong_ones():
    assert curve_lengths(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert curve_lengths(10) == [1, 2, 3, 4, 6, 8, 10]
    assert curve_lengths(1) == [1]
    assert curve_lengths(50, [5, 20]) == [5, 20, 50]
    with pytest.raises(ConfigError):
        curve_lengths(50, [51])


def test_what_cannot_be_compared_is_refused(llama, tmp_path):
    with pytest.raises(ConfigError):
        study(llama, tmp_path, dev_examples=None)
    with pytest.raises(ConfigError):
        find_length(config(tmp_path).replace(nested=False, method="lora"), dev_examples=DEV)


def test_lengths_are_checked_before_training(llama, tmp_path):
    def never(event):
        raise AssertionError(f"an event before the lengths were checked: {event}")

    text = config(tmp_path, prefix_length=0, initialization="text")
    data = {"backbone": llama, "examples": EXAMPLES, "dev_examples": DEV, "progress": False, "on_event": never}
    with pytest.raises(ConfigError):
        find_length(text, lengths=(2, 50), **data)
    with pytest.raises(ConfigError):
        study(llama, tmp_path, lengths=(1,) * 70, on_event=never)
    assert not list(tmp_path.rglob("*.safetensors"))
