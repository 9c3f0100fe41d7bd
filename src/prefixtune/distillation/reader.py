"""A model with what it has in view: what it answers, and how well it does on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedExample, encode_prompts
from prefixtune.distillation.inputs import Question
from prefixtune.distillation.wording import ANSWER_MARGIN, Wording, encode_questions, without_ends
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete
from prefixtune.inference.prompts import Prompt, check_requests
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.score import score_targets

_MOST_POSITIONS = 16_384
"""That a pass of questions has together with its copies of what is in view."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Reader:
    """A model that is asked questions.

    Attributes:
        backbone: The model.
        wording: The text around questions and answers.
        views: What stands before the questions about each piece of a text; of no text, before all questions.
        batch_size: Questions in one pass, at most.
    """

    backbone: Backbone
    wording: Wording
    views: Sequence[Prefix | None]
    batch_size: int

    @property
    def longest(self) -> int:
        """Positions of the longest view."""
        return max(0 if view is None else view.length() for view in self.views)

    @property
    def rows(self) -> int:
        """Questions in one pass of the trained model, where each has a copy of what is in view."""
        return max(1, min(self.batch_size, _MOST_POSITIONS // (self.longest + 128)))

    def by_view(self, questions: Sequence[Question]) -> list[tuple[Prefix | None, list[int]]]:
        """The indices of the questions in passes, each with the view that stands before all of its questions."""
        indices: dict[int, list[int]] = {}
        for index, question in enumerate(questions):
            indices.setdefault(id(self.views[question.chunk]), []).append(index)
        parts = [own[first : first + self.rows] for own in indices.values() for first in range(0, len(own), self.rows)]
        return [(self.views[questions[part[0]].chunk], part) for part in parts]

    def answer(self, questions: Sequence[Question], length: int, on_batch: Progress) -> list[Question]:
        """The questions with what the model answers, greedily; empty where it says nothing.

        Args:
            questions: What is asked.
            length: Most tokens of an answer; one that takes them all has not `ended`.
            on_batch: Called with the number of answers so far.

        Raises:
            RequestError: A question does not fit the model's positions with what is in view.
        """
        form = self.wording.text_format
        config = GenerateConfig(max_new_tokens=length, stop=self.wording.stop, batch_size=self.batch_size)
        prompts = encode_prompts(self.backbone, form, [question.question for question in questions])
        asked = [
            Prompt(ids, self.views[question.chunk], length, (), form)
            for ids, question in zip(prompts, questions, strict=True)
        ]
        check_requests(self.backbone, asked)
        answered = list(questions)
        for done, (number, output) in enumerate(complete(self.backbone, asked, config), start=1):
            answer, ended = form.extract_target(output.text), output.finish_reason == "stop"
            answered[number] = replace(questions[number], answer=answer, ended=ended)
            on_batch(done)
        return answered

    def read(self, test: Sequence[Question], on_batch: Progress = lambda done: None) -> dict[str, Any]:
        """`loss`, in nats per token of the given answers without the tokens that end them, and how many are `exact`.

        Args:
            test: The questions; where not all have an answer, there are no figures.
            on_batch: Called with the number of answers so far, one per different question.
        """
        if not test or any(question.answer is None for question in test):
            return {}
        examples = encode_questions(self.backbone, test, self.wording, self.longest)
        asked: dict[str, list[Question]] = {}
        for question in test:
            asked.setdefault(question.question, []).append(question)
        lines = self.wording.lines or any(_num_lines(question) > 1 for question in test)
        length = max(len(example.targets[0]) for example in examples) + ANSWER_MARGIN
        whole = replace(self, wording=replace(self.wording, lines=lines))
        answered = whole.answer([given[0] for given in asked.values()], length, on_batch)
        # Of several answers to one question, any counts.
        exact = sum(
            any(self._is_given(one.answer or "", question) for question in given)
            for given, one in zip(asked.values(), answered, strict=True)
        )
        return {"loss": self.mean_loss(examples, test), "exact": exact}

    def _is_given(self, answer: str, question: Question) -> bool:
        """Whether an answer is the given one but for white space; where a line ends it, as many lines count."""
        if self.wording.ends_with_line:
            answer = "\n".join(answer.split("\n")[: _num_lines(question)])
        return answer.split() == (question.answer or "").split()

    def mean_loss(self, examples: Sequence[TokenizedExample], questions: Sequence[Question]) -> float:
        """The mean over the answers' tokens but those that end them, in nats; with a teacher's labels the divergence.

        Args:
            examples: The questions with answers, as tokens.
            questions: The same.
        """
        scored = without_ends(self.backbone, examples, questions, self.wording, ended=True)
        parts = [
            score_targets(self.backbone, view, [scored[index] for index in indices], len(indices)).sum(0)
            for view, indices in self.by_view(questions)
        ]
        loss, tokens = torch.stack(parts).sum(0).tolist()
        return round(float(loss / tokens), 4)


def _num_lines(question: Question) -> int:
    return (question.answer or "").count("\n") + 1
