"""Hyperparameters by preset, task and method: the paper's (Li & Liang 2021, tables 6 and 8), and `quick`.

A preset has values for some fields of `TrainConfig`; the others stay as they are. The paper's models are GPT-2 for
table-to-text and BART-large for summaries; another backbone may need another learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixtune.errors import ConfigError, did_you_mean

__all__ = ["PRESETS", "Preset", "preset", "without_conflicts"]


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Values for some runs.

    Attributes:
        description: One line for people.
        runs: Task -> method -> values by field of `TrainConfig`. A value that depends on the number of training targets
            is a mapping: largest number of targets -> value.
    """

    description: str
    runs: Mapping[str, Mapping[str, Values]]


def preset(name: str, task: str, method: str = "prefix", *, num_targets: int = 100) -> dict[str, Any]:
    """The values of one run, for `TrainConfig.replace`.

    >>> values = preset("paper", "e2e")
    >>> values["learning_rate"], values["epochs"], values["batch_size"], values["prefix_length"]
    (8e-05, 5.0, 10, 5)
    >>> preset("paper-low-data", "e2e", num_targets=500)["max_steps"]
    400

    Args:
        name: A name of `PRESETS`.
        task: A task's name.
        method: What is trained, as `TrainConfig.method` names it.
        num_targets: Number of training targets, for the low-data presets: the values of the next larger number that the
            paper tried (50, 100, 200 or 500), or of the largest.

    Raises:
        ConfigError: The preset is unknown, or has no such run.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}.", hint=did_you_mean(name, PRESETS))
    runs = PRESETS[name].runs
    if task not in runs:
        raise ConfigError(
            f"preset {name!r} has nothing for the task {task!r}; it has {', '.join(runs)}.",
            hint=did_you_mean(task, runs),
        )
    if method not in runs[task]:
        raise ConfigError(
            f"preset {name!r} has nothing for {task!r} with the method {method!r}; it has {', '.join(runs[task])}.",
            hint=did_you_mean(method, runs[task]),
        )
    return {key: _for_size(value, num_targets) for key, value in runs[task][method].items()}


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
    starts = values.get("initialization"), given.get("initialization", values.get("initialization"))
    if starts[0] == "examples" != starts[1]:
        for name in ("initialization", "init_examples", "compact_examples"):
            left.pop(name, None)
    with_examples = given.get("initialization") == "examples" or not _is_zero(given.get("init_examples", 0))
    if starts[0] != "examples" and with_examples:
        # Words have another length than examples, which set their own.
        for name in ("initialization", "init_text", "prefix_length"):
            left.pop(name, None)
    if given.get("initialization") == "prefix":
        # So has a prefix.
        for name in ("init_text", "prefix_length"):
            left.pop(name, None)
    has_room = not any(_is_zero(given.get(name)) for name in ("prefix_length", "init_examples"))
    if not has_room or given.get("example_attention") == "all":
        left.pop("compact_examples", None)
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


def _for_size(value: Any, num_targets: int) -> Any:
    if not isinstance(value, Mapping):
        return value
    return value[min((size for size in value if size >= num_targets), default=max(value))]


_COMMON: dict[str, Any] = {
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "loss_reduction": "sentence",
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
    return dict.fromkeys(("xsum", "summarization", "scitldr"), runs)


def _few(method: str) -> Values:
    """E2E with 50 to 500 examples."""
    words: dict[str, Any] = {"initialization": "words", "init_text": "table-to-text:"}
    if method == "prefix":
        return _prefix(5e-5, 5, 10, 6, **words, max_steps={50: 200, 100: 200, 200: 200, 500: 400})
    return _run(5e-5, 5, 10, max_steps={50: 100, 100: 100, 200: 200, 500: 400})


def _few_summaries(method: str) -> Values:
    """XSUM with 50 to 500 examples."""
    words: dict[str, Any] = {"initialization": "words", "init_text": "summarize"}
    if method == "prefix":
        by_size = {50: 30.0, 100: 20.0, 200: 20.0, 500: 20.0}
        return {**_prefix(5e-5, 30, 5, 1, 800, **words, **_SUMMARY, warmup_steps=100), "epochs": by_size}
    by_size = {50: 30.0, 100: 10.0, 200: 3.0, 500: 3.0}
    return {**_run(5e-5, 30, 6, **_SUMMARY, warmup_steps=100), "epochs": by_size}


_SKILLS = ("mapping", "reverse", "base", "lookup", "copy", "first", "plural", "capitals")
_GENERATION = (
    *("e2e", "webnlg", "dart", "summarization", "xsum", "scitldr", "records", "toy"),
    *(f"toy_{skill}" for skill in _SKILLS),
)
"""The tasks whose targets are texts."""
_QUICK: Values = {
    "initialization": "examples",
    "init_examples": 2,
    # In bfloat16 a prefix of SmolLM2-135M has 23,040 bytes per position: 1.47 MB.
    "prefix_length": 64,
    "compact_examples": "stride",
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
                "top": _run(5e-5, 5, 10),
                "adapter": _run(5e-5, 5, 5),
            },
            "webnlg": {
                "prefix": _prefix(5e-5, 5, 5, 5),
                "full": _run(1e-5, 10, 6),
                "top": _run(5e-5, 10, 9),
                "adapter": _run(5e-5, 5, 5),
            },
            "dart": {
                "prefix": _prefix(5e-5, 10, 5, 10),
                "full": _run(1e-5, 10, 6),
                "top": _run(5e-5, 5, 5),
                "adapter": _run(5e-5, 5, 5),
            },
            **_summaries(
                {"prefix": _prefix(5e-5, 30, 14, 100, 800, **_SUMMARY), "full": _run(3e-5, 5, 18, **_SUMMARY)}
            ),
        },
    ),
    "paper-small-adapter": Preset(
        "the paper's runs of adapters with 0.1 % of the weights (those of `paper`: 3 %); their width is --method-size",
        {
            "e2e": {"adapter": _run(8e-5, 10, 5)},
            "webnlg": {"adapter": _run(5e-5, 10, 5)},
            "dart": {"adapter": _run(8e-5, 5, 5)},
        },
    ),
    "paper-low-data": Preset(
        "the paper's runs on 50 to 500 training examples, started from words",
        {
            "e2e": {method: _few(method) for method in ("prefix", "full")},
            **_summaries({method: _few_summaries(method) for method in ("prefix", "full")}),
        },
    ),
    "paper-within-news": Preset(
        "the paper's run on summaries of news topics that are not in the training set",
        _summaries({"prefix": _prefix(5e-5, 30, 36, 80, 800, **_SUMMARY)}),
    ),
    "paper-news-to-sports": Preset(
        "the paper's run on summaries of sports, trained on other news",
        _summaries({"prefix": _prefix(5e-5, 15, 36, 40, 800, **_SUMMARY)}),
    ),
}
