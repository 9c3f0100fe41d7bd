"""The phases of one memory before its training: questions with answers, and the teacher's labels."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import KINDS, SELF, DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.plan import START_FILE, Plan, with_chunks
from prefixtune.distillation.questioning import answer_questions, hold_out, make_questions
from prefixtune.distillation.report import cut_unended, encode_taught, num_asked, read_test, target_endings
from prefixtune.distillation.stored import Prepared, read_prepared, source_digest, write_prepared
from prefixtune.distillation.teacher import (
    LABELS_FILE,
    Teacher,
    label_examples,
    store_labels,
    stored_labels,
    with_labels,
)
from prefixtune.distillation.wording import Wording, in_view
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

__all__ = ["Lesson", "Views", "label_data", "prepare"]


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
        reading: How well a teacher that is not the student does on `test`; empty: there is none.
        labelled: `taught` as tokens with the teacher's labels, as soon as these are made.
        seconds: What each phase took.
    """

    job: Job
    run: TrainConfig
    wording: Wording
    soft: bool
    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    test: tuple[Question, ...]
    taught: tuple[Question, ...]
    reading: Mapping[str, Any] = field(default_factory=dict)
    labelled: list[TokenizedExample] = field(default_factory=list)
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


def prepare(
    config: DistillConfig,
    plan: Plan,
    student: Backbone,
    load: Callable[[], Teacher],
    wording: Wording,
    console: Console,
) -> Lesson:
    """Make what is missing of a memory's questions and answers, and keep them in its folder.

    Args:
        config: The options.
        plan: The memory.
        student: The backbone.
        load: Loads the teacher.
        wording: The text around questions and answers.
        console: Shows the progress.

    Raises:
        CheckpointError: The folder's distillation was begun with something else, or a file of it is damaged.
        DataError: No question could be made, or the teacher answers none.
    """
    job = plan.job
    if plan.excerpt:
        write_text(job.output / START_FILE, plan.excerpt)
    if not plan.soft:
        questions = with_chunks(job.questions, plan.chunks)
        return Lesson(job, plan.run, wording, False, plan.chunks, tuple(questions), plan.test, ())
    digest, seconds = source_digest(config, job, student), dict[str, float]()
    prepared = read_prepared(job.output, digest)
    if prepared is None:
        teacher = load()
        views = Views(teacher, wording, plan.chunks)
        made = _make(config, plan, teacher, views, wording, seconds, console)
        prepared = Prepared(*made, _read(plan, teacher, student, views, wording, config, console))
        write_prepared(job.output, digest, prepared)
    lesson = Lesson(
        job, plan.run, wording, True, plan.chunks, tuple(prepared.questions), plan.test, tuple(prepared.taught)
    )
    return replace(lesson, reading=prepared.reading, seconds=seconds)


def _make(
    config: DistillConfig,
    plan: Plan,
    teacher: Teacher,
    views: Views,
    wording: Wording,
    seconds: dict[str, float],
    console: Console,
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and held-out ones, all with answers: given ones, or the teacher's."""
    job, chunks, test = plan.job, plan.chunks, plan.test
    name = f" of {job.name}" if job.name else ""
    if config.questions == SELF:
        started = time.monotonic()
        with console.progress(f"questions{name}", config.num_questions) as bar:
            questions = make_questions(
                teacher,
                chunks,
                views.pieces,
                count=config.num_questions,
                kinds=config.kinds,
                seed=config.seed,
                batch_size=config.batch_size,
                on_batch=bar.update,
            )
        if len(questions) < config.num_questions:
            counts = Counter(question.kind for question in questions)
            console.info(
                f"{len(questions)} of {config.num_questions} questions{name} were made "
                f"({', '.join(f'{kind} {counts[kind]}' for kind in KINDS if kind in config.kinds)})"
            )
        seconds["questions"] = time.monotonic() - started
    else:
        questions = with_chunks(job.questions, chunks)
    # One that has several answers is there with each; the teacher is asked once.
    held_out = list(
        dict.fromkeys(Question(question.question, None, question.chunk, question.kind) for question in test)
    )
    if not test and config.questions == SELF:
        questions, held_out = hold_out(questions, config.seed)
    started = time.monotonic()
    asked = [*questions, *held_out]
    missing = [question for question in asked if question.answer is None]
    with console.progress(f"answers{name}", len(missing)) as bar:
        texts = [question.question for question in missing]
        answers = answer_questions(
            teacher,
            texts,
            views.of(missing),
            wording,
            answer_length=config.answer_length,
            batch_size=config.batch_size,
            on_batch=bar.update,
        )
    seconds["answers"] = time.monotonic() - started
    written = iter(answers)
    complete = [(question.answer, True) if question.answer is not None else next(written) for question in asked]
    made = _with_answers(questions, complete[: len(questions)])
    if not made:
        raise DataError(
            f"the teacher {teacher.name!r} answers none of the {len(questions)} questions{name} with a word.",
            hint="give answers with the questions, another --teacher, or --ask chat.",
        )
    if len(made) < len(questions):
        console.info(f"{len(questions) - len(made)} of {len(questions)} questions{name} got no answer and are left out")
    cut = sum(not question.ended for question in made)
    if cut:
        console.info(
            f"{cut} of {len(made)} answers{name} are cut at {config.answer_length} tokens (--answer-length), and teach "
            "no end"
        )
    return made, _with_answers(held_out, complete[len(questions) :])


def _with_answers(questions: Sequence[Question], answers: Sequence[tuple[str, bool]]) -> list[Question]:
    """The questions with these answers, each with whether it ended by itself; those without a word are left out."""
    pairs = zip(questions, answers, strict=True)
    return [replace(question, answer=answer, ended=ended) for question, (answer, ended) in pairs if answer]


def _read(
    plan: Plan,
    teacher: Teacher,
    student: Backbone,
    views: Views,
    wording: Wording,
    config: DistillConfig,
    console: Console,
) -> dict[str, Any]:
    """How well another teacher than the student reads, measured while it is loaded; empty: there is none."""
    if teacher.backbone is student and teacher.prefix is None:
        return {}
    test = plan.test
    with console.progress("the teacher's answers", num_asked(test)) as bar:
        reading = read_test(
            teacher, test, [], views.of(test), [], wording, batch_size=config.batch_size, on_batch=bar.update
        )
    return reading.to_dict()


# --- labels ----------------------------------------------------------------------------------------------------------


def label_data(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    load: Callable[[], Teacher],
    data: TrainData,
    console: Console,
) -> TrainData:
    """A run's data with the teacher's labels, computed once and kept; as it is where the answers are the labels."""
    if not lesson.soft:
        return data
    started = time.monotonic()
    path = lesson.job.output / LABELS_FILE
    vocabulary = int(student.model.get_output_embeddings().weight.shape[0])
    examples = cut_unended(student, data.train.examples, lesson.questions, lesson.wording)
    taught = encode_taught(student, lesson.taught, lesson.wording, config.prefix_length) if lesson.taught else []
    labelled = stored_labels(path, data.digest, [*examples, *taught], vocabulary)
    if labelled is None:
        labelled = _label(config, lesson, student, load(), [*examples, *taught], vocabulary, console)
        store_labels(path, labelled, data.digest)
    lesson.labelled[:] = labelled[len(examples) :]
    lesson.seconds["labels"] = time.monotonic() - started
    return with_labels(data, labelled[: len(examples)])


def _label(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    teacher: Teacher,
    examples: Sequence[TokenizedExample],
    vocabulary: int,
    console: Console,
) -> list[TokenizedExample]:
    """The training examples, and behind them the held-out ones, with the teacher's labels."""
    views = Views(teacher, lesson.wording, lesson.chunks)
    questions = [*lesson.questions, *lesson.taught]
    # A teacher that was trained with this wording says itself where an answer ends.
    closing = [0] * len(questions) if lesson.wording.tuned else target_endings(student, questions, lesson.wording)
    with console.progress("the teacher's labels", len(questions)) as bar:
        return label_examples(
            teacher,
            examples,
            [*views.of(lesson.questions), *views.of(lesson.taught)],
            vocabulary=vocabulary,
            closing=closing,
            batch_size=config.batch_size,
            on_batch=bar.update,
        )
