"""Small training runs for all tests of learning."""

import pytest

from prefixtune.training.config import TrainConfig


@pytest.fixture
def run_defaults():
    """Settings that a module's runs share; a module may replace this fixture by its own."""
    return {"init_text": "Say it"}


@pytest.fixture
def config_for(tmp_path, run_defaults):
    """`config_for(folder, **changes)`: a small run with an output folder of its own."""

    def make(folder="run", **changes):
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
