"""The studies of the paper, and the methods and starts that they compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "METHODS",
    "PREFIX_METHODS",
    "SIZED",
    "STUDIES",
    "UNTRAINED",
    "Method",
    "Split",
    "Start",
    "StudyKind",
    "StudyName",
    "base_method",
    "method_size",
]


Split = Literal["train", "dev", "test"]
Method = Literal["prefix", "prompt", "infix", "full", "top", "adapter", "lora", "zero-shot", "few-shot"]
METHODS: tuple[Method, ...] = get_args(Method)
UNTRAINED: tuple[Method, ...] = ("zero-shot", "few-shot")
"""Methods that train nothing: the bare model, and the bare model shown a few solved examples."""
SIZED: tuple[Method, ...] = ("top", "adapter", "lora")
"""Methods that may have a size, as in `adapter:8`."""
PREFIX_METHODS: tuple[Method, ...] = ("prefix", "prompt", "infix")
"""Methods that have a length and a start."""
Start = Literal["task", "unrelated", "random", "prompt", "examples"]
StudyName = Literal[
    "methods", "low-data", "unseen", "length", "initialization", "position", "ceiling", "summarization", "dart", "scale"
]


def base_method(method: str) -> str:
    """A method without its size.

    >>> base_method("adapter:8"), base_method("full")
    ('adapter', 'full')
    """
    return method.partition(":")[0]


def method_size(method: str) -> int | None:
    """A method's size; None: the default.

    >>> method_size("adapter:8"), method_size("adapter")
    (8, None)
    """
    size = method.partition(":")[2]
    return int(size) if size.isdigit() else None


@dataclass(frozen=True)
class StudyKind:
    """A study of the paper.

    Attributes:
        description: One line for people.
        factors: What varies, besides subsets and seeds.
        axis: The factor that is a number, and is drawn as a curve; None: there is none.
        defaults: The study's own defaults for values of `StudyConfig`.
    """

    description: str
    factors: tuple[str, ...]
    axis: str | None
    defaults: Mapping[str, Any]


STUDIES: dict[StudyName, StudyKind] = {
    "methods": StudyKind(
        "a prefix against what else can be trained (Li & Liang 2021, table 1)",
        ("method",),
        None,
        {"methods": ("prefix", "full", "top", "adapter", "lora", "prompt", "few-shot", "zero-shot"), "sizes": (2000,)},
    ),
    "low-data": StudyKind(
        "few training examples: a prefix against full fine-tuning (section 6.3)",
        ("method", "num_targets"),
        "num_targets",
        {
            "methods": ("prefix", "full"),
            "sizes": (50, 100, 200, 500),
            "subsets": 5,
            "seeds": 2,
            "sample": "pairs",
            "dev_share": 0.3,
            "steps_by_size": {"50": 200, "100": 200, "200": 200, "500": 400},
            "patience": 5,
            # So that patience can act within these steps.
            "train_settings": {"eval_every": 20},
        },
    ),
    "unseen": StudyKind(
        "categories that are not in the training set: scores on seen and unseen ones (section 6.4)",
        ("method",),
        None,
        {"task": "webnlg", "methods": ("prefix", "full"), "task_words": "Say these facts in one sentence:"},
    ),
    "length": StudyKind(
        "the prefix's length (section 7.1)",
        ("prefix_length",),
        "prefix_length",
        {"lengths": (1, 2, 5, 10, 20, 50), "sizes": (2000,)},
    ),
    "initialization": StudyKind(
        "where the prefix starts: the task's words, other words, at random, a prompt, examples (section 7.4)",
        ("initialization",),
        None,
        {"starts": get_args(Start), "sizes": (100,), "subsets": 3, "sample": "pairs", "dev_share": 0.3},
    ),
    "position": StudyKind(
        "a prefix against an infix and a prompt at the input layer (sections 7.2 and 7.3)",
        ("method", "prefix_length"),
        "prefix_length",
        {"methods": ("prefix", "infix", "prompt"), "lengths": (1, 10, 20), "sizes": (2000,)},
    ),
    "ceiling": StudyKind(
        "how much a prefix can learn: by length, against full fine-tuning and LoRA of several ranks",
        ("method", "prefix_length"),
        "prefix_length",
        {
            "methods": ("full", "prefix", "lora:1", "lora:4", "lora:16", "lora:64"),
            "lengths": (1, 5, 20, 100, 200, 500),
            "sizes": (10000,),
        },
    ),
    "summarization": StudyKind(
        "a prefix against full fine-tuning on summaries (section 6.2)",
        ("method",),
        None,
        {"task": "scitldr", "methods": ("prefix", "full"), "task_words": "Summarize the text in one sentence:"},
    ),
    "dart": StudyKind(
        "a prefix against what else can be trained, on triples of open domains (table 1)",
        ("method",),
        None,
        {"task": "dart", "methods": ("prefix", "full"), "task_words": "Say these facts in one sentence:"},
    ),
    "scale": StudyKind(
        "the same comparison on several backbones",
        ("method", "backbone"),
        None,
        {"methods": ("prefix", "lora", "full"), "sizes": (2000,)},
    ),
}
