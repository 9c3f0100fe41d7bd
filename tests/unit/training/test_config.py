"""A run's configuration: all faults at once, and the nearest known name."""

import tomllib

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig, default_learning_rate


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        TrainConfig(
            prefix_length=0,
            batch_size=-1,
            learning_rate=-1.0,
            epochs=-1.0,
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


def test_an_initialization_needs_what_it_starts_from():
    with pytest.raises(ConfigError, match="init_text is empty"):
        TrainConfig(init_text="  ")
    with pytest.raises(ConfigError, match="init_prefix names no file"):
        TrainConfig(initialization="prefix")
    assert TrainConfig(initialization="random", init_text="").initialization == "random"


def test_what_cannot_be_split_among_processes():
    with pytest.raises(ConfigError, match="shard"):
        TrainConfig(shard=True, quantize="int8")


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


def test_unknown_keys_are_reported_with_the_nearest_known_one(tmp_path):
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


@pytest.mark.parametrize("kind", ["mlp", "none", "scaled"])
def test_the_effective_learning_rate(kind):
    assert TrainConfig(reparameterization=kind).peak_learning_rate == default_learning_rate(kind) > 0
    assert TrainConfig(reparameterization=kind, learning_rate=0.25).peak_learning_rate == 0.25
    assert TrainConfig(reparameterization=kind, beside="memories").peak_learning_rate == default_learning_rate(kind) / 2
