"""What a memory knows: loss, divergence and exact answers beside those of the bare model and of the text in view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate, epoch_batches
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.data.examples import Example
from prefixtune.distillation.documents import Question
from prefixtune.distillation.questioning import answer_questions
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.prefix.prefix import Prefix

__all__ = ["Reading", "closing_tokens", "encode_questions", "mean_loss", "read_test", "recovered_share", "text_bytes"]


@dataclass(frozen=True)
class Reading:
    """How well a model does on held-out questions.

    Attributes:
        loss: In nats per token of the given answers, without the tokens that end them; None: no answers are given.
        exact: How many greedy answers are the given one; None: likewise.
        divergence: From the teacher, in nats per token of its answers; None: there is no such teacher.
    """

    loss: float | None = None
    exact: int | None = None
    divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; figures that are not there are left out."""
        figures = {"loss": self.loss, "exact": self.exact, "kl": self.divergence}
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in figures.items()
            if value is not None
        }


def encode_questions(
    backbone: Backbone, questions: Sequence[Question], wording: Wording, prefix_length: int, max_length: int = 0
) -> list[TokenizedExample]:
    """Questions with answers as token ids; a question that is too long is cut as in training."""
    examples = [Example(question.question, (question.answer or "",)) for question in questions]
    dataset = encode_examples(
        backbone, examples, wording.text_format, prefix_length=prefix_length, max_length=max_length
    )
    return list(dataset.examples)


def closing_tokens(backbone: Backbone, wording: Wording) -> int:
    """Tokens that end a target: the template's end, and the end token."""
    return len(backbone.encode(wording.target.split("{target}")[1])) + 1


@torch.no_grad()
def mean_loss(
    backbone: Backbone,
    examples: Sequence[TokenizedExample],
    views: Sequence[Prefix | None],
    *,
    closing: int,
    batch_size: int,
) -> float:
    """The mean over the answers' tokens, in nats: cross-entropy, or with a teacher's labels the divergence from it.

    Args:
        backbone: The model.
        examples: Questions with answers.
        views: Per question, what stands before it.
        closing: How many tokens at the end of a target do not count.
        batch_size: Targets in one pass.
    """
    total, count = 0.0, 0
    for view in {id(view): view for view in views}.values():
        own = [example for example, other in zip(examples, views, strict=True) if other is view]
        for groups in epoch_batches(own, batch_size=batch_size, targets_per_source=batch_size, seed=None):
            losses = batch_loss(backbone, view, collate(backbone, groups))
            lengths = [len(target) for group in groups for target in group.targets]
            counts = torch.cat([torch.arange(length) < max(length - closing, 1) for length in lengths])
            total += float(losses[counts.to(losses.device)].double().sum())
            count += int(counts.sum())
    return total / count


def read_test(
    reader: Teacher,
    test: Sequence[Question],
    labelled: Sequence[TokenizedExample],
    views: Sequence[Prefix | None],
    labelled_views: Sequence[Prefix | None],
    wording: Wording,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Reading:
    """How well a model does on held-out questions.

    Args:
        reader: The model.
        test: The questions; with given answers, or none of them.
        labelled: Questions with the teacher's answers and labels; empty: there are none.
        views: Per question of `test`, what stands before it.
        labelled_views: The same for `labelled`.
        wording: The text around questions and answers.
        batch_size: Questions in one pass.
        on_batch: Called with the number of answers so far.
    """
    backbone, closing = reader.backbone, closing_tokens(reader.backbone, wording)
    loss = exact = divergence = None
    given = [question for question in test if question.answer is not None]
    if given and len(given) == len(test):
        longest = max((0 if view is None else view.length() for view in views), default=0)
        examples = encode_questions(backbone, given, wording, longest)
        loss = mean_loss(backbone, examples, views, closing=closing, batch_size=batch_size)
        answers = answer_questions(
            reader,
            [question.question for question in given],
            views,
            wording,
            answer_length=max(len(target) for example in examples for target in example.targets) + 4,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        exact = sum(_same(answer, question.answer or "") for answer, question in zip(answers, given, strict=True))
    if labelled:
        divergence = mean_loss(backbone, labelled, labelled_views, closing=closing, batch_size=batch_size)
    return Reading(loss, exact, divergence)


def _same(answer: str, wanted: str) -> bool:
    """Whether two answers are the same but for white space."""
    return answer.split() == wanted.split()


def recovered_share(bare: float | None, best: float | None, memory: float | None) -> float | None:
    """How much of the way from the bare model to the best one the memory goes; None: the best one is not better.

    >>> recovered_share(5.0, 1.0, 2.0)
    0.75
    """
    if bare is None or best is None or memory is None or best >= bare:
        return None
    return (bare - memory) / (bare - best)


def text_bytes(backbone: Backbone, positions: int, bytes_per_number: int) -> int:
    """The size of the keys and values that a text of so many positions has at the sites of a memory."""
    return positions * bytes_per_number * sum(shape.size for shapes in backbone.geometry.values() for shape in shapes)
