"""Presets: the paper's figures, valid in a configuration, and the error of a wrong name."""

from __future__ import annotations

import pytest

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import PRESETS, preset


def test_every_preset_makes_a_configuration():
    for name in PRESETS:
        for task, methods in PRESETS[name].runs.items():
            assert task in TASKS
            for method in methods:
                values = preset(name, task, method)
                config = TrainConfig().replace(task=task, method=method, **values)
                assert {key: getattr(config, key) for key in values} == values


def test_quick_is_for_every_task_that_generates():
    assert set(PRESETS["quick"].runs) == {task.name for task in TASKS.values() if task.kind == "generation"}


def test_quick_makes_a_small_file_of_examples_in_few_steps():
    config = TrainConfig(**preset("quick", "records"))
    assert config.initialization == "examples"
    # 23,040 bytes per position of SmolLM2-135M in bfloat16.
    assert config.prefix_length * 23_040 <= 1_500_000
    assert config.save_dtype == "bfloat16"
    assert config.hold_out > 0
    assert config.patience > 0


@pytest.mark.parametrize("arguments", [("papper", "e2e"), ("paper", "toy"), ("paper", "summarization", "adapter")])
def test_what_there_is_not_is_refused(arguments: tuple[str, ...]):
    with pytest.raises(ConfigError):
        preset(*arguments)
