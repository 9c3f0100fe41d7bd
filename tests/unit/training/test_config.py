"""A run's configuration: all faults at once, the nearest known name, and TOML there and back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.errors import ConfigError
from prefixtune.prefix.encoder import REPARAMETERIZATIONS
from prefixtune.training.config import TrainConfig, default_learning_rate


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        TrainConfig(
            prefix_length=0,
            batch_size=-1,
            learning_rate=-1.0,
            epochs=0.0,
            task=3,
            reparameterization="mpl",
            init_text=" ",
            save_every=0,
        )
    for name in ("batch_size", "learning_rate", "epochs", "task", "'mpl'", "save_every"):
        assert name in error.value.message
    with pytest.raises(ConfigError) as error:
        TrainConfig(prefix_length=0, init_text=" ")
    for name in ("prefix_length", "init_text"):
        assert name in error.value.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "epochs", "max_grad_norm", "weight_decay"])
def test_numbers_must_be_finite(name: str, bad: float):
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: bad})


def test_an_initialization_needs_what_it_starts_from():
    with pytest.raises(ConfigError, match="init_text is empty"):
        TrainConfig(init_text="  ")
    with pytest.raises(ConfigError, match="init_prefix names no file"):
        TrainConfig(initialization="prefix")
    assert TrainConfig(initialization="random", init_text="").initialization == "random"


@pytest.mark.parametrize("values", [{"train_adapter": True}, {"adapter_rank": 4}, {"quantize": "int8"}])
def test_what_cannot_be_split_among_processes(values: dict[str, Any]):
    with pytest.raises(ConfigError, match="does not go with shard"):
        TrainConfig(shard=True, **values)


def test_a_prefix_to_start_from_is_started_from():
    config = TrainConfig(init_prefix="p.safetensors")
    assert (config.initialization, config.prefix_length) == ("prefix", 0)
    assert TrainConfig(init_prefix="p.safetensors", prefix_length=5).prefix_length == 5
    assert TrainConfig(**tomllib.loads(config.to_toml())) == config
    for other in ("words", "random", "examples"):
        with pytest.raises(ConfigError, match=f"initialization is '{other}'"):
            TrainConfig(init_prefix="p.safetensors", initialization=other)
    with pytest.raises(ConfigError, match="init_examples"):
        TrainConfig(init_prefix="p.safetensors", init_examples=4)


def test_unknown_keys_are_reported_with_the_nearest_known_one(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        TrainConfig(prefix_lenght=5, sed=1)
    for name in ("prefix_lenght", "'prefix_length'", "sed", "'seed'"):
        assert name in error.value.message
    path = tmp_path / "run.toml"
    path.write_text("batchsize = 3\n")
    with pytest.raises(ConfigError, match=r"run\.toml.*'batchsize'"):
        TrainConfig.from_file(path)
    with pytest.raises(ConfigError, match="'patience'"):
        TrainConfig().replace(patiense=1)


def test_integers_are_accepted_as_floats():
    config = TrainConfig(epochs=3, learning_rate=1)
    assert isinstance(config.epochs, float)
    assert isinstance(config.learning_rate, float)
    with pytest.raises(ConfigError, match="batch_size"):
        TrainConfig(batch_size=2.5)


@pytest.mark.parametrize("kind", REPARAMETERIZATIONS)
def test_the_effective_learning_rate(kind: Any):
    assert TrainConfig(reparameterization=kind).peak_learning_rate == default_learning_rate(kind) > 0
    assert TrainConfig(reparameterization=kind, learning_rate=0.25).peak_learning_rate == 0.25
    assert TrainConfig(reparameterization=kind, beside="memories").peak_learning_rate == default_learning_rate(kind) / 2


def test_every_field_has_help():
    for field in TrainConfig.model_fields.values():
        assert field.description
        assert field.json_schema_extra["group"]


values = {
    "prefix_length": st.integers(1, 1000),
    "learning_rate": st.floats(0, 10, allow_nan=False),
    "epochs": st.floats(1e-3, 1e6),
    "gradient_checkpointing": st.booleans(),
    "reparameterization": st.sampled_from(REPARAMETERIZATIONS),
    "init_text": st.text(min_size=1).filter(str.strip),
    "prompt_format": st.text(),
    "license": st.text(),
    "output": st.text(min_size=1),
}


@settings(max_examples=60, deadline=None)
@given(changes=st.fixed_dictionaries({}, optional=values))
def test_toml_there_and_back(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    config = TrainConfig(**changes)
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert TrainConfig.from_file(path) == config
    assert TrainConfig(**config.to_dict()) == config


def test_overrides_win_over_the_file(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('prefix_length = 3\nseed = 4\ninit_text = "über"\n', encoding="utf-8")
    config = TrainConfig.from_file(path, seed=5)
    assert (config.prefix_length, config.seed, config.init_text) == (3, 5, "über")


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path):
    with pytest.raises(ConfigError, match="toml"):
        TrainConfig.from_file(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("prefix_length: 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        TrainConfig.from_file(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="toml"):
        TrainConfig.from_file(bad)
