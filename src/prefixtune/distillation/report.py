"""What a memory knows: loss, divergence and exact answers beside those of the bare model and of the text in view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample, encode_examples
from prefixtune.data.examples import Example
from prefixtune.distillation.documents import Question
from prefixtune.distillation.questioning import answer_questions
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.prefix.prefix import Prefix

__all__ = [
    "Reading",
    "closing_tokens",
    "cut_unended",
    "encode_questions",
    "encode_taught",
    "mean_loss",
    "num_asked",
    "read_test",
    "recovered_share",
    "target_endings",
    "text_bytes",
]


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
    backbone: Backbone, questions: Sequence[Question], wording: Wording, prefix_length: int
) -> list[TokenizedExample]:
    """Questions with answers as token ids; a question that is too long is cut as in training."""
    examples = [Example(question.question, (question.answer or "",)) for question in questions]
    dataset = encode_examples(backbone, examples, wording.text_format, prefix_length=prefix_length)
    return list(dataset.examples)


def closing_tokens(backbone: Backbone, wording: Wording, answers: Sequence[str]) -> list[int]:
    """Per answer, the tokens that end its target: those of the template's end, and the end token."""
    whole = backbone.encode_targets([wording.text_format.format_target(answer) for answer in answers])
    head, tail = wording.target.split("{target}")
    if not tail:
        return [1] * len(answers)
    # A tokenizer may join the end with what stands before it, or put a mark in front of a text.
    open_ended = backbone.encode_targets([f"{head}{answer}" for answer in answers])
    return [max(len(ids) - len(without), 0) + 1 for ids, without in zip(whole, open_ended, strict=True)]


def target_endings(backbone: Backbone, questions: Sequence[Question], wording: Wording) -> list[int]:
    """Per question, the tokens that end its target; 0 where they are left out, as the answer was cut."""
    closing = closing_tokens(backbone, wording, [question.answer or "" for question in questions])
    return [count if question.ended else 0 for count, question in zip(closing, questions, strict=True)]


def cut_unended(
    backbone: Backbone, examples: Sequence[TokenizedExample], questions: Sequence[Question], wording: Wording
) -> list[TokenizedExample]:
    """The questions' examples, of which those whose answer was cut lose the tokens that would end it."""
    closing = closing_tokens(backbone, wording, [question.answer or "" for question in questions])
    return [
        example
        if question.ended or len(example.targets[0]) <= count
        else replace(example, targets=(example.targets[0][:-count],))
        for example, question, count in zip(examples, questions, closing, strict=True)
    ]


def encode_taught(
    backbone: Backbone, questions: Sequence[Question], wording: Wording, prefix_length: int
) -> list[TokenizedExample]:
    """Questions with a teacher's answers as token ids: those that were cut have no end."""
    if not questions:
        return []
    return cut_unended(backbone, encode_questions(backbone, questions, wording, prefix_length), questions, wording)


@torch.no_grad()
def mean_loss(
    backbone: Backbone,
    examples: Sequence[TokenizedExample],
    views: Sequence[Prefix | None],
    *,
    closing: Sequence[int],
    batch_size: int,
) -> float:
    """The mean over the answers' tokens, in nats: cross-entropy, or with a teacher's labels the divergence from it.

    Args:
        backbone: The model.
        examples: Questions with answers.
        views: Per question, what stands before it.
        closing: Per question, how many tokens at the end of its target do not count.
        batch_size: Targets in one pass.
    """
    total, count = 0.0, 0
    for view in {id(view): view for view in views}.values():
        own = [index for index, other in enumerate(views) if other is view]
        for first in range(0, len(own), batch_size):
            rows = own[first : first + batch_size]
            losses = batch_loss(backbone, view, collate(backbone, [examples[index] for index in rows]))
            lengths = [(len(target), closing[index]) for index in rows for target in examples[index].targets]
            counts = torch.cat([torch.arange(length) < max(length - end, 1) for length, end in lengths])
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
    taught: Sequence[Question] = (),
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
        taught: The questions of `labelled`.
        batch_size: Questions in one pass.
        on_batch: Called with the number of answers so far, one per question.
    """
    backbone = reader.backbone
    loss = exact = divergence = None
    given = [question for question in test if question.answer is not None]
    if given and len(given) == len(test):
        longest = max((0 if view is None else view.length() for view in views), default=0)
        examples = encode_questions(backbone, given, wording, longest)
        closing = target_endings(backbone, given, wording)
        loss = mean_loss(backbone, examples, views, closing=closing, batch_size=batch_size)
        exact = _count_exact(reader, given, views, wording, examples, batch_size=batch_size, on_batch=on_batch)
    if labelled:
        closing = target_endings(backbone, taught, wording)
        divergence = mean_loss(backbone, labelled, labelled_views, closing=closing, batch_size=batch_size)
    return Reading(loss, exact, divergence)


def _count_exact(
    reader: Teacher,
    given: Sequence[Question],
    views: Sequence[Prefix | None],
    wording: Wording,
    examples: Sequence[TokenizedExample],
    *,
    batch_size: int,
    on_batch: Callable[[int], None],
) -> int:
    """How many questions have a greedy answer that is given; of several answers to one question, any counts.

    Where a line break ends an answer, as many lines count as the given one has.
    """
    done = right = 0
    rows_of: dict[str, list[int]] = {}
    for index, question in enumerate(given):
        rows_of.setdefault(question.question, []).append(index)
    by_lines: dict[int, list[list[int]]] = {}
    for rows in rows_of.values():
        by_lines.setdefault(max(_num_lines(given[index]) for index in rows), []).append(rows)
    for lines, asked in sorted(by_lines.items()):
        longest = max(len(target) for rows in asked for index in rows for target in examples[index].targets)
        answers = answer_questions(
            reader,
            [given[rows[0]].question for rows in asked],
            [views[rows[0]] for rows in asked],
            wording if lines == 1 else wording.of_lines(),
            answer_length=longest + 4,
            batch_size=batch_size,
            on_batch=lambda count, before=done: on_batch(before + count),  # type: ignore[misc]
        )
        done += len(asked)
        for rows, (answer, _) in zip(asked, answers, strict=True):
            right += any(_is_given(answer, given[index], by_line=wording.ends_with_line) for index in rows)
    return right


def num_asked(questions: Sequence[Question]) -> int:
    """How many different questions there are: one that has several answers is there with each."""
    return len({question.question for question in questions})


def _num_lines(question: Question) -> int:
    return (question.answer or "").count("\n") + 1


def _is_given(answer: str, question: Question, *, by_line: bool) -> bool:
    """Whether an answer, or with `by_line` as many lines of it as are given, is the given one but for white space."""
    kept = "\n".join(answer.split("\n")[: _num_lines(question)]) if by_line else answer
    return kept.split() == (question.answer or "").split()


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
