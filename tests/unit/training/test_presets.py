"""Presets: the paper's figures, valid in a configuration, and the error of a wrong name."""

import pytest

from prefixtune.data import TASKS
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.training.presets import PRESETS, preset


def test_every_preset_makes_a_configuration():
    for name in PRESETS:
        for task, methods in PRESETS[name].items():
            assert task in TASKS
            for method in methods:
                values = preset(name, task, method)
                config = TrainConfig().replace(task=task, method=method, **values)
                assert {key: getattr(config, key) for key in values} == values


def test_what_there_is_not_is_refused():
    for arguments in (("papper", "e2e"), ("paper", "toy"), ("paper", "summarization", "adapter")):
        with pytest.raises(ConfigError):
            preset(*arguments)
