"""Small training runs for all tests of learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.training.config import TrainConfig


@pytest.fixture
def run_defaults() -> dict[str, Any]:
    """Settings that a module's runs share; a module may replace this fixture by its own."""
    return {"init_text": "Say it"}


@pytest.fixture
def config_for(tmp_path: Path, run_defaults: dict[str, Any]) -> Callable[..., TrainConfig]:
    """`config_for(folder, **changes)`: a small run with an output folder of its own."""

    def make(folder: str = "run", **changes: Any) -> TrainConfig:
        values = {
            "prefix_length": 4,
            "reparameterization": "none",
            "bottleneck_size": 16,
            "batch_size": 4,
            "targets_per_source": 2,
            "max_steps": 6,
            "warmup_steps": 2,
            "save_every": 1,
            "learning_rate": 1e-2,
            "output": str(tmp_path / folder),
            **run_defaults,
            **changes,
        }
        return TrainConfig(**values)

    return make
