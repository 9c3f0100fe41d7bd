"""The demo shows what training does by default."""

from __future__ import annotations

from prefixtune.cli.commands.demo import DemoOptions, demo_config
from prefixtune.training.config import TrainConfig


def test_the_demo_trains_as_a_user_does_by_default() -> None:
    config, usual = demo_config(DemoOptions()), TrainConfig()
    for name in ("reparameterization", "learning_rate", "initialization", "prefix_length", "backbone"):
        assert getattr(config, name) == getattr(usual, name), name
    assert config.peak_learning_rate == usual.peak_learning_rate
