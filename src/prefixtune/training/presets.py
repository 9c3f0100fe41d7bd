"""Hyperparameters by preset, task and method, from `presets.toml`: the paper's (Li & Liang 2021), and `quick`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from prefixtune.errors import ConfigError

Runs = dict[str, dict[str, dict[str, Any]]]
"""Task -> method -> values by field of `TrainConfig`."""


def _read() -> dict[str, Runs]:
    text = resources.files("prefixtune.training").joinpath("presets.toml").read_text(encoding="utf-8")
    presets: dict[str, Runs] = {}
    for name, table in tomllib.loads(text).items():
        common, presets[name] = table.get("common", {}), {}
        for run in table["runs"]:
            methods = {method: {**common, **values} for method, values in run.items() if method != "tasks"}
            presets[name] |= dict.fromkeys(run["tasks"], methods)
    return presets


PRESETS = _read()
"""Name -> its runs."""


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
    runs = PRESETS.get(name, {}).get(task, {})
    if method not in runs:
        raise ConfigError(
            f"there is no preset {name!r} for the task {task!r} with the method {method!r}.",
            hint="see `prefixtune data --tasks`.",
        )
    return dict(runs[method])


def without_conflicts(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Usual values, such as a preset's, without those that do not go with what somebody gives beside them.

    >>> values = {"initialization": "examples", "init_examples": 2, "save_dtype": "bfloat16"}
    >>> without_conflicts(values, {"initialization": "words"})
    {'save_dtype': 'bfloat16'}
    >>> without_conflicts({"initialization": "words", "prefix_length": 5, "seed": 1}, {"init_examples": "4"})
    {'seed': 1}

    Args:
        values: The usual ones.
        given: By field of `TrainConfig`, as values or texts.
    """
    left = dict(values)
    start = values.get("initialization")
    implied = "words" if given.get("init_text") else start
    implied = "prefix" if given.get("init_prefix") else implied if _is_zero(given.get("init_examples")) else "examples"
    wanted_start = given.get("initialization", implied)
    if wanted_start != start:
        # A text, examples and a prefix have a length of their own.
        length = ("init_text", "prefix_length") if wanted_start in ("text", "examples", "prefix") else ()
        for name in ("initialization", "init_examples", *length):
            left.pop(name, None)
    wanted = {**values, **given}
    if (not wanted.get("dev") and _is_zero(wanted.get("hold_out"))) or _is_zero(given.get("eval_every", 1)):
        left.pop("patience", None)
    return left


def _is_zero(value: Any) -> bool:
    """Whether a number, or the text of one, is 0 or left out."""
    return str(value) in ("None", "0", "0.0")
