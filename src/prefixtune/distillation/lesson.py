"""A memory that is ready to be trained, and what its teacher has in view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from prefixtune.data import Example
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording, in_view
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig

__all__ = ["TEACHER_FILE", "Lesson", "Views"]

TEACHER_FILE = "teacher.json"
"""In a run's folder: how well another teacher than the student reads."""


@dataclass(frozen=True)
class Lesson:
    """A memory that is ready to be trained.

    Attributes:
        job: What it is made of.
        run: Its training.
        wording: The text around questions and answers.
        soft: The teacher's likeliest tokens are the labels; else the answers are.
        chunks: The text in pieces that the teacher has in view; empty: there is no text.
        questions: To train on, each with an answer.
        test: Held out; answers are the given ones.
        taught: Held out, with the teacher's answers; empty where the answers are the labels.
        seconds: What each phase took, those of earlier sittings with it.
    """

    job: Job
    run: TrainConfig
    wording: Wording
    soft: bool
    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    test: tuple[Question, ...]
    taught: tuple[Question, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def examples(self) -> list[Example]:
        """The questions with their answers, to train on."""
        return [Example(question.question, (question.answer or "",)) for question in self.questions]


class Views:
    """The pieces of a text in a teacher's view, computed when they are asked for."""

    def __init__(self, teacher: Teacher, wording: Wording, chunks: Sequence[str]) -> None:
        self._teacher, self._wording, self._chunks = teacher, wording, chunks

    @cached_property
    def pieces(self) -> list[Prefix]:
        """One per piece of the text."""
        return [in_view(self._teacher.backbone, self._wording, chunk) for chunk in self._chunks]

    def of(self, questions: Sequence[Question]) -> list[Prefix | None]:
        """What stands before each question."""
        if not self._chunks:
            return [self._teacher.prefix] * len(questions)
        return [self.pieces[question.chunk] for question in questions]
