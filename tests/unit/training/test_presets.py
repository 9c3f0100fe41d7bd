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


@pytest.mark.parametrize(
    ("task", "learning_rate", "epochs", "batch_size", "prefix_length", "bottleneck_size"),
    [
        ("e2e", 8e-5, 5, 10, 5, 512),
        ("webnlg", 5e-5, 5, 5, 5, 512),
        ("dart", 5e-5, 10, 5, 10, 512),
        ("xsum", 5e-5, 30, 14, 100, 800),
    ],
)
def test_the_papers_prefixes(
    task: str, learning_rate: float, epochs: float, batch_size: int, prefix_length: int, bottleneck_size: int
):
    values = preset("paper", task)
    assert values["reparameterization"] == "mlp"
    assert values["loss_reduction"] == "sentence"
    assert (values["warmup_steps"], values["weight_decay"], values["max_grad_norm"]) == (0, 0.0, 1.0)
    assert (values["learning_rate"], values["epochs"], values["batch_size"]) == (learning_rate, epochs, batch_size)
    assert (values["prefix_length"], values["bottleneck_size"]) == (prefix_length, bottleneck_size)


def test_fine_tuning_has_no_prefix():
    values = preset("paper", "webnlg", "full")
    assert (values["learning_rate"], values["epochs"], values["batch_size"]) == (1e-5, 10, 6)
    assert not {"prefix_length", "reparameterization", "initialization"} & set(values)


def test_few_examples_start_from_words_and_take_fewer_steps():
    values = preset("paper-low-data", "e2e")
    assert (values["initialization"], values["init_text"], values["prefix_length"]) == ("words", "table-to-text:", 6)
    steps = [preset("paper-low-data", "e2e", num_targets=size)["max_steps"] for size in (50, 100, 200, 201, 500, 900)]
    assert steps == [200, 200, 200, 400, 400, 400]
    tuned = [preset("paper-low-data", "e2e", "full", num_targets=n)["max_steps"] for n in (50, 100, 200, 500)]
    assert tuned == [100, 100, 200, 400]
    few = preset("paper-low-data", "xsum", num_targets=50)
    assert (few["epochs"], few["warmup_steps"], few["batch_size"]) == (30, 100, 5)
    assert (few["prefix_length"], few["init_text"]) == (1, "summarize")


def test_a_preset_is_the_callers_own():
    preset("paper", "e2e")["learning_rate"] = 1.0
    assert preset("paper", "e2e")["learning_rate"] == 8e-5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("papper", "e2e"), "no preset 'papper'.*mean 'paper'"),
        (("paper", "e2ee"), "nothing for the task 'e2ee'; it has e2e, webnlg, .*mean 'e2e'"),
        (("paper", "toy"), "nothing for the task 'toy'"),
        (("paper-small-adapter", "e2e"), "with the method 'prefix'; it has adapter"),
        (("paper-low-data", "dart"), "nothing for the task 'dart'; it has e2e, xsum"),
        (("paper", "e2e", "prefixx"), "nothing for 'e2e' with the method 'prefixx'.*mean 'prefix'"),
        (("paper", "xsum", "adapter"), "nothing for 'xsum' with the method 'adapter'; it has prefix, full"),
    ],
)
def test_a_wrong_name_gets_the_nearest_one(arguments: tuple[str, ...], says: str):
    with pytest.raises(ConfigError, match=says) as caught:
        preset(*arguments)
    assert caught.value.hint


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
