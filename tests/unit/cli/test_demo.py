"""The demo shows what training does by default, and replaces an earlier demo alone."""

from __future__ import annotations

from pathlib import Path

from prefixtune.cli.commands.demo import DemoOptions, demo_config
from prefixtune.cli.main import main
from prefixtune.training.config import TrainConfig


def test_the_demo_trains_as_a_user_does_by_default() -> None:
    config, usual = demo_config(DemoOptions()), TrainConfig()
    for name in ("reparameterization", "learning_rate", "initialization", "prefix_length", "backbone"):
        assert getattr(config, name) == getattr(usual, name), name
    assert config.peak_learning_rate == usual.peak_learning_rate


def test_a_run_that_no_demo_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert (tmp_path / "prefix.safetensors").read_bytes() == b"precious"
