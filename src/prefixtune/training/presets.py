"""Hyperparameters by preset, task and method, from `presets.toml`: the paper's (Li & Liang 2021), and `quick`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from prefixtune.errors import ConfigError

Values = Mapping[str, Any]
_ZERO = ("0", "0.0")


@dataclass(frozen=True)
class Preset:
    """Values for some runs.

    Attributes:
        description: One line for people.
        runs: Task -> method -> values by field of `TrainConfig`.
    """

    description: str
    runs: Mapping[str, Mapping[str, Values]]


def _read() -> dict[str, Preset]:
    text = resources.files("prefixtune.training").joinpath("presets.toml").read_text(encoding="utf-8")
    presets = {}
    for name, table in tomllib.loads(text).items():
        common = table.get("common", {})
        runs: dict[str, Mapping[str, Values]] = {}
        for run in table["runs"]:
            methods = {method: {**common, **values} for method, values in run.items() if method != "tasks"}
            runs |= dict.fromkeys(run["tasks"], methods)
        presets[name] = Preset(table["description"], runs)
    return presets


PRESETS: dict[str, Preset] = _read()


def preset(name: str, task: str, method: str = "prefix") -> dict[str, Any]:
    """The values of one run, for `TrainConfig.replace`.

    >>> values = preset("paper", "e2e")
    >>> values["learning_rate"], values["epochs"], values["batch_size"], values["prefix_length"]
    (8e-05, 5.0, 10, 5)

    Args:
        name: A name of `PRESETS`.
        task: A task's name.
        method: What is trained, as `TrainConfig.method` names it.

    Raises:
        ConfigError: The preset is unknown, or has no such run.
    """
    runs = {} if name not in PRESETS else PRESETS[name].runs.get(task, {})
    if method not in runs:
        raise ConfigError(
            f"there is no preset {name!r} for the task {task!r} with the method {method!r}.",
            hint="see `prefixtune data --tasks`.",
        )
    return dict(runs[method])


def without_conflicts(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values without those that do not go with what somebody gives beside it.

    >>> values = {"initialization": "examples", "init_examples": 2, "save_dtype": "bfloat16"}
    >>> without_conflicts(values, {"initialization": "words"})
    {'save_dtype': 'bfloat16'}
    >>> without_conflicts({"initialization": "words", "prefix_length": 5, "seed": 1}, {"init_examples": "4"})
    {'seed': 1}

    Args:
        values: Those of a preset.
        given: By field of `TrainConfig`, as values or texts.
    """
    left = dict(values)
    start = values.get("initialization")
    wanted_start = given.get("initialization", start if str(given.get("init_examples", 0)) in _ZERO else "examples")
    if wanted_start != start:
        # Examples and a prefix have a length of their own.
        has_length = wanted_start in ("examples", "prefix")
        for name in ("initialization", "init_examples", *(("init_text", "prefix_length") if has_length else ())):
            left.pop(name, None)
    wanted = {"dev": "", "hold_out": 0, **values, **given}
    has_dev = bool(wanted["dev"]) or str(wanted["hold_out"]) not in _ZERO
    if not has_dev or str(given.get("eval_every")) in _ZERO:
        left.pop("patience", None)
    return left
