"""Hyperparameters by preset, task and method: the paper's (Li & Liang 2021, tables 6 and 8), and `quick`.

A preset has values for some fields of `TrainConfig`; the others stay as they are. The paper's models are GPT-2 for
table-to-text and BART-large for summaries; another backbone may need another learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import ConfigError

__all__ = ["PRESETS", "Preset", "preset", "without_conflicts"]


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Values for some runs.

    Attributes:
        description: One line for people.
        runs: Task -> method -> values by field of `TrainConfig`.
    """

    description: str
    runs: Mapping[str, Mapping[str, Values]]


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
            hint="`prefixtune data --tasks` names the tasks, and docs/training.md the presets.",
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
    wanted_start = given.get("initialization", start if _is_zero(given.get("init_examples", 0)) else "examples")
    if wanted_start != start:
        # Examples and a prefix have a length of their own.
        has_length = wanted_start in ("examples", "prefix")
        for name in ("initialization", "init_examples", *(("init_text", "prefix_length") if has_length else ())):
            left.pop(name, None)
    wanted = {"dev": "", "hold_out": 0, **values, **given}
    has_dev = bool(wanted["dev"]) or not _is_zero(wanted["hold_out"])
    if not has_dev or _is_zero(given.get("eval_every")):
        left.pop("patience", None)
    return left


def _is_zero(value: Any) -> bool:
    """Whether a number, or its text, is zero.

    >>> _is_zero("0.0"), _is_zero(0), _is_zero("x"), _is_zero(None)
    (True, True, False, False)
    """
    try:
        return value is not None and float(value) == 0
    except (TypeError, ValueError):
        return False


_COMMON: dict[str, Any] = {
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    # The paper's batches are pairs drawn one by one.
    "targets_per_source": 1,
}
_SUMMARY: dict[str, Any] = {"max_length": 512}


def _run(learning_rate: float, epochs: int, batch_size: int, **more: Any) -> Values:
    return {
        **_COMMON,
        "learning_rate": learning_rate,
        "epochs": float(epochs),
        "batch_size": batch_size,
        **more,
    }


def _prefix(
    learning_rate: float, epochs: int, batch_size: int, length: int, bottleneck: int = 512, **more: Any
) -> Values:
    """A run of the paper's own method. With full data it starts at random, since words made no difference there."""
    own = {"prefix_length": length, "reparameterization": "mlp", "bottleneck_size": bottleneck}
    return _run(learning_rate, epochs, batch_size, **{**own, "initialization": "random", **more})


def _summaries(runs: Mapping[str, Values]) -> dict[str, Mapping[str, Values]]:
    """The paper's runs on XSUM, for the other summarization tasks too: it has none on them."""
    return dict.fromkeys(("summarization", "scitldr"), runs)


_GENERATION = (
    *("e2e", "webnlg", "dart", "summarization", "scitldr", "records"),
    *("toy", "toy_mapping", "toy_base", "toy_copy"),
)
"""The tasks whose targets are texts."""
_QUICK: Values = {
    "initialization": "examples",
    "init_examples": 2,
    # In bfloat16 a prefix of SmolLM2-135M has 23,040 bytes per position: 1.47 MB.
    "prefix_length": 64,
    "prefix_dropout": 0.05,
    "reparameterization": "scaled",
    "max_steps": 24,
    "batch_size": 16,
    "warmup_steps": 4,
    # Used where there is no development file.
    "hold_out": 0.1,
    "eval_every": 4,
    "patience": 2,
    "save_dtype": "bfloat16",
}

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "for 8 to 200 examples of your own: starts from two of them, takes at most 24 steps, and holds out a tenth "
        "where there is no development file",
        {task: {"prefix": _QUICK} for task in _GENERATION},
    ),
    "paper": Preset(
        "the paper's runs on the full training sets; for summaries, those on XSUM",
        {
            "e2e": {
                "prefix": _prefix(8e-5, 5, 10, 5),
                "full": _run(5e-5, 5, 10),
                "adapter": _run(5e-5, 5, 5),
            },
            "webnlg": {
                "prefix": _prefix(5e-5, 5, 5, 5),
                "full": _run(1e-5, 10, 6),
                "adapter": _run(5e-5, 5, 5),
            },
            "dart": {
                "prefix": _prefix(5e-5, 10, 5, 10),
                "full": _run(1e-5, 10, 6),
                "adapter": _run(5e-5, 5, 5),
            },
            **_summaries(
                {"prefix": _prefix(5e-5, 30, 14, 100, 800, **_SUMMARY), "full": _run(3e-5, 5, 18, **_SUMMARY)}
            ),
        },
    ),
}
