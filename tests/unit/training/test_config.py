"""A run's configuration: all faults at once, and the nearest known name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"batch_size": -1, "task": 3, "reparameterization": "mpl"}, ("batch_size", "task", "'mpl'")),
        ({"prefix_length": 0, "init_text": " "}, ("prefix_length", "init_text")),
        ({"initialization": "prefix"}, ("init_prefix",)),
        ({"shard": True, "quantize": "int8"}, ("shard",)),
    ],
)
def test_all_faults_are_reported_at_once(values: dict[str, Any], names: tuple[str, ...]):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**values)
    assert all(name in error.value.message for name in names)


def test_a_prefix_to_start_from_is_started_from():
    config = TrainConfig(init_prefix="p.safetensors")
    assert (config.initialization, config.prefix_length) == ("prefix", 0)
    assert TrainConfig(init_prefix="p.safetensors", prefix_length=5).prefix_length == 5
    assert TrainConfig(**tomllib.loads(config.to_toml())) == config
    with pytest.raises(ConfigError, match="initialization"):
        TrainConfig(init_prefix="p.safetensors", initialization="words")
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
