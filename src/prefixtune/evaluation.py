"""Prefix x data -> scores: generate for every example and compare with its references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixtune.backbone import Backbone
from prefixtune.errors import DataError
from prefixtune.generation import GenerateConfig, generate
from prefixtune.metrics import Score, bleu
from prefixtune.prefix import Prefix
from prefixtune.tasks import Example, TextFormat

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the outputs that they were computed on.

    Attributes:
        scores: By metric; each names its implementation.
        outputs: One per example.
    """

    scores: dict[str, Score]
    outputs: tuple[str, ...]


def evaluate(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None = None,
    *,
    text_format: TextFormat | None = None,
    config: GenerateConfig | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate for every example, and score the outputs against its targets.

    Args:
        backbone: The frozen model.
        examples: Each with one or more targets.
        prefix: None: the bare model.
        text_format: None: what the prefix was trained with.
        config: How to decode; None: greedy.
        on_batch: Told after each batch how many examples are done.

    Raises:
        DataError: There is no example, or one has no target.
    """
    if not examples:
        raise DataError("there is no example to evaluate on.", hint="check the file.")
    for number, example in enumerate(examples):
        if not example.targets:
            raise DataError(
                f"example {number + 1} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
    outputs = generate(
        backbone,
        [example.source for example in examples],
        prefix,
        text_format=text_format,
        config=config or GenerateConfig(),
        on_batch=on_batch,
    )
    scores = {"bleu": bleu(outputs, [list(example.targets) for example in examples])}
    return Evaluation(scores, tuple(outputs))
