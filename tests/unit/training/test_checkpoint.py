"""Resuming from a state wants the same configuration, and the state is read once."""

import pytest

import prefixtune as pt
from prefixtune.errors import ConfigError
from prefixtune.training.checkpoint import load_state, save_state


def test_another_length_or_rate_is_refused(train, tmp_path, examples, no_backbone_loads):
    train(3)
    for name, value in (("epochs", 50.0), ("max_steps", 6), ("learning_rate", 0.5), ("patience", 2)):
        with pytest.raises(ConfigError, match=name):
            pt.train(output=str(tmp_path / "run"), resume=True, examples=examples, **{name: value})


def test_a_state_that_names_an_unknown_option_is_refused(train, tmp_path):
    train(3)
    path = tmp_path / "run" / "state.safetensors"
    tensors, facts = load_state(path)
    facts["config"]["optimizer"] = "muon"
    save_state(path, tensors, facts)
    with pytest.raises(ConfigError, match="optimizer"):
        train(3, resume=True)
